"""TensorFlow beside torch: one prompt, then a token at a time, on the same weights, prompts and cores.

A call is timed from outside, since a loop inside a graph shows no token before its last: a call for many tokens, and a
call for one. Their difference is the steps.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from bench import CORES, measure
from bench.case import Bench, Case
from bench.lines import Found
from bench.markdown import NONE, by_system, milliseconds, spread, unique
from bench.systems import TENSORFLOW, Capacity, open_system
from bench.workload import Target, Workload, register

EAGER, COMPILED, OURS = "baseline", "static, compiled", "paged"
CONTEXTS = {f"tensorflow, {context} tokens": context for context in (128, 1024)}  # workload -> length of its prompts

Generate = Callable[[Sequence[int], int], list[int]]


def run_tensorflow(bench: Bench) -> dict:
    from kv_strategies.models.load import DEFAULT_MODEL, load_tokenizer, read_config
    from kv_strategies.models.text import prompts

    context, new_tokens, repeats = (bench.params[name] for name in ("context", "new_tokens", "repeats"))
    folder = str(bench.case.model or DEFAULT_MODEL)
    vocab_size = read_config(folder)["vocab_size"]
    texts = prompts(load_tokenizer(folder), [context] * (1 + repeats), seed=context, vocab_size=vocab_size)
    framework, load = _tensorflow(bench, folder) if bench.case.system in TENSORFLOW else _torch(bench)
    bench.memory.start()
    before = bench.memory.read()
    generate = load(context + new_tokens)
    bench.free()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed goes back to the system, and is not counted
    bench.memory.start()
    bench.say("the first call")
    calls = [_timed(generate, texts[0], new_tokens)]
    firsts = []
    for repeat, text in enumerate(texts[1:], 1):
        bench.say(f"repeat {repeat} of {repeats}")
        firsts.append(_timed(generate, text, 1))
        calls.append(_timed(generate, text, new_tokens))
    (first_call, _), *later = calls
    steps = [(many - one) / (new_tokens - 1) for (many, _), (one, _) in zip(later, firsts, strict=True)]
    return {
        "framework": framework,
        "first_call": first_call,
        "later_call": measure.spread([seconds for seconds, _ in later]),
        "ttft": measure.spread([seconds for seconds, _ in firsts]),
        "step": measure.spread(steps),
        "tokens_per_second": measure.spread([1 / step for step in steps]),
        "memory": bench.memory.read() - before,
        "tokens": [tokens for _, tokens in calls],
    }


def _torch(bench: Bench) -> tuple[str, Callable[[int], Generate]]:
    from transformers import CompileConfig

    def load(capacity: int) -> Generate:
        system = bench.case.system
        if system == COMPILED:  # on a GPU `generate()` does so by itself
            system, how = "static", CompileConfig()
            how._compile_all_devices = True
            bench.model.generation_config.compile_config = how
        opened = open_system(system, bench.model, Capacity([[capacity]]))
        return lambda prompt, new_tokens: opened([prompt], new_tokens).token_ids[0]

    return f"torch {torch.__version__}", load


def _tensorflow(bench: Bench, folder: str) -> tuple[str, Callable[[int], Generate]]:
    """Its model alone: torch's is not to be in memory beside it."""
    from bench.peers import tensorflow_llama as peer

    peer.use(CORES, torch.get_num_threads())
    way = peer.WAYS[bench.case.system.removeprefix("tensorflow, ")]
    return f"TensorFlow {peer.tf.__version__}", lambda capacity: way(peer.Llama(Path(folder)), capacity)


def _timed(generate: Generate, prompt: Sequence[int], new_tokens: int) -> tuple[float, list[int]]:
    start = time.perf_counter()
    tokens = generate(prompt, new_tokens)
    return time.perf_counter() - start, tokens


def cases(context: int) -> Callable[[Target], Iterable[Case]]:
    params = {"context": context, "new_tokens": 64, "repeats": 5}
    return lambda to: to.each([EAGER, COMPILED, OURS, *TENSORFLOW], "float32", params, timeout=550)


NOTE = (
    "A call for many tokens less a call for one (the first token) are the steps; tokens/s are theirs. The first call "
    "traces and compiles; it and the later one make all tokens. Memory: what is resident at most from the first call "
    f"on, less what was before the weights were loaded. Equal: the tokens are those of `{OURS}`, this project's "
    "`Runner`. TensorFlow's ways: [tensorflow_llama.py](../peers/tensorflow_llama.py)."
)


def tables(found: Found, model: str) -> str:
    of_each = {context: found.of(workload, model) for workload, context in CONTEXTS.items()}
    done = [line["result"] for lines in of_each.values() for line in lines.values() if line["status"] == "ok"]
    shown = [f"**{' and '.join(unique(result['framework'] for result in done))}: one prompt, float32**", NOTE]
    shown += [f"Behind {context} tokens:\n\n{_table(lines)}" for context, lines in of_each.items() if lines]
    return "\n\n".join(shown)


def _table(lines: Mapping[str, dict]) -> str:
    eager, ours = (lines.get(system, {}).get("result") for system in (EAGER, OURS))
    columns: dict[str, Callable[[dict], str]] = {
        "tokens/s": lambda result: spread(result["tokens_per_second"], 1, 1),
        "of torch eager": lambda result: f"{_rate(result) / _rate(eager):.2f}x" if eager else NONE,
        "step, ms": lambda result: milliseconds(result["step"], 1),
        "first token, ms": lambda result: milliseconds(result["ttft"], 0),
        "first call, s": lambda result: f"{result['first_call']:.1f}",
        "later call, s": lambda result: f"{result['later_call']['median']:.1f}",
        "memory, MB": lambda result: f"{result['memory'] / 1e6:.0f}",
        "equal": lambda result: _equal(result, ours) if ours else NONE,
    }
    return by_system(lines, columns)


def _rate(result: dict) -> float:
    return result["tokens_per_second"]["median"]


def _equal(result: dict, ours: dict) -> str:
    same = measure.num_same(result["tokens"], ours["tokens"])
    return "yes" if same == len(ours["tokens"]) else f"{same} of {len(ours['tokens'])} prompts"


for workload, context in CONTEXTS.items():
    register(
        Workload(
            workload,
            run_tensorflow,
            f"TensorFlow's ways to keep K and V beside torch's and ours, behind {context} tokens",
            cases={"tensorflow": cases(context)},
            tables=tables,
            words=lambda result: f"{_rate(result):.1f} tokens/s, first call {result['first_call']:.1f} s",
        )
    )
