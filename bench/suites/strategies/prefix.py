"""Time to first token where the start of a prompt is known, where it is not, and of the native cache."""

from __future__ import annotations

from bench import measure
from bench.case import Bench
from bench.markdown import milliseconds, of_each, table
from bench.suites.strategies import shape_cases
from bench.systems import BLOCK_SIZE, Capacity, Native, ours
from bench.workload import Claim, Workload, register


def run_prefix(bench: Bench) -> dict:
    """A prompt nobody has sent; the same start again behind which all is new, `repeats` times; native `generate()`."""
    repeats, points = bench.params["repeats"], bench.params["points"]
    capacity = Capacity([[max(map(sum, points)) + 1]])
    count = repeats + 2  # two that are not counted
    room = (count + 1) * capacity.blocks(BLOCK_SIZE)  # for every cold prompt: nothing is evicted
    system = ours(bench.model, "prefix", capacity, num_blocks=room)
    if bench.case.device.startswith("cuda"):  # no request decodes here, behind which a short prefill would be captured
        system.runner.warm_up(capacity.max_tokens)
    native, rows = Native(bench.model, None), []
    for shared, new in points:
        bench.say(f"{shared} shared + {new} new tokens")
        system.strategy.reset()
        colds = bench.prompts([shared + new] * count, seed=shared)
        cold = [system([prompt], 1) for prompt in colds][2:]
        ends = bench.prompts([new] * count, seed=shared + 1)
        hit = [system([colds[-1][:shared] + end], 1) for end in ends][2:]
        plain = [native([prompt], 1) for prompt in colds[1:]][1:]
        row = {"shared": shared, "new": new, "hit_rate": hit[-1].cached_tokens[0] / (shared + new)}
        for name, runs in {"cold": cold, "hit": hit, "native": plain}.items():
            row[name] = measure.spread([run.times[0][0] for run in runs])
        rows.append(row)
        bench.free()
    return {"points": rows}


ON_GPU = {"points": [[4096, 64], [16184, 64]], "repeats": 3}
ON_CPU = {"points": [[512, 32]], "repeats": 2}


def _times_lower(point: dict) -> float:
    return point["cold"]["median"] / point["hit"]["median"]


TTFT = "TTFT, {shared} shared + {new} new: cold / hit"
CLAIMS = [
    Claim(TTFT, "at least 10x lower than without a hit", 10, _times_lower, only=lambda point: point["shared"] < 8192),
    Claim(TTFT, "at least 25x lower", 25, _times_lower, only=lambda point: point["shared"] >= 8192),
]


def _table(result: dict) -> str:
    rows = [
        [
            f"{point['shared']} + {point['new']}",
            *(milliseconds(point[name], 1) for name in ("cold", "hit", "native")),
            f"{point['native']['median'] / point['hit']['median']:.1f}x",
            f"{point['hit_rate']:.1%}",
        ]
        for point in result["points"]
    ]
    head = ["shared + new tokens", "cold, ms", "hit, ms", "native `generate()`, ms", "native / hit", "hit rate"]
    return "**Prefix: time to first token**\n\nMedian (smallest to largest).\n\n" + table(head, rows)


register(
    Workload(
        "prefix",
        run_prefix,
        "time to first token where the start of a prompt is known, where it is not, and of the native cache",
        cases={"strategies": shape_cases("prefix", ON_GPU, ON_CPU)},
        tables=of_each("prefix", _table),
        claims=CLAIMS,
    )
)
