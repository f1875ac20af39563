"""The block pool against a reference model: tables as plain lists of token values."""

from __future__ import annotations

import pytest
from common import slots
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kv_strategies.paged import BlockPool, BlockTable, OutOfBlocks
from kv_strategies.step.plan import NULL_BLOCK


class PoolMachine(RuleBasedStateMachine):
    """Every table must read back the tokens appended to it, whatever others did to shared blocks meanwhile."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.sampled_from([1, 2, 3, 7]))
    def start(self, num_blocks, block_size):
        self.pool = BlockPool(num_blocks, block_size)
        self.memory = [None] * (num_blocks * block_size)  # what each slot holds
        self.expected: dict[BlockTable, list[int]] = {}
        self.next_token = 0

    @rule()
    def admit(self):
        self.expected[BlockTable(self.pool)] = []

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), count=st.integers(0, 9))
    def append(self, data, count):
        table = data.draw(st.sampled_from(list(self.expected)))
        needed, free = table.num_new_blocks(count), self.pool.num_free
        before = (table.num_tokens, table.blocks.tolist(), list(self.pool.ref_counts))
        if needed > free:
            with pytest.raises(OutOfBlocks):
                table.append(count)
            assert before == (table.num_tokens, table.blocks.tolist(), self.pool.ref_counts)
            return
        self.append_tokens(table, count)
        assert self.pool.num_free == free - needed

    def append_tokens(self, table, count):
        for source, destination in table.append(count):
            size = self.pool.block_size
            self.memory[destination * size : (destination + 1) * size] = self.memory[
                source * size : (source + 1) * size
            ]
        tokens = list(range(self.next_token, self.next_token + count))
        self.next_token += count
        for slot, token in zip(slots(table, table.num_tokens - count, table.num_tokens), tokens, strict=True):
            self.memory[slot] = token
        self.expected[table] += tokens

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), count=st.integers(0, 4))
    def append_to_several(self, data, count):
        """They take what the pool says, one after the other, to the block."""
        tables = data.draw(st.lists(st.sampled_from(list(self.expected)), unique=True, max_size=3))
        needed, free = self.pool.num_new_blocks([(table, count) for table in tables]), self.pool.num_free
        if needed > free:
            return
        for table in tables:
            self.append_tokens(table, count)
        assert self.pool.num_free == free - needed

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def fork(self, data):
        table = data.draw(st.sampled_from(list(self.expected)))
        free = self.pool.num_free
        self.expected[table.fork()] = list(self.expected[table])
        assert self.pool.num_free == free, "forking takes no memory"

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def truncate(self, data):
        table = data.draw(st.sampled_from(list(self.expected)))
        keep = data.draw(st.integers(0, table.num_tokens))
        table.truncate(keep)
        del self.expected[table][keep:]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def release(self, data):
        table = data.draw(st.sampled_from(list(self.expected)))
        table.release()
        table.release()
        del self.expected[table]

    @invariant()
    def reads_back(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        for table, tokens in self.expected.items():
            assert [self.memory[slot] for slot in slots(table, 0, table.num_tokens)] == tokens


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_dropped_blocks_return_to_the_pool_once():
    pool = BlockPool(8, 4)
    table = BlockTable(pool)
    table.append(30)
    table.drop(((1, 3),))
    table.drop(((1, 5),))
    table.drop(((1, 2), (3, 5)))
    assert table.blocks[1:5].tolist() == [NULL_BLOCK] * 4
    assert pool.num_free == 4
    twin = table.fork()
    pool.check_integrity()
    twin.release()
    table.release()
    assert pool.num_free == 8


def test_neighbours_are_preferred():
    pool = BlockPool(8, 1)
    a, b = BlockTable(pool), BlockTable(pool)
    a.append(2)
    b.append(2)
    a.release()
    b.append(2)
    assert b.blocks.tolist() == [2, 3, 4, 5]


def test_what_one_table_gave_back_is_one_run_for_the_next():
    pool = BlockPool(num_blocks=12, block_size=2)
    for num_tokens in (15, 20, 11, 24):
        table = BlockTable(pool)
        table.append(num_tokens)
        blocks = table.blocks.tolist()
        assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        table.release()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_an_empty_pool_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(num_blocks, block_size)


def test_truncate_refuses_to_grow():
    table = BlockTable(BlockPool(4, 4))
    table.append(5)
    with pytest.raises(ValueError, match="cannot keep 6 of 5"):
        table.truncate(6)
