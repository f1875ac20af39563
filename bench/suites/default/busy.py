"""The share of a decode step in which the GPU works."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench.case import Bench, Case, is_random
from bench.lines import Found
from bench.markdown import by_system
from bench.suites.default import speed_models
from bench.systems import CHUNK, EVERYTHING, Capacity
from bench.workload import Target, Workload, register


def run_busy(bench: Bench) -> dict:
    """The union of all GPU work over the second half of a batch, where rows only decode, as the profiler saw it."""
    from torch.profiler import ProfilerActivity, profile

    batch, context, new_tokens = bench.params["batch"], bench.params["context"], bench.params["new_tokens"]
    new_tokens += batch * context // CHUNK
    system = bench.open(Capacity([[context + new_tokens] * batch]))
    system(bench.prompts([context] * batch, seed=1), new_tokens)
    bench.say("profiling")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        system(bench.prompts([context] * batch, seed=2), new_tokens)
    work = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    middle = (work[0][0] + work[-1][1]) / 2
    return {"batch": batch, "context": context, **_union(work, middle), "kernels": _heaviest(work, middle)}


def _union(work: list[tuple[float, float, str]], begin: float) -> dict:
    busy, reached = 0.0, begin
    for start, end, _ in work:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {"busy_share": busy / (reached - begin)}


def _heaviest(work: list[tuple[float, float, str]], begin: float, count: int = 8) -> list:
    """[name, share of the GPU's time] of the kernels that took most."""
    totals: dict[str, float] = {}
    for start, end, name in work:
        if start >= begin:
            totals[name] = totals.get(name, 0.0) + end - start
    ranked = sorted(totals.items(), key=lambda item: -item[1])[:count]
    return [[name[:60], round(spent / sum(totals.values()), 4)] for name, spent in ranked]


def cases(to: Target) -> Iterable[Case]:
    for model in filter(is_random, speed_models(to)):
        params = {"batch": 16, "context": 512, "new_tokens": 64}
        yield from to.each(EVERYTHING, "bfloat16", params, model=model)


COLUMNS = {
    "requests x context": lambda result: f"{result['batch']} x {result['context']}",
    "GPU busy": lambda result: f"{result['busy_share']:.1%}",
    "heaviest kernels (share of GPU time)": lambda result: ", ".join(
        f"{name} {part:.0%}" for name, part in result["kernels"][:3]
    ),
}


def tables(found: Found, model: str) -> str:
    return "\n\n".join(
        f"**GPU busy share while decoding, {dtype}**\n\n" + by_system(found.of("busy", model, dtype), COLUMNS)
        for dtype in found.dtypes("busy", model)
    )


register(
    Workload(
        "busy",
        run_busy,
        "the share of a decode step in which the GPU works (GPU only)",
        cases={"default": cases},
        tables=tables,
        words=lambda result: f"GPU busy {result['busy_share']:.1%}",
    )
)
