"""Which kernels a step of each strategy is made of, and how much of it the GPU works."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from bench import measure
from bench.case import Bench, Case
from bench.suites.limit import SHAPE, table
from bench.systems import CHUNK, Capacity, open_system, ours
from bench.workload import Target, Workload, register


def run_profile(bench: Bench) -> dict:
    """Entries of {name, strategy, options, rows, context}, each over a pool of its own; see `PROFILED`."""
    rows = []
    for entry in bench.params["entries"]:
        bench.say(entry["name"])
        rows.append({"name": entry["name"]} | measure.attempt(lambda entry=entry: _profiled(bench, entry)))
        bench.free()
    return {"entries": rows}


#: Strategy, its options, rows, tokens each; "shared" of them begin alike, "new" are left of a prompt; a prompt of
#: "beside" tokens is computed while the rows decode.
PROFILED = [
    {"name": "paged", "strategy": "paged", "rows": 1},
    {"name": "contiguous", "strategy": "contiguous", "rows": 1},
    {"name": "prefix", "strategy": "prefix", "rows": 1},
    {"name": "window of 2048", "strategy": "window", "rows": 1},
    {"name": "offload, exact", "strategy": "offload", "rows": 1},
    {"name": "offload, top-128", "strategy": "offload", "options": {"top_n": 128}, "rows": 1},
    {"name": "int8", "strategy": "int8", "rows": 1},
    {"name": "fp8", "strategy": "fp8", "rows": 1},
    {"name": "prefix, 32 rows behind one history", "strategy": "prefix", "rows": 32, "shared": 4096, "new": 16},
    {"name": "paged, 32 x 1024", "strategy": "paged", "rows": 32, "context": 1024},
    {"name": "a chunk of a prompt beside 16 x 2048", "strategy": "paged", "rows": 16, "context": 2048, "beside": 12288},
    {"name": "prefill of 64 tokens behind 4096 found", "strategy": "prefix", "rows": 1, "shared": 4096, "prefill": 64},
]


def _profiled(bench: Bench, entry: dict) -> dict:
    """Some decode steps in a row, some that compute a prompt as well, or one prefill, as the profiler saw them."""
    from kv_strategies import Request

    rows, shared, num_steps = entry["rows"], entry.get("shared", 0), bench.params["steps"]
    own = entry.get("prefill") or (entry["new"] if shared else entry.get("context", bench.params["context"]))
    new_tokens = 1 if "prefill" in entry else num_steps + 8
    beside = bench.prompts([entry["beside"]], seed=3)[0] if "beside" in entry else []
    new_tokens += 2 * ((rows * own + len(beside)) // CHUNK)  # rows wait for the prefill of others
    capacity = Capacity([[shared + own + new_tokens] * rows + [len(beside) + 1] * bool(beside)])
    system = (
        ours(bench.model, entry["strategy"], capacity, **entry.get("options", {}))
        if (entry["strategy"] != "contiguous")
        else open_system("contiguous", bench.model, capacity)
    )
    history = bench.prompts([shared], seed=1)[0] if shared else []
    if shared:
        system.strategy.preload(history)
    ends = iter(bench.prompts([own] * rows * 4, seed=2))
    runner = system.runner

    def submit() -> None:
        runner.submit([Request(history + next(ends), max_new_tokens=new_tokens) for _ in range(rows)])

    if "prefill" in entry:  # no row decodes, behind which it would be captured
        runner.warm_up(shared + own)
    submit()
    if "prefill" in entry:
        for _ in range(3):
            while runner.num_running or runner.num_waiting:
                runner.step()
            submit()
        return _profile(bench, lambda: [runner.step() for _ in range(2)], steps=1)
    seen = dict.fromkeys(range(rows), 0)
    while min(seen.values()) < 4:  # all decode, and their graph is there
        for event in runner.step():
            seen[event.request_id] += 1
    if beside:
        runner.submit([Request(beside, max_new_tokens=1, request_id="beside")])
        for _ in range(2):  # what a step of this kind compiles
            runner.step()
        num_steps = max(1, min(num_steps, len(beside) // CHUNK - 3))  # each with a whole chunk
    found = _profile(bench, lambda: _decode(runner.step, num_steps), steps=num_steps)
    for request_id in (*range(rows), *["beside"] * bool(beside)):
        runner.cancel(request_id)
    return found


def _decode(step: Callable[[], list], num_steps: int) -> None:
    """So many that tell tokens: a step that is not needed yet is none."""
    while num_steps:
        num_steps -= bool(step())


def _profile(bench: Bench, work: Callable[[], object], steps: int, num_kernels: int = 10) -> dict:
    """Of one step: seconds, the share in which the GPU works, and [name, times, seconds] of its heaviest kernels.

    On a CPU the operators that call no others stand in for the kernels.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = bench.case.device.startswith("cuda")
    measure.synchronize(bench.case.device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        work()
        measure.synchronize(bench.case.device)
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans = sorted(
        (event.time_range.start, event.time_range.end, short_name(event.name))
        for event in profiler.events()
        if event.device_type == device and (on_gpu or not event.cpu_children)
    )
    totals: dict[str, list[float]] = {}
    busy, reached = 0.0, spans[0][0]
    for start, end, name in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
        count_and_time = totals.setdefault(name, [0, 0.0])
        count_and_time[0] += 1
        count_and_time[1] += end - start
    ranked = sorted(totals.items(), key=lambda item: -item[1][1])
    kernels = [[name, round(count / steps, 2), spent / steps / 1e6] for name, (count, spent) in ranked]
    others = kernels[num_kernels:]
    if others:
        kernels[num_kernels:] = [["others", sum(row[1] for row in others), sum(row[2] for row in others)]]
    window = (reached - spans[0][0]) / 1e6
    return {
        "step": window / steps,
        "busy_share": busy / 1e6 / window,
        "launches": len(spans) / steps,
        "kernels": kernels,
    }


def short_name(kernel: str) -> str:
    """A kernel's name without its types and template arguments."""
    text = kernel.removeprefix("void ").split("(")[0].split("<")[0]
    return (text.split("::")[-1] or kernel)[:48]


def cases(to: Target) -> Iterable[Case]:
    if to.on_gpu:
        params = {"entries": PROFILED, "context": 4096, "steps": 8}
        yield to.case("every strategy", "bfloat16", params, timeout=300, model=to.model or SHAPE)


def _words(result: dict) -> str:
    return ", ".join(
        f"{entry['name']} "
        + (f"{entry['step'] * 1e3:.2f} ms, busy {entry['busy_share']:.0%}" if "step" in entry else entry["error"])
        for entry in result["entries"]
    )


register(
    Workload(
        "profile",
        run_profile,
        "which kernels a step of each strategy is made of, and how much of it the GPU works",
        cases={"limit": cases},
        tables=table.tables,
        words=_words,
    )
)
