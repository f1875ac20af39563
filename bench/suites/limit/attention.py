"""The decode kernel alone: which share of the read bandwidth does it reach?"""

from __future__ import annotations

from collections.abc import Iterable

from bench import measure
from bench.case import Bench, Case
from bench.suites.limit import SHAPE, table
from bench.systems import BLOCK_SIZE
from bench.workload import Target, Workload, register

ATTENTION = {"shapes": ["mha-32x1024", "mha-64x2048", "mha-1x4096", "mha-1x16384"], "dim": 128, "repeats": 20}


def run_attention(bench: Bench) -> dict:
    from bench.probes.kernel_bandwidth import SHAPES, Problem

    def point(name: str) -> dict:
        problem = Problem(name, BLOCK_SIZE, bench.params["dim"], "none", bench.case.device)
        seconds = problem.time(problem.tuned, bench.params["repeats"])
        return {"batch": SHAPES[name][0], "context": SHAPES[name][1], "seconds": seconds, "bytes": problem.bytes}

    rows = []
    for name in bench.params["shapes"]:
        bench.say(name)
        rows.append({"shape": name} | measure.attempt(lambda name=name: point(name)))
        bench.free()
    return {"points": rows}


def cases(to: Target) -> Iterable[Case]:
    if to.on_gpu:
        yield to.case("paged", "bfloat16", ATTENTION, timeout=300, model=to.model or SHAPE)


def _words(result: dict) -> str:
    return ", ".join(
        f"{point['shape']} "
        + (f"{point['bytes'] / point['seconds'] / 1e9:.0f} GB/s" if "seconds" in point else point["error"])
        for point in result["points"]
    )


register(
    Workload(
        "attention",
        run_attention,
        "the decode kernel alone: which share of the read bandwidth does it reach? (GPU only)",
        cases={"limit": cases},
        tables=table.tables,
        words=_words,
    )
)
