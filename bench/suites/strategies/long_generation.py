"""One request whose answer is far longer than its prompt: what a decode step takes as the answer grows.

What a prompt leaves of itself hardly counts here, only what is kept of every new token does. A case a system, each in a
process of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise

from bench import measure
from bench.case import Bench, Case
from bench.lines import Found
from bench.markdown import NONE, cell, table
from bench.suites.default.latency import share, what_a_share_is
from bench.suites.strategies import shape_cases
from bench.systems import Capacity, bytes_per_token, bytes_read
from bench.workload import Target, Workload, register

SYSTEMS = ["baseline", "paged", "window", "evict", "int8", "int4", "prefix+int8", "prefix+window"]


def run_long_generation(bench: Bench) -> dict:
    """The steps in equal parts of the answer, every part after as many tokens; the first token is none of a step."""
    prompt, new_tokens, parts = (bench.params[name] for name in ("prompt", "new_tokens", "parts"))
    system = bench.open(Capacity([[prompt + new_tokens]]))
    bench.say("warming up")
    system(bench.prompts([prompt], seed=1), 4)
    system.warm_up(bench.prompts([prompt], seed=2), new_tokens)  # a prompt met twice is captured, and every bucket
    bench.free()
    bench.memory.start()
    bench.say(f"{new_tokens} tokens behind {prompt}")
    run = system(bench.prompts([prompt], seed=3), new_tokens)
    peak, (moments,) = bench.memory.read(), run.times
    weights, points = measure.weight_bytes(bench.model), []
    for begin, end in pairwise(new_tokens * part // parts for part in range(parts + 1)):
        steps = [b - a for a, b in pairwise(moments[max(begin - 1, 0) : end])]
        points.append(
            {
                "context": prompt + end,  # at the end of the part
                "step": measure.spread(steps),
                "mean_step": sum(steps) / len(steps),
                "step_bytes": int(weights + bytes_read(system, bench.model, prompt, (begin + end) // 2)),
            }
        )
    kv = system.filling
    return {
        "ttft": moments[0],
        "seconds": run.seconds,
        "tokens_per_second": run.num_tokens / run.seconds,
        "points": points,
        "peak": peak,
        "kv": kv,
        "kv_bytes_used": round(kv["places"] * bytes_per_token(system, bench.model)) if kv else None,
        **bench.model_bytes(),
    }


ON_GPU = {"prompt": 512, "new_tokens": 3584, "parts": 8}  # together the context of Llama-2-7B
ON_CPU = {"prompt": 64, "new_tokens": 448, "parts": 4}


def cases(to: Target) -> Iterable[Case]:
    for system in SYSTEMS:
        yield from shape_cases(system, ON_GPU, ON_CPU)(to)


def _tables(found: Found, model: str) -> str:
    lines = found.of("long generation", model)
    done = [line for line in lines.values() if line["status"] == "ok"]
    if not done:
        return ""
    params, contexts = done[-1]["params"], [point["context"] for point in done[-1]["result"]["points"]]
    starts = [params["prompt"], *contexts]
    shown = sorted({0, len(contexts) // 2, len(contexts) - 1})  # the first part, one in the middle, the last

    def step(line: dict, part: int, result: dict) -> str:
        point = result["points"][part]
        return f"{point['step']['median'] * 1e3:.2f}{share(found, line, point)}"

    rows = []
    for system, line in lines.items():
        shows = [
            *(partial(step, line, part) for part in shown),
            lambda result: f"{result['tokens_per_second']:.1f}",
            lambda result: f"{result['kv']['bytes'] / 1e6:.1f}" if result["kv"] else NONE,
            lambda result: f"{result['kv_bytes_used'] / 1e6:.1f}" if result["kv"] else NONE,
            lambda result: f"{result['peak'] / 1e9:.2f}",
        ]
        rows.append([system, *(cell(line, show) for show in shows)])
    title = f"**Long generation: one request of {params['prompt']} tokens, {params['new_tokens']} more as its answer**"
    note = f"Median step in a part of the answer, from one context to another{what_a_share_is(found)}; KV: what was "
    note += "set aside, and the blocks of it that held tokens at the fullest moment."
    steps = [f"step, ms, {starts[part]} to {contexts[part]}" for part in shown]
    head = ["system", *steps, "tokens/s in all", "KV, MB", "in use, MB", "peak, GB"]
    return f"{title}\n\n{note}\n\n" + table(head, rows)


def _words(result: dict) -> str:
    first, last = result["points"][0], result["points"][-1]
    steps = f"{first['step']['median'] * 1e3:.1f} to {last['step']['median'] * 1e3:.1f} ms"
    return f"{result['tokens_per_second']:.1f} tokens/s, step {steps}, peak {result['peak'] / 1e9:.2f} GB"


register(
    Workload(
        "long generation",
        run_long_generation,
        "an answer far longer than its prompt: a decode step as it grows, tokens per second, memory",
        cases={"strategies": cases},
        tables=_tables,
        words=_words,
    )
)
