"""Requests that arrive by themselves, whoever is busy: one driver for this project's runner and the native batching.

A request waits from the moment at which it was due, not from when a busy system took notice of it: an open loop hides
nobody's queue.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from bench.case import Bench
from bench.systems import Capacity, NativeBatch, Ours, open_system


class Arrival(NamedTuple):
    at: float  # seconds since the start
    prompt: list[int]
    new_tokens: int


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """The moments of `count` arrivals at `rate` a second, in seconds; all at once where the rate is infinite."""
    rng, moments, now = random.Random(seed), [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate) if math.isfinite(rate) else 0.0
        moments.append(now)
    return moments


def lognormal(count: int, mu: float, sigma: float, least: int, most: int, seed: int) -> list[int]:
    """Whole numbers whose logarithms are normal, cut off at both ends."""
    rng = random.Random(seed)
    return [min(most, max(least, round(rng.lognormvariate(mu, sigma)))) for _ in range(count)]


def arrivals_of(bench: Bench, rate: float, seed: int) -> list[Arrival]:
    """The `requests` of a case at so many a second: prompts and answers of its lengths, another text a seed."""
    count, params = bench.params["requests"], bench.params
    prompts = bench.prompts(lognormal(count, *params["prompts"], seed=1), seed=seed)
    answers = lognormal(count, *params["answers"], seed=2)
    return [Arrival(*one) for one in zip(poisson(count, rate, seed=3), prompts, answers, strict=True)]


def open_for(bench: Bench, arrivals: Sequence[Arrival]) -> Ours | NativeBatch:
    """The case's system with room for the longest `slots` of these requests. Ours takes prompts in chunks of `chunk`,
    and `options` of `Runner`: what follows a comma in the case's name says them in words.
    """
    lengths = sorted((len(arrival.prompt) + arrival.new_tokens for arrival in arrivals), reverse=True)
    name = bench.case.system.split(",")[0]
    own = {} if name == "generate_batch" else {"max_batch_tokens": bench.params["chunk"]} | bench.params["options"]
    return open_system(name, bench.model, Capacity([lengths[: bench.params["slots"]]]), **own)


def serve(system: Ours | NativeBatch, arrivals: Sequence[Arrival]) -> list[list[float]]:
    """For each request the moments at which its tokens came, in seconds since the start."""
    return _serve_ours(system, arrivals) if isinstance(system, Ours) else _serve_native(system, arrivals)


def _serve_ours(system: Ours, arrivals: Sequence[Arrival]) -> list[list[float]]:
    from kv_strategies import Request

    runner, moments, due = system.runner, [[] for _ in arrivals], 0
    start = time.perf_counter()
    while due < len(arrivals) or runner.num_running or runner.num_waiting:
        now = time.perf_counter() - start
        while due < len(arrivals) and arrivals[due].at <= now:
            _, prompt, new_tokens = arrivals[due]
            runner.submit([Request(prompt, max_new_tokens=new_tokens, request_id=due)])
            due += 1
        if not (runner.num_running or runner.num_waiting):
            time.sleep(max(0.0, arrivals[due].at - now))
            continue
        events = runner.step()
        now = time.perf_counter() - start
        for event in events:
            moments[event.request_id].append(now)
    return moments


def _serve_native(system: NativeBatch, arrivals: Sequence[Arrival]) -> list[list[float]]:
    with system.manager() as manager:
        start = time.perf_counter()
        for index, (at, prompt, new_tokens) in enumerate(arrivals):
            time.sleep(max(0.0, at - (time.perf_counter() - start)))
            manager.add_request(prompt, str(index), max_new_tokens=new_tokens, record_timestamps=True)
        moments: list[list[float]] = [[] for _ in arrivals]
        for _ in arrivals:
            result = manager.get_result()
            if result is None or result.error:
                raise RuntimeError(f"generate_batch failed: {result and result.error}")
            moments[int(result.request_id)] = [moment - start for moment in result.timestamps]
    return moments


def waits(arrivals: Sequence[Arrival], moments: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """TTFT and ITL in seconds at the percentiles that users speak of, over all requests and all their tokens."""
    first = [row[0] - arrival.at for arrival, row in zip(arrivals, moments, strict=True)]
    between = [after - before for row in moments for before, after in pairwise(row)]
    return {"ttft": percentiles(first), "itl": percentiles(between)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The smallest value that so many percent do not exceed."""
    ranked = sorted(values)
    return {f"p{p}": ranked[max(0, math.ceil(len(ranked) * p / 100) - 1)] for p in (50, 90, 99)}
