"""How long is the first token held up: by kernels not yet compiled, by the prompt, by what is left of it on a hit?"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from bench import measure
from bench.case import Bench, Case
from bench.markdown import milliseconds
from bench.suites.limit import SHAPE, table
from bench.suites.strategies.prefix import run_prefix
from bench.systems import BLOCK_SIZE, Capacity, Ours, open_system
from bench.workload import Target, Workload, register

FIRST_TOKEN = {"lengths": [4096, 16384], "points": [[4096, 64], [16184, 64]], "repeats": 3}


def run_first_token(bench: Bench) -> dict:
    """First without any compiled kernel; then prompts in one chunk, ours and native; then hits, as in `prefix`."""
    start = time.perf_counter()
    bench.model  # noqa: B018
    load = time.perf_counter() - start
    return {
        "cold": measure.attempt(lambda: _cold(bench)) | {"load": load},
        "prefill": [measure.attempt(lambda n=n: _prefill(bench, n)) | {"tokens": n} for n in bench.params["lengths"]],
        "hits": measure.attempt(lambda: run_prefix(bench)),
    }


def _in_one_chunk(bench: Bench, tokens: int, new_tokens: int) -> Ours:
    from kv_strategies import build

    capacity = Capacity([[tokens + new_tokens]])
    strategy = build("paged", bench.model, num_blocks=capacity.blocks(BLOCK_SIZE))
    return Ours(bench.model, strategy, capacity, max_batch_tokens=tokens)


def _cold(bench: Bench, new_tokens: int = 8) -> dict:
    """Of the first prompt after a start: when its first token is there, and a few more, the decode graph made."""
    tokens = bench.params["lengths"][0]
    bench.say("no kernel compiled")
    with no_compiled_kernels():
        times = _in_one_chunk(bench, tokens, new_tokens)(bench.prompts([tokens], seed=0), new_tokens).times[0]
    return {"tokens": tokens, "first": times[0], "new_tokens": new_tokens, "all": times[-1]}


@contextmanager
def no_compiled_kernels() -> Iterator[None]:
    """Triton finds nothing in its cache on disk."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def _prefill(bench: Bench, tokens: int) -> dict:
    """One prompt, one new token, a few times; the operations that takes."""
    model, config = bench.model, bench.model.config
    bench.say(f"prefill of {tokens} tokens")
    row: dict[str, object] = {}
    peers = {"own": _in_one_chunk(bench, tokens, 1), "native": open_system("baseline", model, Capacity([[tokens + 1]]))}
    for name, system in peers.items():
        prompts = bench.prompts([tokens] * (bench.params["repeats"] + 1), seed=tokens)
        row[name] = measure.spread([system([prompt], 1).times[0][0] for prompt in prompts][1:])
    weights = measure.weight_bytes(model) // model.dtype.itemsize
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    row["operations"] = 2 * weights * tokens + 2 * tokens**2 * width * config.num_hidden_layers
    bench.free()
    return row


def cases(to: Target) -> Iterable[Case]:
    if to.on_gpu:
        yield to.case("paged", "bfloat16", FIRST_TOKEN, timeout=300, model=to.model or SHAPE)


def _words(result: dict) -> str:
    parts = [f"{row['tokens']} {milliseconds(row['own'], 1)} ms" for row in result["prefill"] if "own" in row]
    points = result["hits"].get("points", [])
    parts += [f"{p['shared']} + {p['new']} found {milliseconds(p['hit'], 1)} ms" for p in points]
    return ", ".join(parts) or "nothing"


register(
    Workload(
        "first token",
        run_first_token,
        "how long is it held up: by kernels not yet compiled, by the prompt, by what is left of it on a hit",
        cases={"limit": cases},
        tables=table.tables,
        words=_words,
    )
)
