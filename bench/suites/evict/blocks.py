"""Blocks that prompts leave in use, and the least memory they run in."""

from __future__ import annotations

from bench.case import Bench
from bench.markdown import of_each, table
from bench.suites.evict import GQA, MHA, evict_cases
from bench.systems import BLOCK_SIZE, CHUNK, Capacity, bytes_per_block, ours
from bench.workload import Claim, Workload, register


def run_blocks(bench: Bench) -> dict:
    """All prompts decode at once: with evict in a pool that holds the kept part of each and one whole prompt; paged a
    prompt alone, times as many, since few cards hold all.
    """
    rows, context, keep, new_tokens = (bench.params[name] for name in ("rows", "context", "keep", "new_tokens"))
    whole, kept = (-(-(int(context * share) + new_tokens) // BLOCK_SIZE) + 2 for share in (1, keep))
    found = {}
    for name, num_rows, num_blocks in (("paged", 1, whole), ("evict", rows, rows * kept + whole + CHUNK // BLOCK_SIZE)):
        bench.say(f"{name}: {num_rows} x {context}")
        before = bench.allocated()
        options = {"score": bench.params["score"], "keep": keep} if name == "evict" else {}
        capacity = Capacity([[context + new_tokens] * num_rows])
        system = ours(bench.model, name, capacity, num_blocks=num_blocks, **options)
        decoding, most = None, 0
        for _ in system.stream(bench.prompts([context] * num_rows, seed=1), new_tokens):
            stats = system.strategy.stats()
            most = max(most, stats["blocks_used"])
            if len(system.runner._running) == num_rows and all(seq.num_issued > 2 for seq in system.runner._running):
                decoding = decoding or stats
        block = bytes_per_block(system.strategy)
        found[name] = {
            "rows": num_rows,
            "blocks": decoding["blocks_used"],
            "kv_bytes": decoding["blocks_used"] * block,
            "most_bytes": most * block,
            "scoring_bytes": decoding.get("scoring_bytes", 0),
            "allocated": bench.allocated() - before,
            "preemptions": system.runner.num_preemptions,
        }
        del system
        bench.free()
    return found


# New tokens for all the chunks of the prompts that come after the first: it decodes until the last is there.
SIZES = {"rows": 8, "context": 16384, "keep": 0.25, "new_tokens": 96, "score": "snapkv"}
ON_CPU = {"rows": 4, "context": 512, "keep": 0.25, "new_tokens": 24, "score": "snapkv"}


def share(result: dict) -> float:
    """Blocks in use, of what paged takes for as many rows."""
    return result["evict"]["blocks"] / (result["rows"] * result["paged"]["blocks"])


def _table(result: dict) -> str:
    rows = [
        [name, *(str(found[key]) for key in ("rows", "blocks")),
         *(f"{found[key] / 1e9:.3f}" for key in ("kv_bytes", "most_bytes", "scoring_bytes", "allocated"))]
        for name in ("paged", "evict")
        for found in [result[name]]
    ]  # fmt: skip
    head = ["", "rows", "blocks in use, all decoding", "GB", "GB at most, prompts in flight", "rings of queries, GB"]
    return f"**Prompts of {result['context']} tokens, {result['score']} keeps {result['keep']}**\n\n" + table(
        [*head, "allocated for all of it, GB"], rows
    )


register(
    Workload(
        "evict blocks",
        run_blocks,
        "blocks that prompts leave in use, and the least memory they run in",
        cases={"evict": evict_cases({MHA: SIZES, GQA: SIZES}, ON_CPU)},
        tables=of_each("evict blocks", _table),
        claims=[
            Claim("blocks in use after {rows} x {context} / paged", "at most 0.26", 0.26, share, "{:.4f}", at_most=True)
        ],
    )
)
