"""Time to first token and time a decode step, against context length and against batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from bench import measure
from bench.case import Bench, Case, is_random
from bench.lines import Found
from bench.markdown import NONE, cell, table, unique
from bench.suites.default import speed_models
from bench.systems import CHUNK, EVERY, EVERYTHING, Capacity, bytes_read
from bench.workload import Target, Workload, register


def run_latency(bench: Bench) -> dict:
    """Points of (batch, context): every row has the same context, and steps count while all rows decode."""
    new_tokens = bench.params["new_tokens"]
    points = [tuple(point) for point in bench.params["points"]]
    chunks = [batch * context // CHUNK for batch, context in points]  # rows that wait for the prefill of others
    news = [new_tokens + n for n in chunks]
    capacity = Capacity([[context + new] * batch for (batch, context), new in zip(points, news, strict=True)])
    system = bench.open(capacity)
    system(bench.prompts([16], seed=1), 4)
    rows = []
    for (batch, context), new in zip(points, news, strict=True):
        bench.say(f"batch {batch}, context {context}")
        try:
            rows.append(_latency_point(bench, system, batch, context, new))
        except torch.OutOfMemoryError:
            rows.append({"batch": batch, "context": context, "error": "out of memory"})
        bench.free()
    return {"points": rows, **bench.model_bytes()}


def _latency_point(bench: Bench, system, batch: int, context: int, new_tokens: int) -> dict:
    first = None
    if bench.params.get("warm_points"):  # kernels compile in the first run, and a prompt met twice is captured
        runs = [system(bench.prompts([context] * batch, seed=seed), new_tokens) for seed in (batch, 50 + batch)]
        first = runs[0].times[0][0]
    bench.free()
    bench.memory.start()
    ttfts, steps = [], []
    for repeat in range(bench.params.get("repeats", 1)):
        run = system(bench.prompts([context] * batch, seed=100 + repeat), new_tokens)
        ttfts.append(max(row[0] for row in run.times))
        steps += measure.steady_steps(run.times)
    read = measure.weight_bytes(bench.model) + batch * bytes_read(system, bench.model, context, new_tokens // 2)
    return {
        "batch": batch,
        "context": context,
        "first_ttft": first,
        "ttft": measure.spread(ttfts),
        "step": measure.spread(steps) if steps else None,
        "step_bytes": int(read),
        "peak": bench.memory.read(),
        "tokens": run.token_ids[0][:8],
    }


def context_cases(to: Target) -> Iterable[Case]:
    if not to.on_gpu:
        params = {"points": [[1, 256], [1, 4200]], "new_tokens": 12}
        yield from to.each(EVERYTHING, "float32", params)
        return
    for model in speed_models(to):
        contexts = [512, 4096, 16384] if is_random(model) else [512, 2048, 4608]
        params = {"points": [[1, n] for n in contexts], "new_tokens": 48, "repeats": 2, "warm_points": True}
        yield from to.each(EVERYTHING, "bfloat16", params, timeout=500, model=model)


def batch_cases(to: Target) -> Iterable[Case]:
    if not to.on_gpu:
        params = {"points": [[1, 128], [4, 128], [16, 128]], "new_tokens": 12}
        yield from to.each(["baseline", "contiguous", "paged"], "float32", params)
    for model in filter(is_random, speed_models(to)):
        params = {"points": [[1, 1024], [8, 1024], [16, 1024], [32, 1024]], "new_tokens": 48, "warm_points": True}
        yield from to.each(["baseline", "static", EVERY], "bfloat16", params, timeout=500, model=model)


def tables_of(workload: str, show: Callable[[Found, str, str, str], str]) -> Callable[[Found, str], str]:
    """`show` for every dtype."""
    return lambda found, model: "\n\n".join(
        show(found, workload, model, dtype) for dtype in found.dtypes(workload, model)
    )


def context_table(found: Found, workload: str, model: str, dtype: str) -> str:
    def shown(line: dict, point: dict) -> str:
        first = f"{point['ttft']['median'] * 1e3:.1f} / "
        return first + (f"{point['step']['median'] * 1e3:.2f}{share(found, line, point)}" if point["step"] else NONE)

    title = f"**One request against context length, {dtype}**\n\nTTFT ms / decode step ms{what_a_share_is(found)}.\n\n"
    return title + _points(found.of(workload, model, dtype), lambda batch, context: f"{context}", shown)


def _batch_table(found: Found, workload: str, model: str, dtype: str) -> str:
    def shown(line: dict, point: dict) -> str:
        if point["step"] is None:
            return f"{point['ttft']['median'] * 1e3:.1f} / {NONE}"
        step = point["step"]["median"]
        return f"{step * 1e3:.2f} / {point['batch'] / step:.1f}{share(found, line, point)}"

    title = f"**Decode step against batch size (requests x context), {dtype}**\n\n"
    title += f"decode step ms / tokens/s{what_a_share_is(found)}.\n\n"
    return title + _points(found.of(workload, model, dtype), lambda batch, context: f"{batch} x {context}", shown)


def _points(lines: dict[str, dict], name: Callable[[int, int], str], shown: Callable[[dict, dict], str]) -> str:
    points = unique(tuple(point) for line in lines.values() for point in line["params"]["points"])
    rows = []
    for system, line in lines.items():
        if line["status"] != "ok":
            rows.append([system, cell(line, str)] + [""] * (len(points) - 1))
            continue
        found = {(point["batch"], point["context"]): point for point in line["result"]["points"]}
        at = [found.get(point, {"error": NONE}) for point in points]
        rows.append([system, *(point["error"] if "error" in point else shown(line, point) for point in at)])
    return table(["system", *(name(*point) for point in points)], rows)


def share(found: Found, line: dict, point: dict) -> str:
    reached = found.share(line, point["step_bytes"] / point["step"]["median"])
    return "" if reached is None else f" ({reached:.2f})"


def what_a_share_is(found: Found) -> str:
    text = " (share of the limit: bytes of weights and KV that had to move / read bandwidth / time)"
    return text if found.limits else ""


def words(result: dict) -> str:
    steps = [point["step"] for point in result["points"] if point.get("step")]
    return "decode step " + ", ".join(f"{step['median'] * 1e3:.1f}" for step in steps) + " ms"


register(
    Workload(
        "context",
        run_latency,
        "time to first token and time a decode step against context length, beyond 4k",
        cases={"default": context_cases},
        tables=tables_of("context", context_table),
        words=words,
    )
)
register(
    Workload(
        "batch",
        run_latency,
        "time a decode step against batch size",
        cases={"default": batch_cases},
        tables=tables_of("batch", _batch_table),
        words=words,
    )
)
