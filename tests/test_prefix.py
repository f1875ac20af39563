"""Prefix: the cache against a reference model, tokens against the native cache, files against damage."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from common import VOCAB, baseline_tokens, random_requests, slots, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

from kv_strategies import Request, Runner, build, prefix
from kv_strategies.paged import BlockPool, BlockTable, OutOfBlocks
from kv_strategies.prefix import PrefixCache
from kv_strategies.step import plan
from kv_strategies.step.store import block_bytes, views_of
from kv_strategies.step.upstream import with_cache
from kv_strategies.tiers import saved
from kv_strategies.tiers.lower import LowerTiers

MODEL = tiny_llama(num_layers=1)
DEEP = tiny_llama()  # where K and V of a layer depend on all tokens before

# --- the cache alone, K and V being whatever identifies a token and all before it


class FakePlacement:
    """Eight bytes a slot."""

    def __init__(self, pool: BlockPool):
        self.memory = torch.zeros(pool.num_blocks, pool.block_size * 8, dtype=torch.uint8)

    def slots(self) -> torch.Tensor:
        return self.memory.view(torch.int64).view(-1)

    def read_blocks(self, blocks):
        return self.memory[blocks]

    def write_blocks(self, blocks, data):
        self.memory[blocks] = data


class PrefixMachine(RuleBasedStateMachine):
    """Whatever is admitted, forked, evicted, saved or loaded: a table reads back the K and V of its own tokens."""

    TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
    SALTS = st.sampled_from(["", "b"])

    @initialize(num_blocks=st.integers(2, 14), block_size=st.sampled_from([1, 2, 3]))
    def start(self, num_blocks, block_size):
        self.block_size = block_size
        self.pool, self.prefix = BlockPool(num_blocks, block_size), PrefixCache()
        self.prefix.open(self.pool, {"block_size": block_size}, LowerTiers())
        self.placement = FakePlacement(self.pool)
        self.tables: dict[BlockTable, tuple[list[int], str]] = {}
        self.published: set[tuple] = set()  # (salt, tokens of a block and all before it)
        self.pinned: Counter[tuple] = Counter()  # and how often
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "saved"
        self.on_disk: list[tuple] = []

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def starts(self, tokens, salt, num_tokens=None):
        """The keys of all full blocks of some tokens."""
        ends = range(self.block_size, (len(tokens) if num_tokens is None else num_tokens) + 1, self.block_size)
        return [(salt, tuple(tokens[:end])) for end in ends]

    def write(self, table, tokens, first):
        for index, slot in enumerate(slots(table, first, table.num_tokens), first):
            self.placement.slots()[slot] = hash(tuple(tokens[: index + 1]))

    def append(self, table, tokens, first):
        if table.num_new_blocks(len(tokens) - first) > self.pool.num_free:
            self.evict_some(table.num_new_blocks(len(tokens) - first) - self.pool.num_free)
        try:
            copies = table.append(len(tokens) - first)
        except OutOfBlocks:
            assert not self.pool.idle, "idle blocks were there to be evicted"
            return False
        for source, destination in copies:
            self.placement.memory[destination] = self.placement.memory[source]
        self.write(table, tokens, first)
        return True

    def evict_some(self, count):
        in_use = {int(block) for table in self.tables for block in table.blocks}
        assert not in_use & set(self.pool.idle)
        wanted = min(count, self.prefix.num_evictable())
        before = self.keys()
        assert self.prefix.evict(count) == wanted
        gone = before - self.keys()
        # Beside the blocks given back, those may go that hang on one of them and are in use: nobody could reach them.
        assert wanted <= len(gone) <= wanted + len(in_use), "each block evicted was one that could be found"
        assert not gone & self.pinned.keys()
        for salt, tokens in self.keys():
            assert (salt, tokens[: -self.block_size]) not in gone, "only leaves are evicted"
        self.published -= gone

    def users(self):
        return [(tokens, salt, table) for table, (tokens, salt) in self.tables.items()]

    def keys(self):
        """What can be found, from the tree itself."""
        keys = set()
        for node in self.prefix._nodes.values():
            blocks = list(prefix.lineage(node))[::-1]
            tokens = memoryview(b"".join(block.tokens for block in blocks)).cast("i")
            salt = "" if blocks[0].parent.digest == prefix.salt_digest(self.prefix._fingerprint, "") else "b"
            keys.add((salt, tuple(tokens)))
        return keys

    @rule(tokens=TOKENS, salt=SALTS, publish=st.booleans())
    def admit(self, tokens, salt, publish):
        blocks, num_tokens = self.prefix.match(tokens[:-1], salt)
        found = [key for key in self.starts(tokens[:-1], salt) if key in self.published]
        assert num_tokens == len(found) * self.block_size, "the longest published start"
        table = BlockTable(self.pool, blocks, num_tokens)
        if not self.append(table, tokens, num_tokens):
            table.release()
            return
        self.tables[table] = (tokens, salt)
        if publish:
            self.publish(table)

    def publish(self, table):
        tokens, salt = self.tables[table]
        known = self.keys()
        self.prefix.publish(tokens, table, salt)
        self.prefix.publish(tokens, table, salt)
        assert self.keys() == known | set(self.starts(tokens, salt))
        self.published = self.keys()

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), more=TOKENS)
    def extend(self, data, more):
        table = data.draw(st.sampled_from(list(self.tables)))
        tokens, salt = self.tables[table]
        if self.append(table, tokens + more, len(tokens)):
            self.tables[table] = (tokens + more, salt)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish_later(self, data):
        self.publish(data.draw(st.sampled_from(list(self.tables))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        table = data.draw(st.sampled_from(list(self.tables)))
        self.tables[table.fork()] = self.tables[table]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def truncate(self, data):
        table = data.draw(st.sampled_from(list(self.tables)))
        tokens, salt = self.tables[table]
        keep = data.draw(st.integers(0, len(tokens)))
        table.truncate(keep)
        self.tables[table] = (tokens[:keep], salt)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        table = data.draw(st.sampled_from(list(self.tables)))
        table.release()
        del self.tables[table]

    @rule(count=st.integers(0, 20))
    def evict(self, count):
        self.evict_some(count)

    @rule(tokens=TOKENS, salt=SALTS)
    def pin(self, tokens, salt):
        found = [key for key in self.starts(tokens, salt) if key in self.published]
        assert self.prefix.pin(tokens, salt) == len(found) * self.block_size
        if found:
            self.pinned[found[-1]] += 1

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def forget(self, data):
        salt, tokens = data.draw(st.sampled_from(sorted(self.pinned)))
        self.prefix.forget(tokens, salt)
        self.pinned -= Counter([(salt, tokens)])
        if (salt, tokens) not in self.pinned:
            with pytest.raises(ValueError, match="not preloaded"):
                self.prefix.forget(tokens, salt)

    @rule()
    def save(self):
        assert self.prefix.save(self.file, self.placement) == len(self.published)
        self.on_disk = set(self.published)

    @precondition(lambda self: self.on_disk)
    @rule()
    def load(self):
        free, known = self.pool.num_free, len(self.published & self.on_disk)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = self.prefix.load(self.file, self.placement)
        missing = len(self.on_disk - self.published)
        assert loaded.num_blocks == min(free, missing) and loaded.num_left_out == max(0, missing - free)
        assert loaded.num_known == known
        self.published = self.keys()

    @precondition(lambda self: self.published)
    @rule()
    def clear(self):
        self.prefix.clear()
        self.published, self.pinned = set(), Counter()
        assert not self.prefix.held_blocks() and not self.pool.idle

    @invariant()
    def reads_back(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self.prefix.held_blocks())
        self.prefix.check_integrity()
        assert self.keys() == self.published
        pinned = {start for salt, tokens in self.pinned for start in self.starts(tokens, salt)}
        assert self.prefix.num_pinned == len(pinned)
        for tokens, _, table in self.users():
            expected = [hash(tuple(tokens[: index + 1])) for index in range(len(tokens))]
            assert self.placement.slots()[slots(table, 0, len(tokens))].tolist() == expected


TestPrefix = PrefixMachine.TestCase
TestPrefix.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def cached_pool(num_blocks, *prompts, block_size=2):
    """A pool, and a cache of these prompts, computed and released in this order."""
    pool, cache = BlockPool(num_blocks, block_size), PrefixCache()
    cache.open(pool, {})
    for prompt in prompts:
        touch(pool, cache, prompt)
    return pool, cache


def touch(pool, cache, prompt):
    table = BlockTable(pool, *cache.match(prompt, ""))
    hit = table.num_tokens
    table.append(len(prompt) - hit)
    cache.publish(prompt, table, "")
    table.release()
    return hit


def test_the_longest_unused_leaf_goes_first():
    pool, cache = cached_pool(9, [0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3], [7, 7])
    touch(pool, cache, [0, 0, 1, 1])
    gone = []
    for _ in range(5):
        left = {node.tokens for node in cache.ordered()}
        assert cache.evict(1) == 1
        gone += [int.from_bytes(tokens[:4], "little") for tokens in left - {node.tokens for node in cache.ordered()}]
    assert gone == [2, 3, 7, 1, 0]
    assert cache.evict(1) == 0 and pool.num_free == 9


def test_the_same_content_twice_keeps_the_first_block():
    pool, cache = cached_pool(4)
    first, second = BlockTable(pool), BlockTable(pool)
    first.append(2)
    second.append(2)
    cache.publish([5, 5], first, "")
    cache.publish([5, 5], second, "")
    assert cache.held_blocks() == [first.blocks[0]]


@pytest.mark.parametrize("salt", [None, 5, b"tenant"])
def test_a_salt_is_a_str(salt):
    _, cache = cached_pool(4)
    with pytest.raises(TypeError, match="salt must be a str"):
        cache.match([1, 2, 3], salt)
    strategy = build("prefix", MODEL, num_blocks=4)
    with pytest.raises(TypeError, match="salt must be a str"):
        strategy.cache(torch.ones(1, 20, dtype=torch.long), salt=salt)
    with pytest.raises(ValueError, match="salt must be a str"):
        Runner(MODEL, strategy).generate([Request([1, 2], salt=salt)])
    strategy.check_integrity()


def test_the_tree_shows_what_is_shared():
    pool, cache = cached_pool(9, [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 3, 3])
    cache.pin([0, 0, 1, 1], "")
    table = BlockTable(pool, *cache.match([0, 0, 1, 1, 3, 3], ""))
    cache.count_hit(table.blocks.tolist())
    lines = cache.tree(lambda tokens: "".join(map(str, tokens))).splitlines()
    assert lines[0].startswith("salt ")
    assert lines[1:] == [
        "+- 4 tokens, blocks 0 1 (1 using, pinned, 1 hits): 0011",
        "|  +- 2 tokens, blocks 2 (idle, 0 hits): 22",
        "|  +- 2 tokens, blocks 3 (1 using, 1 hits): 33",
    ]


def test_the_module_explains_itself():
    output = subprocess.run([sys.executable, "-m", "kv_strategies.prefix"], capture_output=True, text=True, check=True)
    assert "12 of 18 tokens are there" in output.stdout and "evicted" in output.stdout


# --- through the runner


def family_of_requests(rng: random.Random, count: int) -> list[Request]:
    """Requests that start alike, in several depths, some with a salt."""
    stem = [rng.randrange(VOCAB) for _ in range(40)]
    requests = random_requests(rng, count, longest=20, max_new=6)
    for request in requests:
        request.token_ids = stem[: rng.choice([0, 5, 16, 17, 40])] + list(request.token_ids)
        request.salt = rng.choice(["", "", "tenant"])
    return requests


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    block_size=st.sampled_from([1, 2, 3, 7, 16]),
    spare_tokens=st.integers(0, 200),
    chunk=st.integers(1, 60),
    collide=st.booleans(),
)
def test_any_schedule_gives_the_tokens_of_the_native_cache(seed, block_size, spare_tokens, chunk, collide):
    """Small pools evict and preempt; the second round hits what the first has left."""
    rng = random.Random(seed)
    requests = family_of_requests(rng, rng.randint(2, 5))
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    with pytest.MonkeyPatch.context() as patch:
        if collide:  # two bits of a hash are left
            digest = prefix.block_digest
            patch.setattr(prefix, "block_digest", lambda *parts: bytes([digest(*parts)[0] & 3]))
        strategy = build("prefix", MODEL, num_blocks=-(-(longest + spare_tokens) // block_size), block_size=block_size)
        runner = Runner(MODEL, strategy, max_num_seqs=6, max_batch_tokens=6 + chunk)
        expected = baseline_tokens(MODEL, requests)
        for _ in range(2):
            tokens = {}
            pending = list(enumerate(requests))
            while pending or runner.num_running or runner.num_waiting:
                if pending and rng.random() < 0.6:
                    index, request = pending.pop(0)
                    request.request_id = index
                    runner.submit([request])
                for event in runner.step():
                    if event.result is not None:
                        tokens[event.request_id, event.sample_index] = event.result.token_ids
                strategy.check_integrity()
            assert [tokens[key] for key in sorted(tokens)] == expected
            assert strategy.stats()["blocks_used"] == 0


@pytest.mark.parametrize("name", ["window", "int8", "window+int8"])
def test_sharing_changes_nothing_about_a_lossy_strategy(name):
    """Equal to the same strategy without sharing, windows that move and are rebased included."""
    options = {"window": 24, "sinks": 2} if "window" in name else {}
    if (
        name == "window"
    ):  # where keys are quantised as well, turning them rounds, and a preempted request has not turned
        options["rebase_at"] = 64
    for seed in range(6):
        requests = family_of_requests(random.Random(seed), 6)
        for request in requests:
            request.max_new_tokens += 40
        results = []
        for part in ("prefix+", ""):
            strategy = build(part + name, DEEP, num_blocks=30 + 15 * (seed % 3), block_size=4, **options)
            runner = Runner(DEEP, strategy, max_num_seqs=6, max_batch_tokens=30)
            results.append([[result.token_ids for result in runner.generate(requests)] for _ in range(2)])
            strategy.check_integrity()
            assert strategy.sharing.num_evictable() == 0 or strategy.stats()["hit_tokens"] > 0
        assert results[0] == results[1]


def test_a_hit_spares_its_tokens_and_is_reported():
    strategy = build("prefix", MODEL, num_blocks=100, block_size=4)
    runner = Runner(MODEL, strategy)
    prompt = list(range(40))
    counts = [runner.generate([Request(prompt, max_new_tokens=9, salt=salt)])[0].num_cached_tokens for salt in "aab"]
    assert counts == [0, 36, 0], "the whole prompt but for its last block, and nothing of another tenant"
    answer = runner.generate([Request(prompt, max_new_tokens=9, salt="a")])[0].token_ids
    again = runner.generate([Request([*prompt, *answer, 1], max_new_tokens=1, salt="a")])[0]
    assert again.num_cached_tokens == 48, "a second turn finds the answer as well"
    stats = strategy.stats()
    assert stats["hit_tokens"] == 36 + 36 + 48 and stats["prompt_tokens"] == 4 * 40 + 50
    strategy.reset()
    assert strategy.stats()["blocks_free"] == 100 and strategy.stats()["hit_tokens"] == 0


def test_a_block_is_hashed_once(monkeypatch):
    hashed = []
    digest = prefix.block_digest
    monkeypatch.setattr(prefix, "block_digest", lambda parent, tokens: hashed.append(tokens) or digest(parent, tokens))
    runner = Runner(MODEL, build("prefix", MODEL, num_blocks=100, block_size=4), max_batch_tokens=65)
    prompt = [i % VOCAB for i in range(170)]  # in three chunks
    runner.generate([Request(prompt, max_new_tokens=1)])
    assert len(hashed) == 42
    hit = runner.generate([Request([*prompt[:160], 1, 2, 3, 4, 5], max_new_tokens=1)])[0]
    assert hit.num_cached_tokens == 160 and len(hashed) == 43


def test_colliding_hashes_never_give_wrong_tokens(monkeypatch):
    monkeypatch.setattr(prefix, "block_digest", lambda parent, tokens: b"always the same")
    strategy = build("prefix", MODEL, num_blocks=100, block_size=4)
    requests = [Request([i] * 20, max_new_tokens=8) for i in range(5)] * 2
    results = Runner(MODEL, strategy).generate(requests)
    assert [result.token_ids for result in results] == baseline_tokens(MODEL, requests)
    assert strategy.stats()["blocks_cached"] == 1
    strategy.check_integrity()


def test_a_preempted_request_finds_what_is_left_of_it():
    strategy = build("prefix", MODEL, num_blocks=14, block_size=4)
    runner = Runner(MODEL, strategy, max_num_seqs=6)
    requests = [Request([i + 1] * 20, max_new_tokens=20, temperature=0.7, seed=i) for i in range(6)]
    results = runner.generate(requests)
    assert runner.num_preemptions > 0 and strategy.stats()["hit_tokens"] > 0
    assert [result.token_ids for result in results] == baseline_tokens(MODEL, requests)


# --- preloaded prompts


def test_preloaded_prompts_stay_until_forgotten():
    strategy = build("prefix", MODEL, num_blocks=20, block_size=4)
    system = list(range(1, 42))
    assert strategy.preload(system) == 40
    assert strategy.preload(system) == 40, "twice, for two that will forget it"
    assert strategy.stats()["blocks_pinned"] == 10 and strategy.max_tokens == 40
    runner = Runner(MODEL, strategy)
    for seed in range(5):
        others = [Request([seed, i, *range(25)], max_new_tokens=12) for i in range(4)]
        assert [r.token_ids for r in runner.generate(others)] == baseline_tokens(MODEL, others)
        strategy.check_integrity()
    assert strategy.stats()["evictions"] > 0
    request = Request([*system, 3], max_new_tokens=30)
    result = runner.generate([request])[0]
    assert result.num_cached_tokens == 40
    assert [result.token_ids] == baseline_tokens(MODEL, [request])
    strategy.forget(system)
    assert strategy.stats()["blocks_pinned"] == 10, "one of the two still needs it"
    strategy.check_integrity()
    strategy.forget(system)
    assert strategy.stats()["blocks_pinned"] == 0 and strategy.max_tokens == 80
    with pytest.raises(ValueError, match="not preloaded"):
        strategy.forget(system)
    strategy.check_integrity()


def test_pinned_blocks_count_against_what_can_fit():
    strategy = build("prefix", MODEL, num_blocks=20, block_size=4)
    system = list(range(1, 41))
    strategy.preload(system)
    runner = Runner(MODEL, strategy)
    with pytest.raises(ValueError, match="pool of 40 tokens"):
        runner.generate([Request([7] * 41)])
    with pytest.raises(ValueError, match="pool"):
        runner.generate([Request([*system, 5], max_new_tokens=41)])
    request = Request([*system, 5], max_new_tokens=40)  # all of the pool, the pinned part shared
    assert [r.token_ids for r in runner.generate([request])] == baseline_tokens(MODEL, [request])
    with pytest.raises(OutOfBlocks):
        strategy.preload([9] * 44)
    strategy.check_integrity()
    assert strategy.stats()["blocks_used"] == 10, "the pinned ones"
    strategy.reset()
    assert strategy.stats()["blocks_free"] == 20


@pytest.mark.parametrize(
    ("name", "options", "asks"),
    [
        ("prefix", {}, {"prompt_logprobs": 0}),
        ("prefix+evict", {"score": "snapkv", "keep": 0.5}, {}),
        ("prefix+evict", {"score": "tova", "keep": 0.5}, {"prompt_logprobs": 1}),
    ],
)
def test_what_takes_over_less_of_a_pinned_prompt_is_refused_or_finished(name, options, asks):
    """Log probabilities of a prompt have all of it computed, and a score the last of it."""
    strategy = build(name, MODEL, num_blocks=20, block_size=4, **options)
    system, refused = list(range(1, 41)), 0
    strategy.preload(system)
    runner = Runner(MODEL, strategy)
    for length in range(1, 42, 4):
        try:
            runner.submit([Request([*system[:length], 5], max_new_tokens=9, request_id=length, **asks)])
        except ValueError as error:
            assert "pool" in str(error) or "blocks" in str(error)
            refused += 1
            continue
        while runner.num_running or runner.num_waiting:
            runner.step()
    assert 0 < refused < 11


def test_preload_refuses_what_it_cannot_keep():
    strategy = build("prefix", MODEL, num_blocks=20, block_size=4)
    with pytest.raises(ValueError, match="at least 4 tokens"):
        strategy.preload([1, 2, 3])
    with pytest.raises(ValueError, match=f"0 to {VOCAB - 1}"):
        strategy.preload([VOCAB] * 8)
    for call in (strategy.preload, strategy.forget):
        with pytest.raises(TypeError, match="salt must be a str"):
            call([1] * 8, salt=1)
    plain = build("paged", MODEL, num_blocks=20)
    for call in (plain.preload, plain.forget, plain.save, plain.load):
        with pytest.raises(ValueError, match="build it with 'prefix'"):
            call([1] * 8)


# --- through generate()


def inputs(*prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


STEM = torch.randint(0, VOCAB, (50,), generator=torch.Generator().manual_seed(5)).tolist()
RAGGED = inputs([*STEM, 1, 2, 3], [*STEM[:30], 4, 5], [*STEM[:41]])
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "return sequences": {"num_return_sequences": 3, "do_sample": True},
    "beams, all returned": {"num_beams": 2, "num_return_sequences": 2},
    # Before 5.20, generate() in chunks feeds all of a prompt again, whatever the cache holds.
    "chunked prefill": {"prefill_chunk_size": 4},
    "one row": {"given": inputs(STEM)},
    "one token": {"given": inputs([4])},
    "a row of its own": {"given": inputs(STEM, [7] * 20)},
    "equal rows": {"given": inputs(STEM, STEM)},
    "draft model": {"given": inputs(STEM), "assistant_model": tiny_llama(seed=1)},
    "prompt lookup": {"given": inputs(STEM), "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize(
    "mode", [mode if mode == "chunked prefill" else pytest.param(mode, marks=pytest.mark.upstream) for mode in MODES]
)
def test_generate_gives_the_tokens_of_the_native_cache(mode):
    """Three times over one strategy: cold, after a call that shares a part, and as a whole hit."""
    options = dict(MODES[mode])
    given = options.pop("given", RAGGED)
    strategy = build("prefix", DEEP, num_blocks=200, block_size=4)

    def run(cache):
        torch.manual_seed(7)
        return DEEP.generate(**given, **with_cache(cache), max_new_tokens=12, **options)

    expected = run(DynamicCache(config=DEEP.config))
    skipped = []
    for _ in range(3):
        cache = strategy.cache(**given)
        skipped.append(cache.get_seq_length())
        assert torch.equal(run(cache), expected)
        del cache
        strategy.check_integrity()
        assert strategy.stats()["blocks_used"] == 0
    if mode == "one row":
        assert skipped == [0, 48, 48], "all but the last block, and not all even where that is full"
    if mode == "a row of its own":
        assert skipped == [0, 46, 46], "30 of padding and 16 tokens of the shorter row"
    if mode == "greedy":
        assert skipped[1] == 49, "21 of padding and 28 of 32 tokens of the shortest; the others have 52"


def test_generate_and_the_runner_share():
    strategy = build("prefix", DEEP, num_blocks=100, block_size=4)
    Runner(DEEP, strategy).generate([Request(STEM, max_new_tokens=2)])
    given = inputs([*STEM, 9])
    expected = DEEP.generate(**given, max_new_tokens=5)
    cache = strategy.cache(**given)
    assert cache.get_seq_length() == 48
    assert torch.equal(DEEP.generate(**given, **with_cache(cache), max_new_tokens=5), expected)
    assert strategy.cache(**given, salt="other").get_seq_length() == 0


def test_a_whole_hit_leaves_a_token_to_compute():
    strategy = build("prefix", DEEP, num_blocks=100, block_size=4)
    given = inputs(STEM[:48])
    expected = DEEP.generate(**given, max_new_tokens=5)
    for skipped in (0, 44):
        cache = strategy.cache(**given)
        assert cache.get_seq_length() == skipped
        assert torch.equal(DEEP.generate(**given, **with_cache(cache), max_new_tokens=5), expected)


def test_other_tokens_than_announced_are_refused_and_poison_nothing():
    strategy = build("prefix", DEEP, num_blocks=100, block_size=4)
    told, fed = inputs(STEM), inputs(STEM[::-1])
    shorter, masked = inputs(STEM[:20]), {**told, "attention_mask": told["attention_mask"].clone()}
    masked["attention_mask"][0, :3] = 0
    for other in (fed, shorter, masked, inputs([*STEM[:49], STEM[49] + 1])):
        for _ in range(2):  # cold, and with a hit
            with pytest.raises(ValueError, match=r"feeds other tokens|attention mask"):
                DEEP.generate(**other, **with_cache(strategy.cache(**told)), max_new_tokens=3)
            strategy.check_integrity()
            assert strategy.stats()["blocks_used"] == 0
            expected = DEEP.generate(**told, max_new_tokens=3)
            again = DEEP.generate(**told, **with_cache(strategy.cache(**told)), max_new_tokens=3)
            assert torch.equal(again, expected)
        strategy.reset()
    with pytest.raises(ValueError, match="at other positions"), torch.no_grad():
        DEEP(told["input_ids"], position_ids=torch.arange(50)[None] + 3, **with_cache(strategy.cache(**told)))
    with pytest.raises(ValueError, match="input_ids \\[B, n\\]"):
        strategy.cache(told["input_ids"], torch.ones(1, 3))


def test_a_failed_forward_publishes_nothing(monkeypatch):
    strategy = build("prefix", DEEP, num_blocks=100, block_size=4)
    given, attend = inputs(STEM), type(strategy).attend

    def fail(self, layer_idx, *args):
        if layer_idx == 1:
            raise RuntimeError("as if out of memory")
        return attend(self, layer_idx, *args)

    monkeypatch.setattr(type(strategy), "attend", fail)
    with pytest.raises(RuntimeError, match="as if"):
        DEEP.generate(**given, **with_cache(strategy.cache(**given)), max_new_tokens=3)
    assert strategy.stats()["blocks_free"] == 100


# --- across restarts


def filled(model=DEEP, num_blocks=60, **options):
    strategy = build("prefix", model, num_blocks=num_blocks, block_size=4, **options)
    Runner(model, strategy).generate([Request([*STEM, i], max_new_tokens=9, salt=salt) for i, salt in enumerate("aab")])
    return strategy


def hit(strategy, salt="a", prompt=STEM):
    result = Runner(strategy.model, strategy).generate([Request(prompt, max_new_tokens=6, salt=salt)])[0]
    assert [result.token_ids] == baseline_tokens(strategy.model, [Request(prompt, max_new_tokens=6)])
    strategy.check_integrity()
    return result.num_cached_tokens


@pytest.mark.parametrize("name", ["prefix", "prefix+int8", "prefix+window"])
def test_saved_blocks_serve_after_a_restart(name, tmp_path):
    first = build(name, DEEP, num_blocks=60, block_size=4, **({"window": 30} if "window" in name else {}))
    second = build(name, DEEP, num_blocks=60, block_size=4, **({"window": 30} if "window" in name else {}))
    request = [Request(STEM, max_new_tokens=9)]
    expected = Runner(DEEP, first).generate(request)[0].token_ids
    assert first.save(tmp_path / "saved") == second.load(tmp_path / "saved").num_blocks > 0
    result = Runner(DEEP, second).generate(request)[0]
    assert result.num_cached_tokens == 48 and result.token_ids == expected
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert second.load(tmp_path / "saved").num_known == len(second.sharing.held_blocks()), "loading twice adds nothing"
    second.check_integrity()


def test_a_gpu_reads_what_a_cpu_has_saved():
    """Both layouts of the memory read and write the same bytes."""
    flat, slab = (build("int8", DEEP, num_blocks=6).placement for _ in range(2))
    (store,), (flat_store,) = slab.stores.values(), flat.stores.values()
    planes = {name: (tuple(plane.shape[2:]), plane.dtype) for name, plane in store.planes.items()}
    store.planes = views_of(torch.zeros(6, block_bytes(2, planes), dtype=torch.uint8), 2, planes)
    for plane in flat_store.planes.values():
        plane.copy_(torch.randint(0, 100, plane.shape))
    slab.write_blocks([3, 0], flat.read_blocks([1, 5]))
    for name, plane in flat_store.planes.items():
        assert torch.equal(store.planes[name][[3, 0]], plane[[1, 5]])
    assert torch.equal(slab.read_blocks([0, 3]), flat.read_blocks([5, 1]))


def test_salts_are_saved_as_digests_and_still_separate(tmp_path):
    filled(num_blocks=80).save(tmp_path / "saved")
    strategy = build("prefix", DEEP, num_blocks=80, block_size=4)
    strategy.load(tmp_path / "saved")
    assert hit(strategy, "a") == 48 and hit(strategy, "b") == 48 and hit(strategy, "c") == 0
    secret = build("prefix", DEEP, num_blocks=80, block_size=4)
    Runner(DEEP, secret).generate([Request(STEM, max_new_tokens=1, salt="a tenant's name")])
    secret.save(tmp_path / "saved")
    assert b"tenant" not in (tmp_path / "saved").read_bytes()


def test_a_smaller_pool_takes_the_most_recent_part(tmp_path):
    large = build("prefix", DEEP, num_blocks=60, block_size=4)
    old, new = [1] * 40, STEM
    for prompt in (old, new):
        hit(large, "a", prompt)
    saved_blocks = large.save(tmp_path / "saved")
    small = build("prefix", DEEP, num_blocks=18, block_size=4)
    with pytest.warns(UserWarning, match=f"18 loaded, {saved_blocks - 18} left out for lack of room"):
        small.load(tmp_path / "saved")
    assert hit(small, "a", new) == 48


def test_damage_is_found_block_by_block(tmp_path):
    path, strategy = tmp_path / "saved", filled(num_blocks=80)
    num_blocks = strategy.save(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        damaged = bytearray(whole)
        if rng.random() < 0.5:
            damaged = damaged[: rng.randrange(1, len(whole))]
        for place in rng.sample(range(len(damaged)), rng.choice([0, 1, 3]) if len(damaged) < len(whole) else 2):
            damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        other = build("prefix", DEEP, num_blocks=80, block_size=4)
        try:
            with pytest.warns(UserWarning, match="damaged"):
                loaded = other.load(path)
        except ValueError as error:
            assert "not a saved prefix cache" in str(error) or "header is damaged" in str(error)
            assert other.stats()["blocks_free"] == 80
            continue
        assert loaded.num_damaged > 0
        assert loaded.num_blocks + loaded.num_damaged + loaded.num_unreachable == num_blocks
        assert loaded.num_blocks == len(other.sharing.held_blocks())
        hit(other, "a")
        hit(other, "b")


def test_a_file_of_another_model_or_policy_is_refused(tmp_path):
    path = tmp_path / "saved"
    filled().save(path)
    finetuned = tiny_llama()
    finetuned.model.layers[1].mlp.up_proj.weight.data += 1e-3

    def refused(message, name="prefix", model=DEEP, block_size=4, **options):
        strategy = build(name, model, num_blocks=60, block_size=block_size, **options)
        with pytest.raises(ValueError, match=message):
            strategy.load(path)
        assert strategy.stats()["blocks_free"] == 60

    refused("another model or policy: weights is", model=finetuned)
    refused("another model or policy: config is", model=tiny_llama(rope_theta=5e5))
    refused("dtype is float32 there and bfloat16 here", model=tiny_llama().to(torch.bfloat16))
    refused("block_size is 4 there and 8 here", block_size=8)
    refused(r"retention is \{\} there and \{'window': 30, 'sinks': 4\} here", "prefix+window", window=30)
    refused("planes is", "prefix+int8")
    refused("config is", model=MODEL)
    build("prefix", tiny_llama(), num_blocks=60, block_size=4).load(path)  # the same weights in another process


def test_files_that_cannot_be_read_or_written(tmp_path, monkeypatch):
    strategy, path = filled(), tmp_path / "saved"
    with pytest.raises(FileNotFoundError):
        strategy.load(path)
    with pytest.raises(FileNotFoundError):
        strategy.save(tmp_path / "no such folder" / "saved")
    for content in (b"", b"something else", saved._MAGIC, saved._MAGIC + b"\xff" * 8):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a saved prefix cache|header is damaged"):
            strategy.load(path)
    strategy.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        strategy.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    strategy.check_integrity()


def test_a_failed_copy_leaves_no_block_behind(tmp_path, monkeypatch):
    path = tmp_path / "saved"
    filled().save(path)
    strategy = build("prefix", DEEP, num_blocks=60, block_size=4)

    def fail(blocks, data):
        raise RuntimeError("as if the device was lost")

    monkeypatch.setattr(strategy.placement, "write_blocks", fail)
    with pytest.raises(RuntimeError, match="as if"):
        strategy.load(path)
    strategy.check_integrity()
    assert strategy.stats()["blocks_free"] == 60 and strategy.sharing.tree() == ""


# --- fan-out: one history, many candidates


def group_tables(rows, width=8):
    tables = np.full((len(rows), width), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        tables[index, : len(row)] = row
    return tables


@pytest.mark.parametrize(
    ("rows", "past_lens", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2, 5]], [6, 6, 6], [(0, 3, 4)]),
        ([[1, 2, 3], [4, 5, 6]], [6, 6], []),
        ([[1, 2, 3], [1, 2, 3]], [3, 6], [(0, 2, 2)]),  # the second block of the first row is partly new
        ([[1, 2, 3], [1, 2, 4], [7, 8], [7, 8]], [6, 6, 4, 4], [(0, 2, 4), (2, 4, 4)]),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 7], [1, 7, 8]], [10, 10, 4, 6], [(0, 2, 8), (2, 4, 4)]),
        ([[1, 2, 3], [1, 2, 4], [1, 5, 6], [1, 5, 7]], [6] * 4, [(0, 2, 4), (2, 4, 4)]),  # 8 spared, 6 as one
        ([[1, 2], [1, 3], [1, 4], [1, 5, 5], [1, 5, 6]], [4, 4, 4, 6, 6], [(0, 5, 2)]),  # 8 spared, 4 as a pair
        ([[-1, 2, 3], [-1, 2, 3]], [6, 6], []),  # out of the window
        ([[-1, 2, 3], [1, 2, 3], [1, 2, 3]], [6] * 3, [(1, 3, 6)]),
        ([[1, 2]], [4], []),
    ],
)
def test_rows_that_begin_alike_form_groups(monkeypatch, rows, past_lens, expected):
    monkeypatch.setattr(plan, "MIN_TOKENS_SHARED", 2)
    monkeypatch.setattr(plan, "MIN_TOKENS_SPARED", 2)
    assert plan.find_groups(group_tables(rows), past_lens, block_size=2) == expected


def test_groups_are_formed_where_they_pay(monkeypatch):
    block_size = plan.MIN_TOKENS_SHARED // 4
    worth = -(-plan.MIN_TOKENS_SPARED // plan.MIN_TOKENS_SHARED) + 1
    for num_rows, num_blocks, expected in [(worth, 4, 1), (worth - 1, 4, 0), (10 * worth, 3, 0), (2, 4 * worth, 1)]:
        rows = group_tables([list(range(num_blocks))] * num_rows, width=num_blocks)
        assert len(plan.find_groups(rows, [num_blocks * block_size] * num_rows, block_size)) == expected


@pytest.mark.parametrize("name", ["prefix", "prefix+int8"])
@pytest.mark.parametrize("chunk", [12, 400])
def test_candidates_read_the_history_once(monkeypatch, name, chunk):
    """Tokens as without groups, and the shared blocks are read once a step."""
    history = STEM * 3
    requests = [Request([*history, *[i] * (i % 7 + 1)], max_new_tokens=6, n=1 + i % 2, seed=i) for i in range(20)]
    groups, plans = [], []
    fill = plan.PlanBuffer.fill

    def record(self, *args):
        plans.append(fill(self, *args))
        groups.extend(plans[-1].row_groups)
        return plans[-1]

    monkeypatch.setattr(plan.PlanBuffer, "fill", record)
    results = []
    for limit in (4, 10**9):
        monkeypatch.setattr(plan, "MIN_TOKENS_SHARED", limit)
        monkeypatch.setattr(plan, "MIN_TOKENS_SPARED", limit)
        strategy = build(name, DEEP, num_blocks=200, block_size=4)
        strategy.preload(history)
        runner = Runner(DEEP, strategy, max_num_seqs=30, max_batch_tokens=30 + chunk)
        results.append([result.token_ids for result in runner.generate(requests)])
        strategy.check_integrity()
        if limit == 4:
            assert max(group.last_row - group.first_row for group in groups) > 10
            assert {group.num_tokens for group in groups} >= {148}, "all full blocks of the history"
            for made in plans:
                for index, group in enumerate(made.row_groups):
                    assert tuple(made.groups[index].tolist()) == group
                    assert (made.shared_lens[group.first_row : group.last_row] == group.num_tokens).all()
                assert not made.groups[len(made.row_groups) :].any()
            groups.clear()
    assert not groups, "10**9 tokens are never spared"
    assert results[0] == results[1]
    if name == "prefix":
        assert results[0] == baseline_tokens(DEEP, requests)


def test_candidates_of_two_histories_are_brought_together(monkeypatch):
    """They arrive by turns; a decode step reads each history once."""
    monkeypatch.setattr(plan, "MIN_TOKENS_SHARED", 4)
    monkeypatch.setattr(plan, "MIN_TOKENS_SPARED", 4)
    histories = [STEM * 2, STEM[::-1] * 2]
    requests = [Request([*histories[i % 2], i + 1], max_new_tokens=4) for i in range(8)]
    groups, fill = [], plan.PlanBuffer.fill

    def record(self, *args):
        made = fill(self, *args)
        if made.num_decodes == len(requests):
            groups.append([group[:2] for group in made.row_groups])
        return made

    monkeypatch.setattr(plan.PlanBuffer, "fill", record)
    strategy = build("prefix", DEEP, num_blocks=200, block_size=4)
    for history in histories:
        strategy.preload(history)
    results = Runner(DEEP, strategy, max_num_seqs=8).generate(requests)
    steps = groups[1:]  # before them the one new token of each prompt, in the order of arrival
    assert len(steps) == 3 and all(found == [(0, 4), (4, 8)] for found in steps)
    assert [result.token_ids for result in results] == baseline_tokens(DEEP, requests)
