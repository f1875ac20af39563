"""Generated tokens over total time of ragged batches, beside the native batching."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from bench import measure
from bench.case import Bench, Case, ragged
from bench.markdown import points_in_words
from bench.suites.limit import SHAPE, table
from bench.systems import Capacity, Ours, open_system
from bench.workload import Target, Workload, register


def run_batching(bench: Bench) -> dict:
    """Each batch by each system, `rounds` times round. `slots` are the sequences in a step at most, `places` the tokens
    a pool holds, where these are not to be all; `chunk` the tokens in a forward of ours."""
    rows = []
    for batch in bench.params["batches"]:
        found: dict[str, list[dict]] = {}
        for _ in range(bench.params.get("rounds", 1)):
            for name in batch["systems"]:
                bench.say(f"{name}: {len(batch['lengths'])} requests")
                run = measure.attempt(lambda name=name, batch=batch: _batch(bench, name, batch))
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


def cases(to: Target) -> Iterable[Case]:
    if not to.on_gpu:
        batch = {"systems": ["baseline", "paged"], "lengths": ragged(8, 16, 320), "new_tokens": 64, "repeats": {}}
        for dtype in ("float32", "bfloat16"):
            yield to.case("paged", dtype, {"batches": [batch], "rounds": 2}, timeout=600)
        return
    few = {
        "systems": ["paged", "generate_batch"],
        "lengths": ragged(64, 100, 1024),
        "new_tokens": 256,
        "repeats": {"paged": 5},
        "chunk": 8192,  # nobody waits for a next token while prompts are computed
    }
    many = {
        "systems": ["paged"],
        "lengths": ragged(256, 100, 1024),
        "new_tokens": ragged(256, 100, 1024)[::-1],
        "repeats": {},
        "chunk": 8192,
        "slots": 128,
        "places": 120 * 1024,  # 64 GB: beside the weights, what a card of 80 GB holds
    }
    yield to.case("paged", "bfloat16", {"batches": [few, many]}, timeout=300, model=to.model or SHAPE)


def _words(result: dict) -> str:
    return points_in_words(
        result["batches"],
        lambda point: f"{point['system']} {point['requests']}",
        lambda point: f"{point['tokens_per_second']['median']:.1f} tokens/s",
    )


register(
    Workload(
        "batching",
        run_batching,
        "generated tokens over total time of ragged batches, beside the native batching",
        cases={"limit": cases},
        tables=table.tables,
        words=_words,
    )
)
