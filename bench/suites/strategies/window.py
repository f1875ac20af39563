"""Time a decode step and KV bytes after a short and after a long prompt."""

from __future__ import annotations

from collections.abc import Callable

from bench import measure
from bench.case import Bench
from bench.markdown import milliseconds, of_each, table
from bench.suites.strategies import shape_cases
from bench.systems import BLOCK_SIZE, CHUNK, Capacity, bytes_per_block, ours
from bench.workload import Claim, Workload, register


def run_window(bench: Bench) -> dict:
    """Decode steps behind prompts of several lengths, all but the last tokens of which are out of sight."""
    window, sinks, new_tokens = (bench.params[name] for name in ("window", "sinks", "new_tokens"))
    blocks = -(-(window + sinks + CHUNK) // BLOCK_SIZE) + 4
    system = ours(bench.model, "window", Capacity([[1]]), num_blocks=blocks, window=window, sinks=sinks)
    rows = []
    for context in bench.params["contexts"]:
        bench.say(f"after {context} tokens")
        prompt = bench.prompts([context], seed=context)
        most = system.most_blocks(prompt, new_tokens)  # the same lengths: kernels compile, graphs are captured
        steps = measure.steady_steps(system(prompt, new_tokens).times)
        rows.append(
            {"tokens": context, "step": measure.spread(steps), "kv_bytes": most * bytes_per_block(system.strategy)}
        )
    return {"points": rows}


ON_GPU = {"contexts": [4096, 65536], "window": 2048, "sinks": 4, "new_tokens": 48}
ON_CPU = {"contexts": [512, 1536], "window": 256, "sinks": 4, "new_tokens": 20}


def _growth(of: Callable[[dict], float]) -> Callable[[dict], float]:
    """The last point over the first."""
    return lambda result: of(result["points"][-1]) / of(result["points"][0])


CLAIMS = [
    Claim(
        "decode step after the longest prompt / after the shortest",
        "within 3 %",
        1.03,
        _growth(lambda point: point["step"]["median"]),
        "{:.3f}",
        at_most=True,
    ),
    Claim("KV bytes, likewise", "within 3 %", 1.03, _growth(lambda point: point["kv_bytes"]), "{:.3f}", at_most=True),
]


def _table(result: dict) -> str:
    rows = [
        [point["tokens"], milliseconds(point["step"]), f"{point['kv_bytes'] / 1e6:.1f}"] for point in result["points"]
    ]
    title = f"**Window of {result['window']} tokens and {result['sinks']} sinks: one request**\n\n"
    return title + table(["prompt, tokens", "decode step, ms", "KV blocks in use, MB"], rows)


register(
    Workload(
        "window",
        run_window,
        "time a decode step and KV bytes after a short and after a long prompt",
        cases={"strategies": shape_cases("window", ON_GPU, ON_CPU)},
        tables=of_each("window", _table),
        claims=CLAIMS,
    )
)
