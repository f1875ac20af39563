"""Tiers: idle blocks go down and come back to the bit; broken disks and small budgets cost time, never tokens."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import typing
import warnings
from collections import deque
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from common import baseline_tokens, random_requests, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kv_strategies import Request, Runner, build
from kv_strategies.tiers import disk as disk_module
from kv_strategies.tiers import host as host_module
from kv_strategies.tiers.host import Disk, Home, Rates, Tiers
from kv_strategies.tiers.transfer import Lane

MODEL = tiny_llama(num_layers=2)
ROW = 64  # bytes


class Fault(RuntimeError):
    """As if the device, the disk or memory had failed."""


class Faults:
    """Fails where it is told to: at the n-th call from now on, once."""

    def __init__(self):
        self.calls_left, self.error, self.num_raised = -1, Fault, 0

    def call(self):
        self.calls_left -= 1
        if self.calls_left == 0:
            self.num_raised += 1
            raise self.error("as if")


class LateLane(Lane):
    """Copies that are under way until they are waited for, or told to arrive. The model's lane waits at once."""

    lanes: typing.ClassVar[list] = []
    faults = Faults()
    is_beside = True

    def __init__(self, device, *, main=False):
        super().__init__(device, main=main)
        self._is_main, self._todo, self.num_done, self.num_given = main, deque(), 0, 0
        self.lanes.append(self)

    def give(self, work):
        self._todo.append(work)
        self.num_given += 1

    def arrive(self, count=1):
        for _ in range(min(count, len(self._todo))):
            self._todo.popleft()()
            self.num_done += 1

    def copy(self, source, target):
        self.faults.call()
        self.give(lambda: target.copy_(source))

    def mark(self, *, timed=False):
        self.faults.call()
        return LateMark(self, self.num_given)

    def wait(self, *marks):
        self.faults.call()
        for mark in marks:
            if mark is not None:
                mark.synchronize() if self._is_main else self.give(mark.synchronize)

    def synchronize(self):
        self.arrive(len(self._todo))


class LateMark:
    def __init__(self, lane, end):
        self._lane, self._end = lane, end

    def query(self):
        return self._lane.num_done >= self._end

    def synchronize(self):
        self._lane.arrive(self._end - self._lane.num_done)

    def elapsed_time(self, other):
        return 1.0


class LateWriter:
    """A thread that writes when it is waited for, or told to."""

    writers: typing.ClassVar[list] = []

    def __init__(self, *args, **options):
        self._todo = deque()
        self.writers.append(self)

    def submit(self, *job):
        LateLane.faults.call()
        future = LateWrite(self)
        self._todo.append((future, job))
        return future

    def arrive(self, count=1):
        for _ in range(min(count, len(self._todo))):
            future, (work, *args) = job = self._todo.popleft()
            try:
                LateLane.faults.call()
                future.set_result(work(*args))
            except Fault as error:
                future.set_exception(error)
            except KeyboardInterrupt:  # it comes to who waits, never to a thread that writes
                self._todo.appendleft(job)
                raise

    def shutdown(self, **options):
        while self._todo:
            self._todo.popleft()[0].cancel()


class LateWrite(Future):
    def __init__(self, writer):
        super().__init__()
        self._writer = writer

    def result(self, timeout=None):
        while not self.done():
            assert self._writer._todo, "a write is waited for that nobody will do"
            self._writer.arrive()
        return super().result()


@contextlib.contextmanager
def late():
    """What is built meanwhile copies late and writes late; and fails where `LateLane.faults` says."""
    LateLane.lanes, LateWriter.writers, LateLane.faults = [], [], Faults()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_module, "Lane", LateLane)
        patch.setattr(disk_module, "ThreadPoolExecutor", LateWriter)
        yield LateLane.faults


class TiersMachine(RuleBasedStateMachine):
    """What is promoted is what was demoted under that key; and nothing is ever lost that there is room for."""

    @initialize(host=st.integers(1, 5), disk=st.integers(0, 5), is_late=st.booleans())
    def start(self, host, disk, is_late):
        self.folder = tempfile.TemporaryDirectory()
        self.near, self.far = torch.zeros(1, 4, ROW, dtype=torch.uint8), torch.zeros(3, 4, ROW, dtype=torch.uint8)
        with late() if is_late else contextlib.nullcontext(Faults()) as self.faults:
            on_disk = Disk(self.folder.name, disk * 4 * ROW, 4 * ROW) if disk else None
            self.tiers = Tiers([Home([self.near, self.far], torch.device("cpu"))], 16, host, Rates(), on_disk)
        self.late = [*LateLane.lanes, *LateWriter.writers] if is_late else []
        self.recent: list[int] = []  # keys, the least recently demoted first
        self.random = random.Random(0)

    def contents(self, key):
        data = torch.tensor([(7 * key + i) % 256 for i in range(4)], dtype=torch.uint8)
        return data[:, None].expand(4, ROW)

    @precondition(lambda self: self.late)
    @rule(data=st.data(), count=st.integers(1, 9))
    def arrive(self, data, count):
        data.draw(st.sampled_from(self.late)).arrive(count)

    @precondition(lambda self: self.late)
    @rule(calls_left=st.integers(1, 12), error=st.sampled_from([Fault, KeyboardInterrupt]))
    def fail(self, calls_left, error):
        self.faults.calls_left, self.faults.error = calls_left, error

    def may_fail(self, call, *args):
        """What it returns; None where it raised, and it was told to."""
        before = self.faults.num_raised
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return call(*args)
        except (Fault, KeyboardInterrupt):
            assert self.faults.num_raised > before
            return None

    @rule(key=st.integers(0, 9), block=st.integers(0, 3))
    def demote(self, key, block):
        data = self.contents(key)
        self.near[:, block], self.far[:, block] = data[:1], data[1:]
        self.may_fail(self.tiers.demote, bytes([key]), block, bytes([key, key]))
        self.near[:, block] = self.far[:, block] = 0
        if key not in self.recent:
            self.recent.append(key)

    @rule(key=st.integers(0, 9), block=st.integers(0, 3))
    def promote(self, key, block):
        found = self.may_fail(self.tiers.promote, bytes([key]), block)
        assert not found or key in self.recent
        if found:
            assert torch.equal(torch.cat((self.near[:, block], self.far[:, block])), self.contents(key))
            self.recent.remove(key)

    @rule(key=st.integers(0, 9))
    def discard(self, key):
        self.tiers.discard(bytes([key]))
        if key in self.recent:
            self.recent.remove(key)

    @rule(keys=st.lists(st.integers(0, 9), max_size=4), others=st.booleans())
    def ask(self, keys, others):
        wanted = [(bytes([key]), bytes([key, key + others])) for key in keys]
        count = self.may_fail(self.tiers.num_promotable, wanted) or 0
        assert count <= len(keys) and all(key in self.recent for key in keys[:count])
        assert not (others and count)

    @rule()
    def clear(self):
        if self.may_fail(lambda: self.tiers.clear() or True):
            self.recent.clear()

    @invariant()
    def nothing_leaks(self):
        if hasattr(self, "tiers"):
            self.tiers.check_integrity()


TestTiers = TiersMachine.TestCase
TestTiers.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def serve(name, requests, **options):
    strategy = build(name, MODEL, **options)
    runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=40)
    tokens = [result.token_ids for result in runner.generate(requests)]
    strategy.check_integrity()
    return tokens, strategy.stats(), runner


def block_bytes(block_size):
    return build("paged", MODEL, num_blocks=1, block_size=block_size).stats()["kv_bytes"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["offload", "prefix+offload", "prefix+offload+window"]),
    resident=st.sampled_from(["k", "none", "kv"]),
    block_size=st.sampled_from([2, 5, 16]),
    spare_tokens=st.integers(0, 40),
    host_blocks=st.integers(1, 12),
    disk_blocks=st.integers(0, 12),
)
def test_any_schedule_gives_the_same_tokens_as_without(
    tmp_path, seed, name, resident, block_size, spare_tokens, host_blocks, disk_blocks
):
    """Small pools preempt and evict, small tiers overflow."""
    rng = random.Random(seed)
    requests = random_requests(rng, rng.randint(2, 6), longest=30, max_new=10)
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    num_blocks = -(-(longest + spare_tokens) // block_size)
    window = {"window": 16, "sinks": 2} if "window" in name else {}
    sizes = {"num_blocks": num_blocks, "block_size": block_size, **window}
    one = block_bytes(block_size)
    host_bytes = host_blocks * one + (num_blocks * one if resident != "kv" else 0)
    disk = {"disk_path": tmp_path, "disk_bytes": disk_blocks * one} if disk_blocks else {}
    tokens, *_ = serve(name, requests, resident=resident, host_bytes=host_bytes, **disk, **sizes)
    if window:
        expected, *_ = serve("window", requests, **{**sizes, "num_blocks": 200})
    else:
        expected = baseline_tokens(MODEL, requests)
    assert tokens == expected
    assert not list(tmp_path.iterdir()), "no file is left behind, not even if this process had been killed"


def test_preempted_requests_come_back_without_being_computed_again(monkeypatch):
    requests = [Request([i + 1] * 20, max_new_tokens=20, temperature=0.7, seed=i) for i in range(6)]
    monkeypatch.setattr(Rates, "seconds_saved", lambda *args, **kwargs: 1.0)
    tokens, stats, runner = serve("offload", requests, num_blocks=14, block_size=4, resident="kv", host_bytes=1 << 22)
    assert tokens == baseline_tokens(MODEL, requests)
    assert runner.num_preemptions > 0 and stats["tier_blocks_promoted"] > 0
    assert stats["tier_blocks"]["host"] == 0, "nothing is left of requests that have ended"


def chat(num_turns, rng=None):
    """Two prompts that push one another out of a pool that holds one of them."""
    return [Request(list(range(1 + turn % 2, 60, 2)), max_new_tokens=2) for turn in range(num_turns)]


POOL = {"num_blocks": 10, "block_size": 4}


def in_turn(strategy, requests):
    runner = Runner(MODEL, strategy, max_num_seqs=2, max_batch_tokens=40)
    return [runner.generate([request])[0].token_ids for request in requests]


@pytest.mark.parametrize("resident", ["k", "none", "kv"])
def test_evicted_prefixes_come_back(resident, monkeypatch):
    monkeypatch.setattr(Rates, "seconds_saved", lambda *args, **kwargs: 1.0)
    strategy = build("prefix+offload", MODEL, resident=resident, host_bytes=1 << 22, **POOL)
    without = build("prefix", MODEL, **POOL)
    assert in_turn(strategy, chat(6)) == in_turn(without, chat(6)) == baseline_tokens(MODEL, chat(6))
    assert strategy.stats()["hit_tokens"] > without.stats()["hit_tokens"]
    assert strategy.stats()["tier_blocks_promoted"] > 0
    strategy.reset()
    assert strategy.stats()["tier_blocks"] == {"host": 0}


def with_disk(tmp_path, disk_blocks=40):
    one = block_bytes(4)
    return build(
        "prefix+offload", MODEL, resident="kv", host_bytes=one, disk_path=tmp_path, disk_bytes=disk_blocks * one, **POOL
    )


def test_prefixes_come_back_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(Rates, "seconds_saved", lambda *args, **kwargs: 1.0)
    strategy = with_disk(tmp_path)
    assert in_turn(strategy, chat(6)) == baseline_tokens(MODEL, chat(6))
    stats = strategy.stats()
    assert stats["tier_blocks_promoted"] > 5 and stats["tier_blocks_damaged"] == 0
    assert stats["tier_rates"]["disk_read"] > 0 and stats["tier_rates"]["prefill"] is None


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_blocks_are_computed_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(Rates, "seconds_saved", lambda *args, **kwargs: 1.0)
    strategy = with_disk(tmp_path)
    tokens = in_turn(strategy, chat(2))
    strategy.placement.tiers._collect(wait=True)
    file, one = strategy.placement.tiers._disk._file.handle, block_bytes(4)
    if damage == "truncated":
        os.truncate(file, 100)
    else:
        for at in range(0, os.fstat(file).st_size, one):
            os.pwrite(file, bytes([os.pread(file, 1, at)[0] ^ 1]), at)
    with pytest.warns(RuntimeWarning, match="truncated or altered"):
        tokens += in_turn(strategy, chat(4))
    assert tokens == baseline_tokens(MODEL, chat(2) + chat(4))
    assert strategy.stats()["tier_blocks_damaged"] > 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_is_given_up_with_one_warning(tmp_path, monkeypatch, code):
    monkeypatch.setattr(Rates, "seconds_saved", lambda *args, **kwargs: 1.0)
    strategy, pwrite, left = with_disk(tmp_path), os.pwrite, [3]

    def failing(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return pwrite(*args)

    monkeypatch.setattr(disk_module.os, "pwrite", failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert in_turn(strategy, chat(6)) == baseline_tokens(MODEL, chat(6))
        strategy.placement.tiers.clear()
    about = [str(warning.message) for warning in caught if "disk tier" in str(warning.message)]
    assert len(about) == 1 and os.strerror(code) in about[0] and str(tmp_path) in about[0]
    strategy.check_integrity()


def test_short_writes_and_reads_are_continued(tmp_path, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(disk_module.os, "pwrite", lambda handle, data, at: pwrite(handle, data[:7], at))
    monkeypatch.setattr(disk_module.os, "preadv", lambda handle, to, at: preadv(handle, [to[0][:5]], at))
    disk = Disk(tmp_path, 2 * ROW, ROW)
    data = torch.arange(ROW, dtype=torch.uint8)
    disk.write(b"a", b"", data).result()
    back = torch.zeros_like(data)
    assert disk.read(b"a", back) is not None and torch.equal(back, data)


def test_a_folder_that_cannot_be_written_and_budgets_too_small(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"disk_path .* cannot be written"):
        Disk(tmp_path / "file" / "folder", 1000, 100)
    with pytest.raises(ValueError, match="at least one block: 100 bytes are needed, got 99"):
        Disk(tmp_path, 99, 100)
    one = block_bytes(4)
    with pytest.raises(ValueError, match=f"{one} bytes are needed, got {one - 1}"):
        build("offload", MODEL, resident="kv", host_bytes=one, disk_path=tmp_path, disk_bytes=one - 1, **POOL)


def test_a_block_is_fetched_only_where_that_is_faster():
    rates = Rates()
    assert rates.seconds_saved(1000, 16, on_disk=True) > 0, "unmeasured, fetching wins"
    rates.prefill.learn(16, 1.0)
    rates.up.learn(1000, 0.5)
    rates.disk_read.learn(1000, 0.7)
    assert rates.seconds_saved(1000, 16, on_disk=False) == pytest.approx(0.5)
    assert rates.seconds_saved(1000, 16, on_disk=True) == pytest.approx(-0.2)
    for _ in range(50):
        rates.disk_read.learn(1000, 0.1)
    assert rates.seconds_saved(1000, 16, on_disk=True) == pytest.approx(0.4, abs=1e-3)


def test_a_slow_block_on_the_way_to_fast_ones_is_fetched(tmp_path):
    pool = torch.zeros(1, 4, ROW, dtype=torch.uint8)
    tiers = Tiers([Home([pool], torch.device("cpu"))], 16, 4, Rates(), Disk(tmp_path, 9 * ROW, ROW))
    keys = [bytes([i]) for i in range(4)]
    for key in keys:
        tiers.demote(key, 0)
    while tiers._leaving:
        tiers._collect(wait=True)
    assert tiers.stats()["tier_blocks"] == {"host": 3, "disk": 1}
    tiers.rates = Rates()
    tiers.rates.prefill.learn(16, 1.0)
    tiers.rates.disk_read.learn(ROW, 2.5)
    wanted = [(key, b"") for key in keys]
    assert tiers.num_promotable(wanted) == 4, "1.5 s lost and 3 s gained"
    assert tiers.num_promotable(wanted[:2]) == 0, "1.5 s lost and 1 s gained"
    assert tiers.stats()["tier_fetches_refused"] == 1


def test_rates_are_learnt_from_prompts():
    strategy = build("offload", MODEL, num_blocks=40, block_size=4, host_bytes=1 << 22)
    Runner(MODEL, strategy).generate([Request(list(range(1, 50)), max_new_tokens=2)])
    assert strategy.stats()["tier_rates"]["prefill"] > 0


# --- what fails, what is late


def build_small(name, tmp_path, *, host_blocks=2, disk_blocks=0, num_blocks=10, **options):
    one = block_bytes(4)
    disk = {"disk_path": tmp_path, "disk_bytes": disk_blocks * one} if disk_blocks else {}
    sizes = {"num_blocks": num_blocks, "block_size": 4}
    return build(name, MODEL, resident="kv", host_bytes=host_blocks * one, **disk, **sizes, **options)


def ledger(strategy):
    stats = strategy.stats()
    return stats["blocks_used"], stats["blocks_free"] + stats["blocks_cached"]


@pytest.mark.parametrize("what", ["demote", "promote", "num_promotable"])
@pytest.mark.parametrize("disk_blocks", [0, 40])
def test_a_tier_that_fails_once_costs_time_and_no_request(tmp_path, monkeypatch, what, disk_blocks):
    """Input A.4: once, and at each of its calls in turn."""
    monkeypatch.setattr(Rates, "seconds_saved", lambda *args, **kwargs: 1.0)
    expected, original = baseline_tokens(MODEL, chat(6)), getattr(Tiers, what)
    for fails_at in range(0, 12, 3):
        strategy, calls = build_small("prefix+offload", tmp_path, host_blocks=20, disk_blocks=disk_blocks), []

        def failing(*args, fails_at=fails_at, calls=calls):
            calls.append(args)
            if len(calls) == fails_at + 1:
                raise Fault("as if")
            return original(*args)

        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(Tiers, what, failing)
            for turn, request in enumerate(chat(6)):
                assert in_turn(strategy, [request]) == [expected[turn]]
                strategy.check_integrity()
                assert ledger(strategy) == (0, 10)
        has_failed = len(calls) > fails_at
        assert strategy.stats()["tier_copies_failed"] == has_failed
        told = [str(warning.message) for warning in caught if "between tiers" in str(warning.message)]
        assert len(told) == has_failed and all("Fault: as if" in text for text in told)


@pytest.mark.parametrize("what", ["demote", "promote"])
def test_tiers_that_always_fail_are_as_none(tmp_path, monkeypatch, what):
    """Evicted and preempted: computed again, after one warning."""
    monkeypatch.setattr(Rates, "seconds_saved", lambda *args, **kwargs: 1.0)

    def fail(*args):
        raise Fault("as if")

    monkeypatch.setattr(Tiers, what, fail)
    requests = [Request([i % 3 + 1] * 20, max_new_tokens=20, temperature=0.7, seed=i) for i in range(6)]
    for name in ("offload", "prefix+offload"):
        with pytest.warns(RuntimeWarning, match="could not be copied between tiers") as caught:
            tokens, stats, runner = serve(
                name, requests, num_blocks=14, block_size=4, resident="kv", host_bytes=1 << 22
            )
        assert tokens == baseline_tokens(MODEL, requests) and runner.num_preemptions > 0
        assert stats["tier_copies_failed"] > 1 and len(caught) == 1
        assert stats["blocks_used"] == 0


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
def test_match_gives_back_what_it_took_where_a_copy_fails(tmp_path, monkeypatch, error):
    """The hits and the block to be filled: 4 of 12 blocks stayed used for ever."""
    monkeypatch.setattr(Rates, "seconds_saved", lambda *args, **kwargs: 1.0)
    strategy = build_small("prefix+offload", tmp_path, host_blocks=20, num_blocks=12)
    in_turn(strategy, chat(3))
    prompt = chat(2)[1].token_ids

    def fail(*args):
        raise error("as if")

    for owner, what in [(host_module._Crossing, "up"), (type(strategy.pool), "keep"), (Tiers, "promote")]:
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(owner, what, fail)
            with contextlib.suppress(error):
                blocks, num_tokens = strategy.sharing.match(prompt, "")
                assert num_tokens < len(prompt) // 4 * 4
                strategy.sharing._release(blocks)
        strategy.check_integrity()
        assert ledger(strategy) == (0, 12)
    assert in_turn(strategy, chat(3)) == baseline_tokens(MODEL, chat(3))
    strategy.check_integrity()


def test_an_interrupted_return_of_a_preempted_request_gives_its_blocks_back(monkeypatch):
    strategy = build("offload", MODEL, num_blocks=14, block_size=4, resident="kv", host_bytes=1 << 22)
    table = strategy.open_table([1] * 20)
    strategy.reserve([(table, 20)])
    suspended = strategy.suspend(table)
    table.release()
    promote, calls = Tiers.promote, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return promote(*args)

    monkeypatch.setattr(Tiers, "promote", interrupted)
    with pytest.raises(KeyboardInterrupt):
        strategy.open_table([1] * 20, suspended=suspended)
    strategy.check_integrity()
    assert strategy.stats()["blocks_free"] == 14
    again = strategy.open_table([1] * 20, suspended=suspended)
    assert again.num_tokens == 0, "a part is lost: it is computed again"
    strategy.check_integrity()


def test_room_is_made_at_the_cost_of_others_than_what_is_fetched(tmp_path):
    """Copies that are late: the only block on disk was dropped for the one that left host memory for it."""
    pool = torch.arange(4, dtype=torch.uint8).repeat_interleave(ROW).view(1, 4, ROW)
    with late():
        disk = Disk(tmp_path, ROW, ROW)
        tiers = Tiers([Home([pool], torch.device("cpu"))], 16, 1, Rates(), disk)
        tiers.demote(b"a", 1)
        tiers.demote(b"b", 2)
        for later in (*LateLane.lanes, *LateWriter.writers):
            later.arrive(99)
        tiers.demote(b"c", 3)  # the copy of b is late, so it is in host memory yet
        tiers.check_integrity()
        for key, block in ((b"a", 1), (b"b", 2), (b"c", 3)):
            pool[:, 0] = 0
            if tiers.num_promotable([(key, b"")]):
                assert tiers.promote(key, 0) and (pool[:, 0] == block).all()
            tiers.check_integrity()
    assert tiers.num_promoted > 0


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["offload", "prefix+offload", "prefix+offload+window"]),
    resident=st.sampled_from(["k", "kv"]),
    spare_tokens=st.integers(0, 30),
    host_blocks=st.integers(1, 8),
    disk_blocks=st.integers(0, 8),
    fault_rate=st.sampled_from([0.0, 0.3]),
)
def test_any_schedule_with_late_and_failing_copies(
    tmp_path, seed, name, resident, spare_tokens, host_blocks, disk_blocks, fault_rate
):
    rng = random.Random(seed)
    requests = random_requests(rng, rng.randint(3, 7), longest=30, max_new=10)
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    one, num_blocks = block_bytes(4), -(-(longest + spare_tokens) // 4)
    window = {"window": 16, "sinks": 2} if "window" in name else {}
    disk = {"disk_path": tmp_path, "disk_bytes": disk_blocks * one} if disk_blocks else {}
    host_bytes = (host_blocks + (num_blocks if resident == "k" else 0)) * one
    if window:
        expected, *_ = serve("window", requests, num_blocks=200, block_size=4, **window)
    else:
        expected = baseline_tokens(MODEL, requests)
    with late() as faults, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(Rates, "seconds_saved", lambda *args, **kwargs: 1.0)
        strategy = build(
            name, MODEL, num_blocks=num_blocks, block_size=4, resident=resident, host_bytes=host_bytes, **disk, **window
        )
        runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=40)
        for _ in range(2):
            for index, request in enumerate(requests):
                request.request_id = index
            runner.submit(requests)
            tokens = {}
            while runner.num_running or runner.num_waiting:
                for later in (*LateLane.lanes, *LateWriter.writers):
                    later.arrive(rng.choice([0, 0, 0, 1, 5]))
                if faults.calls_left <= 0 and rng.random() < fault_rate:
                    faults.calls_left = rng.randint(1, 20)
                for event in runner.step():
                    if event.result is not None:
                        tokens[event.request_id, event.sample_index] = event.result.token_ids
                strategy.check_integrity()
            assert [tokens[key] for key in sorted(tokens)] == expected
            assert ledger(strategy) == (0, num_blocks)
    assert strategy.stats()["tier_copies_failed"] <= faults.num_raised
    assert fault_rate or not faults.num_raised


DROPPED = """
import gc, sys, threading, time, torch
from kv_strategies.tiers import disk as disk_module
from kv_strategies.tiers.disk import Disk
begun, go, pwrite = threading.Event(), threading.Event(), disk_module.os.pwrite
def slow(*args):
    begun.set()
    go.wait()
    return pwrite(*args)
disk_module.os.pwrite = slow
disk = Disk(sys.argv[1], 400, 100)
for key in (b"a", b"b"):
    disk.write(key, b"", torch.zeros(100, dtype=torch.uint8))
begun.wait()
(thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("kv-disk"))
before = time.perf_counter()
del disk
gc.collect()
assert time.perf_counter() - before < 1, "waits for the disk"
go.set()
thread.join()
print("ended")
"""


def test_a_disk_dropped_while_it_writes_ends_in_silence(tmp_path):
    """Its last reference may be the writer's, and no thread can wait for itself."""
    done = subprocess.run([sys.executable, "-c", DROPPED, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_a_strategy_dropped_while_its_disk_writes(tmp_path, monkeypatch):
    complaints, pwrite = [], os.pwrite
    monkeypatch.setattr(disk_module.os, "pwrite", lambda *args: time.sleep(0.1) or pwrite(*args))
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    strategy = with_disk(tmp_path)
    in_turn(strategy, chat(2))
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("kv-disk")]
    assert threads and strategy.placement.tiers._leaving
    del strategy
    gc.collect()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert not complaints


def test_check_integrity_looks_at_tree_tiers_and_tables(tmp_path):
    def broken(breaks, message):
        strategy = build_small("prefix+offload", tmp_path, host_blocks=4, disk_blocks=9)
        in_turn(strategy, chat(4))
        strategy.preload(list(range(8)))
        tiers = strategy.placement.tiers
        while tiers._leaving:
            tiers._collect(wait=True)
        strategy.check_integrity()
        table = strategy.open_table([1])
        node = next(iter(strategy.sharing._nodes.values()))
        breaks(strategy.sharing, tiers, table, node)
        with pytest.raises(AssertionError, match=message):
            strategy.check_integrity()

    def names(blocks):
        def change(sharing, tiers, table, node):
            table._ids, table._size, table.num_tokens = np.array(blocks, np.int32), len(blocks), 4 * len(blocks)

        return change

    def again(children, node):
        children[bytes(16)] = node

    for breaks, message in [
        (names([10]), "blocks that there are not"),
        (names([1, 1]), "holds a block twice"),
        (lambda sharing, tiers, table, node: sharing._by_block.pop(node.block), "found by its block"),
        (lambda sharing, tiers, table, node: sharing._nodes.pop(node.digest), "references held"),
        (lambda sharing, tiers, table, node: again(node.children, node), "misplaced"),
        (lambda sharing, tiers, table, node: sharing._roots.clear(), "out of reach"),
        (lambda sharing, tiers, table, node: sharing._preloaded.clear(), "pinned more or less often"),
        (lambda sharing, tiers, table, node: setattr(sharing, "num_pinned", 9), "number of pinned"),
        (lambda sharing, tiers, table, node: tiers._kept.popitem(), "host memory is lost"),
        (lambda sharing, tiers, table, node: tiers._free.append((0, None)), "or taken twice"),
        (lambda sharing, tiers, table, node: tiers._disk._kept.popitem(), "on disk is lost"),
    ]:
        broken(breaks, message)
