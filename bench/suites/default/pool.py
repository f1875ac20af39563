"""The same requests in pools of several sizes, and in too small a one by each way to go on when blocks run out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from bench import measure
from bench.case import Bench, Case, is_random, ragged
from bench.lines import Found
from bench.markdown import of_points, points_in_words, spread, table
from bench.measure import num_same
from bench.suites.default import speed_models
from bench.systems import BLOCK_SIZE, Capacity, Ours, bytes_per_block, ours
from bench.workload import Target, Workload, register

AGAIN, HOST, DISK = "computed again", "host memory", "disk"


def run_pool(bench: Bench) -> dict:
    """Points of (blocks, as a share of what all requests need at once; where a preempted request's blocks go)."""
    rows: list[dict] = []
    expected = None
    for share, way in bench.params["points"]:
        bench.say(f"{share:g} of the blocks, {way}")
        with tempfile.TemporaryDirectory() as folder:
            row = measure.attempt(lambda at=(share, way, Path(folder)): _point(bench, *at))
        bench.free()
        tokens = row.pop("token_ids", None)
        if tokens and bench.case.dtype == "float32":  # elsewhere sums of another order round otherwise
            expected = expected or tokens
            row["identical"] = num_same(tokens, expected)
        rows.append({"label": f"{share:g} of the blocks, {way}", "share": share, "way": way} | row)
    return {"points": rows}


def _point(bench: Bench, share: float, way: str, folder: Path) -> dict:
    """Of one run: how fast, how often a request was preempted, and what became of its blocks."""
    new_tokens, repeats = bench.params["new_tokens"], bench.params["repeats"]
    prompts = bench.prompts(bench.params["lengths"], seed=1)
    system = _open(bench, share, way, folder)
    system(prompts, new_tokens)  # kernels compile, graphs are captured, and a tier learns its rates
    before, preemptions = system.strategy.stats(), system.runner.num_preemptions
    runs = [system(prompts, new_tokens) for _ in range(repeats)]
    after = system.strategy.stats()
    system.strategy.check_integrity()

    def added(key: str) -> int:
        return after.get(key, 0) - before.get(key, 0)

    return {
        "kv_bytes": after["num_blocks"] * bytes_per_block(system.strategy),
        "tokens_per_second": measure.spread([run.num_tokens / run.seconds for run in runs]),
        "preemptions": (system.runner.num_preemptions - preemptions) / repeats,
        "computed_again": added("prompt_tokens") / repeats - sum(map(len, prompts)),
        "brought_back": added("tier_blocks_promoted") / repeats,
        "token_ids": runs[-1].token_ids,
    }


def _open(bench: Bench, share: float, way: str, folder: Path) -> Ours:
    capacity = Capacity([[length + bench.params["new_tokens"] for length in bench.params["lengths"]]])
    needed = capacity.blocks(BLOCK_SIZE)
    num_blocks = math.ceil(share * needed)
    if way == AGAIN:
        return ours(bench.model, "paged", capacity, num_blocks=num_blocks)
    block = BLOCK_SIZE * measure.kv_bytes_per_token(bench.model)
    options = {"host_bytes": needed * block}
    if way == DISK:  # they pass through host memory
        options = {"host_bytes": -(-needed // 16) * block, "disk_path": folder, "disk_bytes": needed * block}
    return ours(bench.model, "offload", capacity, num_blocks=num_blocks, resident="kv", **options)


POINTS = [[1, AGAIN], [2, AGAIN], [0.5, AGAIN], [0.5, HOST], [0.5, DISK]]


def cases(to: Target) -> Iterable[Case]:
    if not to.on_gpu:
        params = {"lengths": ragged(6, 32, 96), "new_tokens": 32, "points": POINTS, "repeats": 1}
        yield to.case("paged", "float32", params, timeout=400)
    for model in filter(is_random, speed_models(to)):
        params = {"lengths": ragged(64, 100, 1024), "new_tokens": 256, "points": POINTS, "repeats": 2}
        yield to.case("paged", "bfloat16", params, timeout=500, model=model)


COLUMNS: dict[str, Callable[[dict], str]] = {
    "pool, of what is needed": lambda point: f"{point['share']:g}",
    "where blocks of a preempted request go": lambda point: point["way"],
    "KV, MB": lambda point: f"{point['kv_bytes'] / 1e6:.1f}",
    "tokens/s": lambda point: spread(point["tokens_per_second"], 1, 1),
    "preemptions": lambda point: f"{point['preemptions']:g}",
    "tokens computed again": lambda point: f"{point['computed_again']:g}",
    "blocks brought back": lambda point: "none" if point["way"] == AGAIN else f"{point['brought_back']:g}",
    "requests with the same tokens": lambda point: str(point.get("identical", "told in float32 only")),
}


def rows(points: Iterable[dict]) -> list[list[str]]:
    return of_points(points, COLUMNS, num_names=2)


def tables(found: Found, model: str) -> str:
    parts = []
    for line in found.of("pool", model).values():
        if line["status"] == "ok":
            count, new_tokens = len(line["params"]["lengths"]), line["params"]["new_tokens"]
            title = f"**Pools of several sizes, {line['dtype']}: {count} requests, {new_tokens} new tokens each**"
            parts.append(f"{title}\n\n" + table(COLUMNS, rows(line["result"]["points"])))
    return "\n\n".join(parts)


def _words(result: dict) -> str:
    return points_in_words(
        result["points"],
        lambda point: point["label"],
        lambda point: f"{point['tokens_per_second']['median']:.1f} tokens/s",
    )


register(
    Workload(
        "pool",
        run_pool,
        "the same requests in a pool of several sizes: how fast, and where blocks run out, how often and how slow?",
        cases={"default": cases},
        tables=tables,
        words=_words,
    )
)
