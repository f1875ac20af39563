"""Requests at once, and tokens a second, in a memory that is too small for all of them."""

from __future__ import annotations

import statistics

from bench.case import Bench, ragged
from bench.markdown import of_each, table
from bench.suites.evict import GQA, MHA, evict_cases
from bench.systems import BLOCK_SIZE, Capacity, ours
from bench.workload import Claim, Workload, register


def run_crowd(bench: Bench) -> dict:
    """The same requests through the same number of blocks."""
    lengths, new_tokens = bench.params["lengths"], bench.params["new_tokens"]
    found = {}
    for name in ("paged", "evict"):
        bench.say(f"{name}: {len(lengths)} requests")
        options = {"score": bench.params["score"], "keep": bench.params["keep"]} if name == "evict" else {}
        capacity = Capacity([[length + new_tokens for length in lengths]])
        num_blocks = bench.params["places"] // BLOCK_SIZE
        system = ours(bench.model, name, capacity, num_blocks=num_blocks, **options)
        system(bench.prompts(lengths, seed=1), min(8, new_tokens))  # kernels compile
        running: list[int] = []
        before = system.runner.num_preemptions
        for _ in system.stream(bench.prompts(lengths, seed=2), new_tokens):  # graphs are captured
            running.append(system.runner.num_running)
        preemptions = system.runner.num_preemptions - before
        run = system(bench.prompts(lengths, seed=3), new_tokens)
        found[name] = {
            "running": statistics.mean(running),
            "most": max(running),
            "preemptions": preemptions,
            "tokens_per_second": run.num_tokens / run.seconds,
        }
        del system
        bench.free()
    return found


# As many tokens as a card of 80 GB holds beside the weights, or less: what matters is that they are too few.
SIZES = {"lengths": ragged(128, 1024, 8192), "new_tokens": 256, "keep": 0.25, "score": "snapkv"}
ON_GPU = {MHA: SIZES | {"places": 96 * 1024}, GQA: SIZES | {"places": 96 * 1024}}
ON_CPU = {"lengths": ragged(12, 64, 512), "new_tokens": 32, "keep": 0.25, "score": "snapkv", "places": 1024}


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
    title = (
        f"**{len(lengths)} requests of {min(lengths)} to {max(lengths)} tokens and {result['new_tokens']} new in a "
        f"pool of {result['places']} tokens, {result['score']} keeps {result['keep']}**\n\n"
    )
    return title + table(["", "requests at once, mean", "at most", "preemptions", "tokens/s"], rows)


register(
    Workload(
        "evict crowd",
        run_crowd,
        "requests at once, and tokens a second, in a memory that is too small for all of them",
        cases={"evict": evict_cases(ON_GPU, ON_CPU)},
        tables=of_each("evict crowd", _table),
        claims=[
            Claim("requests at once, keep {keep} / paged", "at least 3.3x", 3.3, _more("running"), "{:.2f}x"),
            Claim("tokens a second / paged, which preempts", "at least 2x", 2.0, _more("tokens_per_second"), "{:.2f}x"),
        ],
    )
)
