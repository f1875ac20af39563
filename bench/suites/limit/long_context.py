"""One prompt of up to 128k tokens: the first token, and a decode step behind it."""

from __future__ import annotations

from collections.abc import Iterable

from bench.case import Case
from bench.suites.default.latency import context_table, run_latency, tables_of, words
from bench.suites.limit.table import GQA
from bench.workload import Target, Workload, register

MOST = 131072  # tokens that the shape knows; of these some are new ones


def cases(to: Target) -> Iterable[Case]:
    if to.on_gpu and to.model in (None, GQA):
        contexts = [1024, 8192, 32768, MOST - 256]
        params = {"points": [[1, n] for n in contexts], "new_tokens": 48, "repeats": 2, "warm_points": True}
        systems = ["baseline", "paged", "window", "int8", "int4"]
        yield from to.each(systems, "bfloat16", params, timeout=500, model=GQA)


register(
    Workload(
        "long context",
        run_latency,
        "time to first token and time a decode step of one prompt of 1k to 128k tokens",
        cases={"limit": cases},
        tables=tables_of("long context", context_table),
        words=words,
    )
)
