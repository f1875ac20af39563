"""The model checker of `checker.py` for some thousand steps of every composition, and that it finds what is broken.

    CHECKER_STEPS=100000 CHECKER_SEED=7 make test ARGS=tests/test_checker.py

Seeds are the same in every run of CI and others elsewhere, as hypothesis' are. A failure prints the command that runs
its world again; `make soak` runs fresh ones for as long as wanted.
"""

from __future__ import annotations

import gc
import os
import random
from collections import Counter

import pytest
from checker import ALL, CHOSEN, Failure, run_world, shrink

from kv_strategies import generate, prefix, runner
from kv_strategies.paged import BlockPool, BlockTable
from kv_strategies.prefix import PrefixCache
from kv_strategies.step import stop
from kv_strategies.step.scores import Logprobs
from kv_strategies.strategy import Reservation, Strategy
from kv_strategies.tiers import shared

STEPS = int(os.environ.get("CHECKER_STEPS", 10_000))
SEED = int(os.environ.get("CHECKER_SEED", 0 if os.environ.get("CI") else random.SystemRandom().randrange(10**6) * 1000))


@pytest.fixture(autouse=True)
def frozen():
    """What was there before is not looked through at every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("case", CHOSEN)
def test_nothing_breaks(case, record_property):
    total, seed = Counter(), SEED
    while total["steps"] < STEPS / len(CHOSEN):
        found = run_world(case, seed)
        assert not isinstance(found, Failure), str(found)
        total, seed = total + found, seed + 1
    for name, count in total.items():
        record_property(name, count)
    print(f"\n{case}, seeds {SEED} to {seed - 1}: {dict(total)}")
    assert total["samples"] and total["drains"]


def test_every_strategy_is_driven():
    """A strategy that is registered is soaked without another word."""
    from kv_strategies import STRATEGIES

    driven = {part for case in ALL for part in case.partition(":")[0].split("+")}
    assert driven == STRATEGIES.keys() - {"baseline"}


def test_a_world_is_the_same_twice():
    assert run_world("prefix+offload:disk", 3) == run_world("prefix+offload:disk", 3)


def _forgets_to_undo(monkeypatch):
    monkeypatch.setattr(Reservation, "undo", lambda self: None)


def _shares_between_salts(monkeypatch):
    monkeypatch.setattr(prefix, "salt_digest", lambda model, salt: model)


def _copies_nothing_on_write(monkeypatch):
    monkeypatch.setattr(BlockTable, "_must_copy_last", lambda self: False)


def _publishes_one_block_too_many(monkeypatch):
    publish = PrefixCache.publish

    def early(self, token_ids, table, salt):
        held, table.num_tokens = table.num_tokens, len(table.blocks) * self.pool.block_size
        try:
            publish(self, token_ids, table, salt)
        finally:
            table.num_tokens = held

    monkeypatch.setattr(Strategy, "reserve", _then(Strategy.reserve, early))


def _then(reserve, publish):
    """Publishes what has room, before it is computed."""

    def wrapped(self, rows, owner=None):
        found = reserve(self, rows, owner)
        if isinstance(owner, runner.Runner):
            for seq in owner._running:
                publish(self.sharing, seq.tokens, seq.table, seq.request.salt)
        return found

    return wrapped


def _loses_an_event(monkeypatch):
    receive, seen = runner.Runner._receive, Counter()

    def wrapped(self, step, tokens):
        receive(self, step, tokens)
        seen["calls"] += 1
        if seen["calls"] % 40 == 0 and self._events:
            self._events.popleft()

    monkeypatch.setattr(runner.Runner, "_receive", wrapped)


def _leaks_a_block(monkeypatch):
    release, seen = BlockPool.release, Counter()

    def wrapped(self, block):
        seen["calls"] += 1
        if seen["calls"] % 100:
            release(self, block)

    monkeypatch.setattr(BlockPool, "release", wrapped)


def _reorders_wrongly(monkeypatch):
    select = generate.StrategyCache.batch_select_indices
    monkeypatch.setattr(generate.StrategyCache, "batch_select_indices", lambda self, indices: select(self, indices * 0))


def _forgets_deadlines(monkeypatch):
    monkeypatch.setattr(runner.Runner, "_late", lambda self: [])


def _keeps_what_was_guessed(monkeypatch):
    monkeypatch.setattr(BlockTable, "truncate", lambda self, num_tokens: None)


def _misses_stop_strings(monkeypatch):
    monkeypatch.setattr(stop, "completes", lambda tokenizer, texts, prompt, tokens: tokens[-1:] == [0])


def _gives_log_probabilities_of_another(monkeypatch):
    monkeypatch.setattr(Logprobs, "row", _row_of_the_first(Logprobs.row))


def _row_of_the_first(row):
    return lambda self, index, k: row(self, 0, k)


def _believes_a_folder(monkeypatch):
    """Whatever a file says of itself."""
    monkeypatch.setattr(shared.Name, "identity", lambda self, of_all: of_all)
    monkeypatch.setattr(prefix, "block_digest", lambda parent, tokens: bytes([sum(tokens) % 4]) * 32)


@pytest.mark.parametrize(
    "mutant",
    [
        _forgets_to_undo, _shares_between_salts, _copies_nothing_on_write, _publishes_one_block_too_many,
        _loses_an_event, _leaks_a_block, _reorders_wrongly, _forgets_deadlines, _keeps_what_was_guessed,
        _misses_stop_strings, _gives_log_probabilities_of_another, _believes_a_folder,
    ],
)  # fmt: skip
def test_the_checker_finds(mutant, monkeypatch):
    with monkeypatch.context() as patch:
        mutant(patch)
        case = "prefix:shared" if mutant is _believes_a_folder else "prefix"
        for seed in range(12):
            found = run_world(case, seed)
            if isinstance(found, Failure):
                break
        else:
            raise AssertionError("nothing was found")
        if mutant is _forgets_to_undo:
            small = shrink(found, patience=60)
            assert len(small.only) < 30 and f"ONLY=prefix SEED={seed} OPS=" in str(small)
    assert not isinstance(run_world(case, seed), Failure)
