"""Many short candidates over one history: a decode step with the history read once (cascade), and without."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from bench import measure
from bench.case import Bench
from bench.markdown import milliseconds, of_each, table
from bench.suites.strategies import shape_cases
from bench.systems import BLOCK_SIZE, Capacity, bytes_per_block, ours
from bench.workload import Claim, Workload, register


def run_fan_out(bench: Bench) -> dict:
    """All candidates decode together behind one history, which is computed once, ahead."""
    history_tokens, candidates = bench.params["history"], bench.params["candidates"]
    own_tokens, new_tokens = bench.params["candidate_tokens"], bench.params["new_tokens"]
    history = bench.prompts([history_tokens], seed=1)[0]
    prompts = [history + end for end in bench.prompts([own_tokens] * candidates, seed=2)]
    length = history_tokens + own_tokens + new_tokens
    history_blocks = history_tokens // BLOCK_SIZE
    own_blocks = candidates * (-(-length // BLOCK_SIZE) - history_blocks)
    room = history_blocks + 4 * own_blocks
    system = ours(bench.model, "prefix", Capacity([[length] * candidates]), num_blocks=room)
    system.strategy.preload(history)
    steps = {}
    for name, mode in {"cascade": nullcontext, "apart": without_cascade}.items():
        bench.say(name)
        with mode():
            system(prompts, 3)  # kernels compile, the graph is captured
            steps[name] = measure.spread(measure.steady_steps(system(prompts, new_tokens).times))
    return {
        **steps,
        "blocks_used": system.most_blocks(prompts, new_tokens),
        "blocks_needed": history_blocks + own_blocks,
        "blocks_apart": candidates * -(-length // BLOCK_SIZE),
        "bytes_per_block": bytes_per_block(system.strategy),
    }


@contextmanager
def without_cascade() -> Iterator[None]:
    """No start that rows share is long enough to be read once for all of them."""
    from kv_strategies.step import plan

    before, plan.MIN_TOKENS_SPARED = plan.MIN_TOKENS_SPARED, sys.maxsize
    try:
        yield
    finally:
        plan.MIN_TOKENS_SPARED = before


ON_GPU = {"history": 8192, "candidates": 128, "candidate_tokens": 8, "new_tokens": 16}
ON_CPU = {"history": 1024, "candidates": 16, "candidate_tokens": 8, "new_tokens": 6}


CLAIMS = [
    Claim(
        "step without cascade / with, {candidates} candidates of {candidate_tokens} behind {history}",
        "at least 8x faster",
        8,
        lambda result: result["apart"]["median"] / result["cascade"]["median"],
    ),
    Claim(
        "blocks in use / blocks of one history and of all candidates",
        "KV stored once",
        1,
        lambda result: result["blocks_used"] / result["blocks_needed"],
        "{:.2f}",
        at_most=True,
    ),
]


def _table(result: dict) -> str:
    gigabytes = result["bytes_per_block"] / 1e9
    rows = [
        ["history read once (cascade)", milliseconds(result["cascade"]), result["blocks_used"],
         f"{result['blocks_used'] * gigabytes:.2f}"],
        ["history read for every row", milliseconds(result["apart"]), result["blocks_used"],
         f"{result['blocks_used'] * gigabytes:.2f}"],
        ["every row with a history of its own", "not run", result["blocks_apart"],
         f"{result['blocks_apart'] * gigabytes:.2f}"],
    ]  # fmt: skip
    title = f"**Fan-out: {result['candidates']} candidates of {result['candidate_tokens']} tokens behind one history"
    return f"{title} of {result['history']}**\n\n" + table(["", "decode step, ms", "blocks", "KV, GB"], rows)


register(
    Workload(
        "fan-out",
        run_fan_out,
        "many short candidates over one history: a decode step with the history read once (cascade), and without",
        cases={"strategies": shape_cases("prefix", ON_GPU, ON_CPU)},
        tables=of_each("fan-out", _table),
        claims=CLAIMS,
    )
)
