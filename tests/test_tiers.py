"""Tiers: idle blocks go down and come back to the bit; broken disks and small budgets cost time, never tokens."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import warnings

import pytest
import torch
from common import baseline_tokens, random_requests, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kv_strategies import Request, Runner, build
from kv_strategies.tiers import disk as disk_module
from kv_strategies.tiers.host import Disk, Rates, Tiers

MODEL = tiny_llama(num_layers=2)
ROW = 64  # bytes


class TiersMachine(RuleBasedStateMachine):
    """What is promoted is what was demoted under that key; and nothing is ever lost that there is room for."""

    @initialize(host=st.integers(1, 5), disk=st.integers(0, 5))
    def start(self, host, disk):
        self.folder = tempfile.TemporaryDirectory()
        self.near, self.far = torch.zeros(1, 4, ROW, dtype=torch.uint8), torch.zeros(3, 4, ROW, dtype=torch.uint8)
        on_disk = Disk(self.folder.name, disk * 4 * ROW, 4 * ROW) if disk else None
        self.tiers = Tiers([self.near, self.far], 16, torch.device("cpu"), host, Rates(), on_disk)
        self.capacity = host + disk
        self.recent: list[int] = []  # keys, the least recently demoted first
        self.random = random.Random(0)

    def contents(self, key):
        data = torch.tensor([(7 * key + i) % 256 for i in range(4)], dtype=torch.uint8)
        return data[:, None].expand(4, ROW)

    @rule(key=st.integers(0, 9), block=st.integers(0, 3))
    def demote(self, key, block):
        data = self.contents(key)
        self.near[:, block], self.far[:, block] = data[:1], data[1:]
        self.tiers.demote(bytes([key]), block, bytes([key, key]))
        self.near[:, block] = self.far[:, block] = 0
        if key not in self.recent:
            self.recent.append(key)

    @rule(key=st.integers(0, 9), block=st.integers(0, 3))
    def promote(self, key, block):
        found = self.tiers.promote(bytes([key]), block)
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
        count = self.tiers.num_promotable(wanted)
        assert count <= len(keys) and all(key in self.recent for key in keys[:count])
        assert not (others and count)

    @rule()
    def clear(self):
        self.tiers.clear()
        self.recent.clear()

    @invariant()
    def nothing_leaks(self):
        if not hasattr(self, "tiers"):
            return
        tiers = self.tiers
        held = [kept.place for kept in tiers._kept.values()] + [kept.place for kept, _ in tiers._leaving.values()]
        assert sorted(held + [place for place, _ in tiers._free]) == list(range(tiers._host.shape[0]))
        if tiers._disk:
            slots = [entry.slot for entry in tiers._disk._kept.values()]
            assert sorted(slots + tiers._disk._free) == list(range(tiers._disk.num_places))


TestTiers = TiersMachine.TestCase
TestTiers.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


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
    file, one = strategy.placement.tiers._disk._handle, block_bytes(4)
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
    tiers = Tiers([pool], 16, torch.device("cpu"), 4, Rates(), Disk(tmp_path, 9 * ROW, ROW))
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
