"""A decode step with all rows decoding, of a strategy, of another one, of the native caches."""

from __future__ import annotations

from collections.abc import Iterable

from bench import measure
from bench.case import Bench, Case
from bench.suites.limit import SHAPE, table
from bench.systems import DOOR, NATIVE_CACHES, Capacity, Ours, bytes_read, filled, open_system
from bench.workload import Target, Workload, register

NUM_UNSTEADY = 3  # steps of a run in which kernels compile and graphs are captured

# model -> points (system, rows, context) of a decode step; native ones come last, when the others' pools are gone
_MHA = [[1, 512], [1, 4096], [1, 16384], [32, 1024], [16, 2048]]
_GQA = [[1, 4096], [1, 32768], [32, 2048], [32, 8192]]
POINTS = {
    "llama-2-7b-random": [
        *[["paged", *point] for point in _MHA],
        *[["contiguous", 1, 4096], ["contiguous", 32, 1024], ["paged" + DOOR, 1, 4096]],
        *[["baseline", *point] for point in _MHA],
    ],
    "llama-3.1-8b-random": [
        *[["paged", *point] for point in _GQA],
        *[["int8", 32, 8192], ["int4", 32, 8192]],
        *[["baseline", *point] for point in _GQA],
    ],
}


def run_decode(bench: Bench) -> dict:
    """Points of (system, rows, context), `repeats` times round, so that a machine that slows down slows all of them."""
    found: dict[tuple, list[dict]] = {}
    for _ in range(bench.params.get("repeats", 1)):
        for system, batch, context in bench.params["points"]:
            bench.say(f"{system}: {batch} x {context}")
            run = measure.attempt(lambda at=(system, batch, context): _decode(bench, *at))
            found.setdefault((system, batch, context), []).append(run)
            bench.free()
    return {"points": [_point(key, runs) for key, runs in found.items()]}


def _decode(bench: Bench, name: str, batch: int, context: int) -> dict:
    """One run. A runner's rows have contexts that nobody computed (`filled`): the step reads as much."""
    new_tokens = bench.params["native_tokens" if name in NATIVE_CACHES else "new_tokens"]
    system = open_system(name, bench.model, Capacity([[context + new_tokens] * batch]))
    prompts = bench.prompts([context] * batch, seed=batch)
    if isinstance(system, Ours):
        with filled(system.strategy):
            run = system(prompts, new_tokens)
    else:
        if bench.params.get("warm_up"):  # the whole run compiles what it needs, and no shorter one does
            system(prompts, new_tokens)
        run = system(prompts, new_tokens)
    steps = measure.steady_steps(run.times)
    unsteady, steady = steps[:NUM_UNSTEADY], steps[NUM_UNSTEADY:]
    new = NUM_UNSTEADY + len(steady) // 2  # in the middle of what is measured
    return {
        "steps": steady,
        "unsteady": sum(unsteady) - len(unsteady) * measure.spread(steady)["median"],
        "step_bytes": int(measure.weight_bytes(bench.model) + batch * bytes_read(system, bench.model, context, new)),
    }


def _point(key: tuple, runs: list[dict]) -> dict:
    point = dict(zip(("system", "batch", "context"), key, strict=True))
    failed = [run for run in runs if "error" in run]
    if failed:
        return point | failed[0]
    steps = measure.spread([step for run in runs for step in run["steps"]])
    return point | {"step": steps, "unsteady": runs[0]["unsteady"], "step_bytes": runs[0]["step_bytes"]}


def cases(to: Target) -> Iterable[Case]:
    if not to.on_gpu:  # ours and the native cache in turns
        points = [[system, 1, context] for context in (128, 1024) for system in ("baseline", "paged")]
        for dtype in ("float32", "bfloat16"):
            params = {"points": points, "new_tokens": 24, "native_tokens": 24, "repeats": 2}
            yield to.case("paged", dtype, params)
        points = [[system, 1, 4200] for system in ("paged", "int8", "offload")]
        yield to.case("int8", "float32", {"points": points, "new_tokens": 24, "repeats": 2}, timeout=300)
        return
    steps = {"new_tokens": 48, "native_tokens": 12}
    by_model = {to.model: POINTS.get(to.model, POINTS[SHAPE])} if to.model else POINTS
    for model, points in by_model.items():
        yield to.case("paged", "bfloat16", {"points": points} | steps, timeout=300, model=model)
    compiled = {"points": [["static", 1, 4096]], "warm_up": True, "new_tokens": 48, "native_tokens": 24}
    yield to.case("static", "bfloat16", compiled, timeout=300, model=to.model or SHAPE)


def _words(result: dict) -> str:
    return ", ".join(f"{p['system']} {p['batch']} x {p['context']} {table.step_ms(p)}" for p in result["points"])


register(
    Workload(
        "decode",
        run_decode,
        "a decode step with all rows decoding, of a strategy, of another one, of the native caches",
        cases={"limit": cases},
        tables=table.tables,
        words=_words,
    )
)
