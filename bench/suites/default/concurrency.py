"""The same requests, more and more of them at a time: tokens a second, and what a user waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from bench import measure
from bench.case import Bench, Case, is_random, ragged
from bench.lines import Found
from bench.markdown import of_points, points_in_words, table
from bench.serving import percentiles
from bench.suites.default import speed_models
from bench.systems import Capacity, open_system
from bench.workload import Target, Workload, register


def run_concurrency(bench: Bench) -> dict:
    """All requests are there from the start; `at_once` of them run, the others wait."""
    rows = []
    for at_once in bench.params["at_once"]:
        bench.say(f"{at_once} at once")
        rows.append({"requests": at_once} | measure.attempt(lambda at_once=at_once: _point(bench, at_once)))
        bench.free()
    return {"points": rows}


def _point(bench: Bench, at_once: int) -> dict:
    lengths, new_tokens = bench.params["lengths"], bench.params["new_tokens"]
    longest = sorted(lengths, reverse=True)[:at_once]
    system = open_system(bench.case.system, bench.model, Capacity([[length + new_tokens for length in longest]]))
    system(bench.prompts(lengths, seed=1), new_tokens)  # steps of every shape that comes, compiled and captured
    bench.free()
    bench.memory.start()
    run = system(bench.prompts(lengths, seed=2), new_tokens)
    return {
        "tokens_per_second": run.num_tokens / run.seconds,
        "ttft": percentiles([row[0] for row in run.times]),
        "itl": percentiles([after - before for row in run.times for before, after in pairwise(row)]),
        "peak": bench.memory.read(),
    }


def cases(to: Target) -> Iterable[Case]:
    if not to.on_gpu:
        params = {"lengths": ragged(16, 16, 128), "new_tokens": 12, "at_once": [1, 2, 4, 8, 16]}
        yield to.case("paged", "float32", params)
    for model in filter(is_random, speed_models(to)):
        params = {"lengths": ragged(128, 100, 1024), "new_tokens": 64, "at_once": [1, 4, 8, 16, 32, 64, 128]}
        yield to.case("paged", "bfloat16", params, timeout=500, model=model)


COLUMNS: dict[str, Callable[[dict], str]] = {
    "requests at once": lambda point: str(point["requests"]),
    "tokens/s": lambda point: f"{point['tokens_per_second']:.1f}",
    "TTFT p50, ms": lambda point: f"{point['ttft']['p50'] * 1e3:.0f}",
    "ITL p50, ms": lambda point: f"{point['itl']['p50'] * 1e3:.1f}",
    "ITL p99, ms": lambda point: f"{point['itl']['p99'] * 1e3:.1f}",
    "peak memory, GB": lambda point: f"{point['peak'] / 1e9:.2f}",
}


def rows(points: Iterable[dict]) -> list[list[str]]:
    return of_points(points, COLUMNS)


def tables(found: Found, model: str) -> str:
    parts = []
    for line in found.of("concurrency", model).values():
        if line["status"] == "ok":
            lengths, new_tokens = line["params"]["lengths"], line["params"]["new_tokens"]
            title = (
                f"**{len(lengths)} requests of {min(lengths)} to {max(lengths)} tokens, {new_tokens} new each, so many "
                f"at a time: {line['system']}, {line['dtype']}**"
            )
            parts.append(f"{title}\n\n" + table(COLUMNS, rows(line["result"]["points"])))
    return "\n\n".join(parts)


def _words(result: dict) -> str:
    return points_in_words(
        result["points"],
        lambda point: str(point["requests"]),
        lambda point: f"{point['tokens_per_second']:.1f} tokens/s",
    )


register(
    Workload(
        "concurrency",
        run_concurrency,
        "the same requests, more and more of them at a time: tokens a second against what a user waits for",
        cases={"default": cases},
        tables=tables,
        words=_words,
    )
)
