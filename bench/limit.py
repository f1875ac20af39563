"""How near a strategy comes to the limits of the card: `python -m bench --suite limit`.

| workload    | question                                                                                              |
|-------------|-------------------------------------------------------------------------------------------------------|
| attention   | the decode kernel alone: which share of the read bandwidth does it reach? (GPU only)                  |
| decode      | a decode step with all rows decoding, of a strategy, of another one, of the native caches             |
| first token | how long is it held up: by kernels not yet compiled, by the prompt, by what is left of it on a hit    |
| batching    | generated tokens over total time of ragged batches, beside the native batching                        |
| profile     | which kernels a step of each strategy is made of, and how much of it the GPU works                    |

What must be reached, and what others reach, stands in `report_limit.py`. All that is compared within a workload ran in
one process on the same weights. What fails within a workload is a point that says why, not the end of the others.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from bench import measure, strategies
from bench.systems import DOOR, NATIVE_CACHES, Capacity, Ours, filled, open_system

if TYPE_CHECKING:
    from bench.cases import Bench

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
        ["int8", 32, 8192],
        *[["baseline", *point] for point in _GQA],
    ],
}
ATTENTION = {"shapes": ["mha-32x1024", "mha-64x2048", "mha-1x4096", "mha-1x16384"], "dim": 128, "repeats": 20}
FIRST_TOKEN = {"lengths": [4096, 16384], "points": [[4096, 64], [16184, 64]], "repeats": 3}


def attempt(work: Callable[[], dict]) -> dict:
    """What `work` found, or why it failed."""
    try:
        return work()
    except Exception as error:
        text = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {text[0] if text else ''}"[:200]}


# --- attention


def run_attention(bench: Bench) -> dict:
    from bench.probes.kernel_bandwidth import SHAPES, Problem

    def point(name: str) -> dict:
        problem = Problem(name, strategies.BLOCK_SIZE, bench.params["dim"], "none", bench.case.device)
        seconds = problem.time(problem.tuned, bench.params["repeats"])
        return {"batch": SHAPES[name][0], "context": SHAPES[name][1], "seconds": seconds, "bytes": problem.bytes}

    rows = []
    for name in bench.params["shapes"]:
        bench.say(name)
        rows.append({"shape": name} | attempt(lambda name=name: point(name)))
        bench.free()
    return {"points": rows}


# --- decode


def run_decode(bench: Bench) -> dict:
    """Points of (system, rows, context), `repeats` times round, so that a machine that slows down slows all of them."""
    found: dict[tuple, list[dict]] = {}
    for _ in range(bench.params.get("repeats", 1)):
        for system, batch, context in bench.params["points"]:
            bench.say(f"{system}: {batch} x {context}")
            run = attempt(lambda at=(system, batch, context): _decode(bench, *at))
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
    strategy = getattr(system, "strategy", None)
    bytes_per_token = strategy.stats()["bytes_per_token"] if strategy else measure.kv_bytes_per_token(bench.model)
    tokens = batch * (context + NUM_UNSTEADY + len(steady) // 2)  # in the middle of what is measured
    return {
        "steps": steady,
        "unsteady": sum(unsteady) - len(unsteady) * measure.spread(steady)["median"],
        "step_bytes": int(measure.weight_bytes(bench.model) + tokens * bytes_per_token),
    }


def _point(key: tuple, runs: list[dict]) -> dict:
    point = dict(zip(("system", "batch", "context"), key, strict=True))
    failed = [run for run in runs if "error" in run]
    if failed:
        return point | failed[0]
    steps = measure.spread([step for run in runs for step in run["steps"]])
    return point | {"step": steps, "unsteady": runs[0]["unsteady"], "step_bytes": runs[0]["step_bytes"]}


# --- first token


def run_first_token(bench: Bench) -> dict:
    """First without any compiled kernel; then prompts in one chunk, ours and native; then hits, as in `prefix`."""
    start = time.perf_counter()
    bench.model  # noqa: B018
    load = time.perf_counter() - start
    return {
        "cold": attempt(lambda: _cold(bench)) | {"load": load},
        "prefill": [attempt(lambda n=n: _prefill(bench, n)) | {"tokens": n} for n in bench.params["lengths"]],
        "hits": attempt(lambda: strategies.run_prefix(bench)),
    }


def _in_one_chunk(bench: Bench, tokens: int, new_tokens: int) -> Ours:
    from kv_strategies import build

    capacity = Capacity([[tokens + new_tokens]])
    strategy = build("paged", bench.model, num_blocks=capacity.blocks(strategies.BLOCK_SIZE))
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


# --- batching


def run_batching(bench: Bench) -> dict:
    """Each batch by each system, `rounds` times round. `slots` are the sequences in a step at most, `places` the tokens
    a pool holds, where these are not to be all; `chunk` the tokens in a forward of ours."""
    rows = []
    for batch in bench.params["batches"]:
        found: dict[str, list[dict]] = {}
        for _ in range(bench.params.get("rounds", 1)):
            for name in batch["systems"]:
                bench.say(f"{name}: {len(batch['lengths'])} requests")
                run = attempt(lambda name=name, batch=batch: _batch(bench, name, batch))
                found.setdefault(name, []).append(run)
                bench.free()
        for name, runs in found.items():
            row = {"system": name, "requests": len(batch["lengths"])} | runs[-1]
            if "rates" in row:
                row["tokens_per_second"] = measure.spread([rate for run in runs for rate in run.get("rates", [])])
            rows.append(row)
    return {"batches": rows}


def _batch(bench: Bench, name: str, batch: dict) -> dict:
    lengths, new_tokens, slots = batch["lengths"], batch["new_tokens"], batch.get("slots", len(batch["lengths"]))
    if "places" in batch:
        capacity = Capacity([[batch["places"] // slots] * slots])
    else:
        capacity = Capacity([[length + new_tokens for length in lengths]])
    options = {"max_batch_tokens": batch["chunk"]} if "chunk" in batch else {}
    system = open_system(name, bench.model, capacity, **options)
    if isinstance(system, Ours) and bench.case.device.startswith("cuda"):
        for longest in (max(lengths), min(lengths)):
            _capture(bench, system, slots, longest)
    system(bench.prompts(lengths[:slots], seed=1), 4)
    bench.free()
    bench.memory.start()
    rates, count = [], 0
    with captures() as captured:
        for repeat in range(batch["repeats"].get(name, 1)):
            run = system(bench.prompts(lengths, seed=2 + repeat), new_tokens)
            count = run.num_tokens
            rates.append(count / run.seconds)
    return {
        "tokens": count,
        "rates": rates,
        "captures": captured,
        "preemptions": system.runner.num_preemptions if isinstance(system, Ours) else None,
        "peak": bench.memory.read(),
    }


def _capture(bench: Bench, system: Ours, slots: int, longest: int) -> None:
    """Steps of all batch sizes from `slots` down to 1, beside a row of this length: their graphs are captured."""
    prompts = bench.prompts([longest, *[4] * (slots - 1)], seed=0)
    system(prompts, [slots + 4, *range(4, slots + 3)])


@contextmanager
def captures() -> Iterator[dict]:
    """How many CUDA graphs are captured meanwhile, and the seconds that takes."""
    found = {"count": 0, "seconds": 0.0}
    enter, leave = torch.cuda.graph.__enter__, torch.cuda.graph.__exit__

    def counted(self):
        found["count"] += 1
        found["seconds"] -= time.perf_counter()
        return enter(self)

    def timed(self, *error):
        try:
            return leave(self, *error)
        finally:
            found["seconds"] += time.perf_counter()

    torch.cuda.graph.__enter__, torch.cuda.graph.__exit__ = counted, timed
    try:
        yield found
    finally:
        torch.cuda.graph.__enter__, torch.cuda.graph.__exit__ = enter, leave


# --- profile


def run_profile(bench: Bench) -> dict:
    """Entries of {name, strategy, options, rows, context}, each over a pool of its own; see `PROFILED`."""
    rows = []
    for entry in bench.params["entries"]:
        bench.say(entry["name"])
        rows.append({"name": entry["name"]} | attempt(lambda entry=entry: _profiled(bench, entry)))
        bench.free()
    return {"entries": rows}


#: name -> strategy, its options, rows, tokens each; "shared" of them begin alike, "new" are left of a prompt.
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
    {"name": "prefill of 64 tokens behind 4096 found", "strategy": "prefix", "rows": 1, "shared": 4096, "prefill": 64},
]


def _profiled(bench: Bench, entry: dict) -> dict:
    """Some decode steps in a row, or one prefill, as the profiler saw them."""
    from kv_strategies import Request

    rows, shared, num_steps = entry["rows"], entry.get("shared", 0), bench.params["steps"]
    own = entry.get("prefill") or (entry["new"] if shared else entry.get("context", bench.params["context"]))
    new_tokens = 1 if "prefill" in entry else num_steps + 8
    new_tokens += 2 * (rows * own // strategies.CHUNK)  # rows wait for the prefill of others
    capacity = Capacity([[shared + own + new_tokens] * rows])
    system = (
        strategies.ours(bench, entry["strategy"], capacity, **entry.get("options", {}))
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

    submit()
    if "prefill" in entry:  # what is profiled is the fourth: kernels are compiled, and what is captured is
        for _ in range(3):
            while runner.num_running or runner.num_waiting:
                runner.step()
            submit()
        return _profile(bench, lambda: [runner.step() for _ in range(2)], steps=1)
    seen = dict.fromkeys(range(rows), 0)
    while min(seen.values()) < 4:  # all decode, and their graph is there
        for event in runner.step():
            seen[event.request_id] += 1
    found = _profile(bench, lambda: [runner.step() for _ in range(num_steps)], steps=num_steps)
    for row in range(rows):
        runner.cancel(row)
    return found


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
