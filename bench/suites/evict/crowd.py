"""Requests at once, and tokens a second, in a memory that is too small for all of them.

With long answers the pool is what holds requests up, and rows are compacted as they grow. With short ones prompts are,
whose forwards evict does not spare: a row has often ended before there are as many as the pool has room for.
"""

from __future__ import annotations

import statistics
import time

from bench.case import Bench, ragged
from bench.markdown import of_each, table
from bench.suites.evict import GQA, MHA, evict_cases
from bench.systems import BLOCK_SIZE, Capacity, ours
from bench.workload import Claim, Workload, register

#: New tokens after which all batch sizes have occurred, so that no graph is captured later.
WARM_TOKENS = 256


def run_crowd(bench: Bench) -> dict:
    """The same requests through the same number of blocks. How many run is noted with every token that comes."""
    lengths, new_tokens = bench.params["lengths"], bench.params["new_tokens"]
    evict = {option: bench.params[option] for option in ("score", "keep", "every") if option in bench.params}
    found = {}
    for name, options in (("paged", {}), ("evict", evict)):
        bench.say(f"{name}: {len(lengths)} requests")
        capacity = Capacity([[length + new_tokens for length in lengths]])
        num_blocks = bench.params["places"] // BLOCK_SIZE
        system = ours(bench.model, name, capacity, num_blocks=num_blocks, **options)
        system(bench.prompts(lengths, seed=1), min(8, new_tokens))  # kernels compile
        system(bench.prompts(lengths, seed=2), min(WARM_TOKENS, new_tokens))  # graphs are captured
        running: list[int] = []
        prompts, before, start = bench.prompts(lengths, seed=3), system.runner.num_preemptions, time.perf_counter()
        for _ in system.stream(prompts, new_tokens):
            running.append(system.runner.num_running)
        seconds = time.perf_counter() - start
        found[name] = {
            "running": statistics.mean(running),
            "most": max(running),
            "preemptions": system.runner.num_preemptions - before,
            "tokens_per_second": len(running) / seconds,
        }
        del system
        bench.free()
    return found


# As many tokens as a card of 80 GB holds beside the weights, or less: what matters is that they are too few.
SIZES = {"lengths": ragged(128, 1024, 8192), "new_tokens": 256, "keep": 0.25, "score": "snapkv", "places": 96 * 1024}
ON_CPU = {"lengths": ragged(12, 64, 512), "new_tokens": 32, "keep": 0.25, "score": "snapkv", "places": 1024}
LONG, LONG_ON_CPU = SIZES | {"new_tokens": 1024, "every": 256}, ON_CPU | {"new_tokens": 64, "every": 16}


def _more(key: str):
    return lambda result: result["evict"][key] / result["paged"][key]


def _table(result: dict) -> str:
    rows = [
        [name, f"{found['running']:.1f}", str(found["most"]), str(found["preemptions"]),
         f"{found['tokens_per_second']:.1f}"]
        for name in ("paged", "evict")
        for found in [result[name]]
    ]  # fmt: skip
    lengths = result["lengths"]
    again = f", again every {result['every']}" if "every" in result else ""
    title = (
        f"**{len(lengths)} requests of {min(lengths)} to {max(lengths)} tokens and {result['new_tokens']} new in a "
        f"pool of {result['places']} tokens, {result['score']} keeps {result['keep']}{again}**\n\n"
    )
    return title + table(["", "requests at once, mean", "at most", "preemptions", "tokens/s"], rows)


for name, sizes, on_cpu in (("evict crowd", SIZES, ON_CPU), ("evict crowd, long answers", LONG, LONG_ON_CPU)):
    register(
        Workload(
            name,
            run_crowd,
            "requests at once, and tokens a second, in a memory that is too small for all of them",
            cases={"evict": evict_cases({MHA: sizes, GQA: sizes}, on_cpu)},
            tables=of_each(name, _table),
            claims=[
                Claim("requests at once, keep {keep}, {new_tokens} new / paged", "at least 3.3x", 3.3,
                      _more("running"), "{:.2f}x"),
                Claim("tokens a second / paged, which preempts, {new_tokens} new", "at least 2x", 2.0,
                      _more("tokens_per_second"), "{:.2f}x"),
            ],
        )
    )  # fmt: skip
