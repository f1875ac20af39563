"""A small batch, looked at after every step: who holds which block, and how much memory that is."""

from __future__ import annotations

import string
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bench.case import Bench, Case
from bench.lines import Found
from bench.markdown import by_system
from bench.systems import EVERY, Capacity, Ours, bytes_per_block
from bench.workload import Target, Workload, register

if TYPE_CHECKING:
    from kv_strategies.paged import BlockTable
    from kv_strategies.strategy import Strategy

#: Options at which a hundred tokens show what each strategy does.
OPTIONS = {"window": {"window": 64, "sinks": 4}}
FREE, KEPT, SHARED = ".", "-", "*"


def run_replay(bench: Bench) -> dict:
    """Requests that start alike, of different lengths, in a pool too small for all of them at once.

    Of every step the seconds since the start and a letter a block: `.` free, `-` kept for later requests, `*` shared,
    else the request's own.
    """
    from kv_strategies import STRATEGIES, build

    shared, lengths, new_tokens = (bench.params[name] for name in ("shared", "lengths", "new_tokens"))
    start, *texts = bench.prompts([shared, *lengths], seed=3)
    prompts = [start + text for text in texts]
    capacity = Capacity([[len(prompt) + new_tokens for prompt in prompts]])
    one_block = "max_length" in STRATEGIES[bench.case.system.split("+")[0]].options  # a request
    options = {"max_length": capacity.max_length} if one_block else {"block_size": bench.params["block_size"]}
    options |= OPTIONS.get(bench.case.system, {})
    num_blocks = len(prompts) if one_block else int(capacity.blocks(bench.params["block_size"]) * bench.params["room"])
    system = Ours(bench.model, build(bench.case.system, bench.model, num_blocks=num_blocks, **options), capacity)
    system.warm_up([prompts[0]], 2)
    system.strategy.reset()
    names: dict[BlockTable, str] = {}
    seconds, blocks, begin = [], [], time.perf_counter()
    for _ in system.stream(prompts, new_tokens):
        seen = _owners(system.strategy, names)
        if not blocks or seen != blocks[-1]:
            seconds.append(round(time.perf_counter() - begin, 4))
            blocks.append(seen)
    seconds.append(round(time.perf_counter() - begin, 4))
    blocks.append(_owners(system.strategy, names))
    most = max(sum(owner not in (FREE, KEPT) for owner in step) for step in blocks)
    return {
        "bytes_per_block": bytes_per_block(system.strategy),
        "block_size": system.strategy.block_size,
        "num_blocks": num_blocks,
        "most_blocks": most,
        "num_preemptions": system.runner.num_preemptions,
        "requests": len(prompts),
        "seconds": seconds,
        "blocks": blocks,
    }


def _owners(strategy: Strategy, names: dict[BlockTable, str]) -> str:
    """A letter a block. `names` remembers the tables in the order they came: a request that is admitted again after it
    was preempted has another letter.
    """
    held: dict[int, set[str]] = {}
    for table in list(strategy.pool.tables):
        for block in table.blocks[table.blocks >= 0].tolist():
            name = names.setdefault(table, string.ascii_uppercase[len(names) % 26])
            held.setdefault(block, set()).add(name)
    kept = set(strategy.sharing.held_blocks())

    def letter(block: int) -> str:
        own = held.get(block, set())
        return SHARED if len(own) > 1 else own.pop() if own else KEPT if block in kept else FREE

    return "".join(map(letter, range(strategy.pool.num_blocks)))


def cases(to: Target) -> Iterable[Case]:
    params = {"shared": 72, "lengths": [8, 60, 28, 90], "new_tokens": 48, "block_size": 8, "room": 0.8}
    yield from to.each([EVERY, "prefix+int8"], "float32", params)


COLUMNS = {
    "blocks": lambda r: f"{r['num_blocks']} of {r['block_size']} tokens",
    "most in use": lambda r: str(r["most_blocks"]),
    "KV in them (MB)": lambda r: f"{r['most_blocks'] * r['bytes_per_block'] / 1e6:.2f}",
    "preemptions": lambda r: str(r["num_preemptions"]),
    "seconds": lambda r: f"{r['seconds'][-1]:.2f}",
}


def tables(found: Found, model: str) -> str:
    shown = by_system(found.of("replay", model), COLUMNS)
    return shown and "**A small batch, block by block**\n\n" + shown


register(
    Workload(
        "replay",
        run_replay,
        "a small batch, looked at after every step: who holds which block, and how much memory is that?",
        cases={"replay": cases},
        tables=tables,
        words=lambda r: f"{len(r['blocks'])} steps, {r['most_blocks']} of {r['num_blocks']} blocks at most",
    )
)
