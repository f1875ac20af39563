"""Endless generation: KV bytes and steps at the start and at the end of a row that is compacted as it grows."""

from __future__ import annotations

import time
from itertools import pairwise

from bench import measure
from bench.case import Bench
from bench.markdown import milliseconds, of_each, table
from bench.suites.evict import MHA, evict_cases
from bench.systems import BLOCK_SIZE, Capacity, bytes_per_block, ours
from bench.workload import Claim, Workload, register

NUM_UNSTEADY = 64  # steps in which kernels compile and graphs are captured


def run_endless(bench: Bench) -> dict:
    """One row behind a prompt that is as long as what is kept. Whole rounds, from one compaction to the next."""
    cap, every, tokens, rounds = (bench.params[name] for name in ("cap", "every", "tokens", "rounds"))
    model = bench.model
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, cap + tokens)  # time, not sense
    num_blocks = -(-(cap + every) // BLOCK_SIZE) + 2
    options = {"score": bench.params["score"], "keep": cap, "every": every}
    system = ours(model, "evict", Capacity([[1]]), num_blocks=num_blocks, **options)
    moments, kv_bytes, block = [], [], bytes_per_block(system.strategy)
    for _ in system.stream(bench.prompts([cap], seed=0), tokens):
        moments.append(time.perf_counter())
        if len(moments) % 16 == 0:
            kv_bytes.append(system.strategy.stats()["blocks_used"] * block)
        if len(moments) % 8192 == 0:
            bench.say(f"{len(moments):,} of {tokens:,} tokens")
    steps = [b - a for a, b in pairwise(moments)]

    def around(begin: int) -> dict:
        end = begin + rounds * every
        return {
            "step": measure.spread(steps[begin:end]),
            "mean_step": sum(steps[begin:end]) / (end - begin),
            "kv_bytes": max(kv_bytes[begin // 16 : end // 16]),
        }

    first = -(-NUM_UNSTEADY // every) * every
    return {"early": around(first), "late": around(len(steps) - rounds * every), "seconds": sum(steps)}


ON_GPU = {"cap": 2048, "every": 256, "tokens": 100_000, "rounds": 8, "score": "tova"}
ON_CPU = {"cap": 128, "every": 32, "tokens": 800, "rounds": 4, "score": "tova"}


def _growth(of):
    return lambda result: of(result["late"]) / of(result["early"])


def _table(result: dict) -> str:
    rows = [
        [name, milliseconds(part["step"]), f"{part['mean_step'] * 1e3:.2f}", f"{part['kv_bytes'] / 1e6:.1f}"]
        for name, part in (("at the start", result["early"]), (f"after {result['tokens']} tokens", result["late"]))
    ]
    title = f"**A row compacted to {result['cap']} tokens every {result['every']}, {result['score']}**\n\n"
    return title + table(["", "step, ms", "mean with compactions, ms", "KV blocks in use, MB"], rows)


register(
    Workload(
        "evict endless",
        run_endless,
        "KV bytes and steps at the start and at the end of a row that is compacted as it grows",
        cases={"evict": evict_cases({MHA: ON_GPU}, ON_CPU, timeout=1200)},
        tables=of_each("evict endless", _table),
        claims=[
            Claim("step after {tokens} tokens / at the start", "within 3 %", 1.03,
                  _growth(lambda part: part["mean_step"]), "{:.3f}", at_most=True),
            Claim("KV bytes, likewise", "within 3 %", 1.03,
                  _growth(lambda part: part["kv_bytes"]), "{:.3f}", at_most=True),
        ],
    )
)  # fmt: skip
