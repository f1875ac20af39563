"""A decode step with V on the host, all of it and the heaviest tokens alone, against all of it on the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise

from bench import measure
from bench.case import Bench
from bench.markdown import NONE, milliseconds, of_each, table
from bench.probes import limits
from bench.suites.strategies import shape_cases
from bench.systems import Capacity, Native, Ours, ours
from bench.workload import Claim, Workload, register


def run_offload(bench: Bench) -> dict:
    """One long context: all on the device, V on the host and read whole, V on the host and read in part, native."""
    context, top_n, new_tokens = (bench.params[name] for name in ("context", "top_n", "new_tokens"))
    on_gpu = bench.case.device.startswith("cuda")
    capacity = Capacity([[context + new_tokens]])
    prompts = bench.prompts([context], seed=1)
    found: dict[str, object] = {}
    if on_gpu:
        found["host_to_device"] = limits.link(bench.case.device)["host_to_device"]
    for name, options in {"paged": {}, "exact": {}, "heaviest": {"top_n": top_n}}.items():
        bench.say(name)
        system = ours(bench.model, "paged" if name == "paged" else "offload", capacity, **options)
        system(prompts, 4)
        row = {"step": measure.spread(measure.steady_steps(system(prompts, new_tokens).times))}
        if name == "exact":
            row["bytes"] = _bytes_per_step(system, prompts, new_tokens)
        row["kv_bytes"] = system.strategy.stats()["kv_bytes_per_tier"][bench.model.device.type]
        found[name] = row
        del system
        bench.free()
    if on_gpu:
        bench.say("native offloaded cache")
        native = Native(bench.model, "offloaded")
        native(prompts, bench.params["native_tokens"])  # the first steps behind a long prompt take ten times as long
        steps = measure.steady_steps(native(prompts, bench.params["native_tokens"]).times)
        found["offloaded"] = {"step": measure.spread(steps)}
    return found


def _bytes_per_step(system: Ours, prompts: list[list[int]], new_tokens: int) -> float:
    """Bytes that one decode step brings to the device, by the strategy's own count."""
    fetched = [system.strategy.placement.stats()["bytes_to_device"] for _ in system.stream(prompts, new_tokens)]
    return statistics.median(b - a for a, b in pairwise(fetched[1:-1]))


ON_GPU = {"context": 16384, "top_n": 128, "new_tokens": 24, "native_tokens": 12}
ON_CPU = {"context": 512, "top_n": 64, "new_tokens": 8}


def _step(result: dict, name: str) -> float | None:
    return result[name]["step"]["median"] if name in result else None


def _times_native(name: str) -> Callable[[dict], float | None]:
    return lambda result: _step(result, "offloaded") and _step(result, "offloaded") / _step(result, name)


def _link_share(result: dict) -> float | None:
    if "host_to_device" not in result:
        return None
    return result["exact"]["bytes"] / result["host_to_device"] / _step(result, "exact")


CLAIMS = [
    Claim(
        "exact, {context} tokens: bytes / measured link rate / step",
        "at least 0.92 of the link",
        0.92,
        _link_share,
        "{:.2f}",
    ),
    Claim(
        "exact: native offloaded step / step", "at least 2.4x the native offloaded cache", 2.4, _times_native("exact")
    ),
    Claim(
        "top-{top_n}, {context} tokens: step / resident paged step",
        "at most 1.2x",
        1.2,
        lambda result: _step(result, "heaviest") / _step(result, "paged"),
        "{:.2f}x",
        at_most=True,
    ),
    Claim(
        "top-{top_n}: KV bytes on the GPU / of paged",
        "at most 0.52",
        0.52,
        lambda result: result["heaviest"]["kv_bytes"] / result["paged"]["kv_bytes"],
        "{:.3f}",
        at_most=True,
    ),
    Claim(
        "top-{top_n}: native offloaded step / step",
        "at least 20x the native offloaded cache",
        20,
        _times_native("heaviest"),
    ),
]


def _table(result: dict) -> str:
    names = {"paged": "resident (paged)", "exact": "V on the host, exact", "offloaded": "native offloaded"}
    names["heaviest"] = f"V on the host, top-{result['top_n']}"
    rows = []
    for name, text in names.items():
        found = result.get(name)
        kv, moved = (found or {}).get("kv_bytes"), (found or {}).get("bytes")
        rows.append(
            [
                text,
                milliseconds(found["step"]) if found else "not run",
                f"{kv / 1e9:.2f}" if kv else NONE,
                f"{moved / 1e9:.3f}" if moved else NONE,
            ]
        )
    rate = f", link {result['host_to_device'] / 1e9:.1f} GB/s in the same run" if "host_to_device" in result else ""
    head = ["", "decode step, ms", "KV on the GPU, GB", "brought to it a step, GB"]
    return f"**Offload: one request of {result['context']} tokens{rate}**\n\n" + table(head, rows)


register(
    Workload(
        "offload",
        run_offload,
        "a decode step with V on the host, all of it and the heaviest tokens alone, against all of it on the GPU",
        cases={"strategies": shape_cases("offload", ON_GPU, ON_CPU)},
        tables=of_each("offload", _table),
        claims=CLAIMS,
    )
)
