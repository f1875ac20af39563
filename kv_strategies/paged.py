"""Paged: where is token t?

A cache that keeps every request in one piece of memory must reserve its longest possible length, and most of that is
never used. PagedAttention (Kwon et al., SOSP 2023, arXiv 2309.06180) cuts the memory into blocks of a few tokens and
gives a request a *block table* instead: token `t` lives in block `table[t // block_size]` at offset `t % block_size`,
as in a page table.

    request A, 37 tokens    table A: [ 4, 7, 1 ]        pool: [ . A . . A . . A ]   block_size 16
    token 20 -> block table[1] = 7, offset 4 -> slot 7 * 16 + 4 = 116

Saves: only the last block of a request is partly empty (under 4 % waste at block_size 16 and usual lengths), and
requests that share tokens share blocks by reference count; the first to write into a shared block copies it (copy on
write), so parallel samples and beams cost one block each, not one prompt each. Costs: one indirection a block in the
attention kernel.

Everything here is Python integers, once a step. The tensors live in `BlockStore`.

    python -m kv_strategies.paged      prints block tables as two samples grow out of one prompt
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .step.plan import NULL_BLOCK, NULL_RING, Row

if TYPE_CHECKING:
    from .step.rings import Ring

#: First and last + 1 of stretches of a block table.
Ranges = tuple[tuple[int, int], ...]


class OutOfBlocks(RuntimeError):
    """The pool has fewer free blocks than a forward needs. Nothing was changed."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens: which are free, and how many hold on to each of the others.

    A block is free when its reference count is 0. Tables hold references, and so may a sharing policy, which keeps
    blocks for later requests; a kept block is idle while nobody else holds it. Allocation prefers the block after the
    one given, which keeps neighbours in memory where it costs nothing.
    """

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one token, got {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts = [0] * num_blocks
        self.tables: weakref.WeakSet[BlockTable] = weakref.WeakSet()
        self.idle: dict[int, None] = {}  # an ordered set: longest idle first
        self.kept: set[int] = set()  # for later requests
        self.content: int | None = None  # the number of the model's state (`follow`); None where nobody tells
        self._free = dict.fromkeys(range(num_blocks))  # an ordered set: first in, first out

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self, after: int = NULL_BLOCK) -> int:
        """A free block, now with one reference; the one following `after` if that is free."""
        return self.allocate_run(1, after)[0]

    def allocate_run(self, count: int, after: int = NULL_BLOCK) -> list[int]:
        """Free blocks, each the one following the last, or `after`, if that is free.

        Raises:
            OutOfBlocks: there are fewer; nothing was changed.
        """
        free, ref_counts, blocks = self._free, self.ref_counts, []
        if count > len(free):
            raise OutOfBlocks(f"{count} more blocks are needed, {len(free)} of {self.num_blocks} are free")
        block = after
        for num_left in range(count, 0, -1):
            if block != NULL_BLOCK and block + 1 in free:
                block += 1
            else:  # tables give back their last block first: start where the blocks before it are free as well
                block = next(iter(free))
                first = block - num_left + 1
                while block > first and block - 1 in free:
                    block -= 1
            del free[block]
            ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, block: int) -> None:
        assert self.ref_counts[block] > 0, f"block {block} is free"
        self.ref_counts[block] += 1
        self.idle.pop(block, None)

    def follow(self, content: int) -> None:
        """The model has changed, to the state of this number: what tables hold is of the states before."""
        for table in self.tables:
            table.note(self.content)
        self.content = content

    def num_new_blocks(self, rows: Sequence[tuple[BlockTable, int]]) -> int:
        """Blocks that so many more tokens take in each table, one after the other. Where all who hold a block write to
        it, the last of them makes no copy.
        """
        writers = Counter(int(table.blocks[-1]) for table, num_tokens in rows if num_tokens and table._must_copy_last())
        spared = sum(count == self.ref_counts[block] for block, count in writers.items())
        return sum(table.num_new_blocks(num_tokens) for table, num_tokens in rows) - spared

    def release(self, block: int) -> None:
        assert self.ref_counts[block] > 0, f"block {block} is free already"
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            self._free[block] = None
        elif self.ref_counts[block] == 1 and block in self.kept:
            self.idle[block] = None

    def keep(self, block: int) -> None:
        """Hold a block for later requests: one more reference."""
        self.share(block)
        self.kept.add(block)

    def discard(self, block: int) -> None:
        """Stop keeping a block."""
        self.kept.remove(block)
        self.idle.pop(block, None)
        self.release(block)

    def check_integrity(self, other_holders: Iterable[int] = ()) -> None:
        """Every reference is held by somebody, and every free block by nobody.

        Args:
            other_holders: blocks held by others than tables (a prefix cache), one entry a reference.

        Raises:
            AssertionError: an invariant is broken; this is a bug of ours.
        """
        counts = [0] * self.num_blocks
        for table in self.tables:
            assert len(table.blocks) == -(-table.num_tokens // self.block_size), "a table is longer than its tokens"
            held = [block for block in table.blocks.tolist() if block != NULL_BLOCK]
            assert all(0 <= block < self.num_blocks for block in held), "a table names blocks that there are not"
            assert len(set(held)) == len(held), "a table holds a block twice"
            for block in held:
                counts[block] += 1
        for block in other_holders:
            counts[block] += 1
        assert counts == self.ref_counts, "reference counts differ from the references held"
        assert set(self._free) == {b for b, count in enumerate(counts) if count == 0}, "the free list is wrong"
        assert set(self.idle) == {b for b in self.kept if counts[b] == 1}, "the idle list is wrong"


class BlockTable:
    """The blocks of one request, in the order of its tokens, and how many tokens they hold."""

    def __init__(self, pool: BlockPool, blocks: Iterable[int] = (), num_tokens: int = 0):
        """Takes over one reference to each of `blocks`, which hold `num_tokens` tokens."""
        self.pool = pool
        self.num_tokens = num_tokens
        self._ids = np.array(list(blocks), dtype=np.int32)
        self._size = len(self._ids)
        self.num_cut = 0  # tokens that the row has seen and that no longer stand in this table (`cut`, `compact`)
        self.num_evicted = 0  # those of them that left gaps between positions (`compact`)
        self.num_settled = 0  # tokens seen when it was last compacted: it cannot go back behind them
        self.cap: int | None = None  # tokens that a compaction leaves; None before the first
        self.ring: Ring | None = None  # where its last queries are kept (`step/rings.py`)
        self._num_appended = num_tokens  # ever
        self._content: int | None = None  # the model's state that computed its first token, once that has changed
        self._num_noted = 0  # of `_num_appended`, when it last did; 0 before
        self._is_mixed = False  # whether different states have computed its tokens
        self._dropped: Ranges = ()  # the last that `drop` was given
        pool.tables.add(self)

    @property
    def blocks(self) -> np.ndarray:
        """[num_blocks] int32, NULL_BLOCK where freed. A view: valid until the table changes."""
        return self._ids[: self._size]

    def num_new_blocks(self, num_tokens: int) -> int:
        """Blocks that `append(num_tokens)` will take from the pool."""
        if num_tokens == 0:
            return 0
        wanted = -(-(self.num_tokens + num_tokens) // self.pool.block_size) - self._size
        return wanted + self._must_copy_last()

    def append(self, num_tokens: int) -> list[tuple[int, int]]:
        """Make room for `num_tokens` more tokens.

        Returns:
            (source, destination) blocks to copy before writing: the copy on write of a shared last block.

        Raises:
            OutOfBlocks: not enough free blocks; the table is as it was.
        """
        pool, size = self.pool, self._size
        needed = self.num_new_blocks(num_tokens)
        if needed > pool.num_free:
            raise OutOfBlocks(f"{num_tokens} more tokens need {needed} blocks, {pool.num_free} are free")
        if not num_tokens:
            return []
        wanted, must_copy = -(-(self.num_tokens + num_tokens) // pool.block_size), self._must_copy_last()
        if wanted > len(self._ids):
            grown = np.full(max(wanted, 2 * len(self._ids), 8), NULL_BLOCK, dtype=np.int32)
            grown[:size] = self._ids[:size]
            self._ids = grown
        last = int(self._ids[size - 1]) if size else NULL_BLOCK
        taken, copies = pool.allocate_run(needed, after=last), []
        if must_copy:
            copies.append((last, taken.pop(0)))
            self._ids[size - 1] = copies[0][1]
            pool.release(last)
        self._ids[size:wanted] = taken
        self._size = wanted
        self.num_tokens += num_tokens
        self._num_appended += num_tokens
        return copies

    def retract(self, num_tokens: int, copies: Iterable[tuple[int, int]]) -> None:
        """Undo an `append` to a table of `num_tokens` tokens whose copies, those that it returned, were not made."""
        self.truncate(num_tokens)
        for shared, own in copies:
            self.pool.share(shared)
            self.pool.release(own)
            self._ids[self._size - 1] = shared

    def row(self, num_new: int) -> Row:
        """What a forward over the last `num_new` tokens has to know. Valid until the table changes."""
        ring = NULL_RING if self.ring is None else self.ring.number
        return Row(self.blocks, self.num_tokens, num_new, self.num_evicted, ring)

    def fork(self) -> BlockTable:
        """A second table over the same blocks (parallel sample, beam). The first to write copies."""
        twin = self._twin(self.blocks)
        for block in twin.blocks:
            if block != NULL_BLOCK:
                self.pool.share(int(block))
        return twin

    def hollow(self) -> BlockTable:
        """A table like this one without any blocks, to be filled when their contents come back."""
        return self._twin(np.full(self._size, NULL_BLOCK))

    def fill(self, indices: Iterable[int]) -> None:
        """Take a block from the pool for each of these indices of the table.

        Raises:
            OutOfBlocks: there are fewer; nothing was changed.
        """
        indices = list(indices)
        assert (self._ids[indices] == NULL_BLOCK).all(), "there is a block already"
        self._ids[indices] = self.pool.allocate_run(len(indices))

    def truncate(self, num_tokens: int) -> None:
        """Take all tokens after the first `num_tokens` out of the table."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"cannot keep {num_tokens} of {self.num_tokens} tokens")
        wanted = -(-num_tokens // self.pool.block_size)
        self._release(wanted, self._size)
        self._size = wanted
        self.num_tokens = num_tokens
        self._dropped = ()

    def drop(self, ranges: Ranges) -> None:
        """Give back the blocks at indices first..last - 1 of each range; their tokens are never read again."""
        if ranges == self._dropped:
            return  # the usual case: most steps add no block
        for first, last in ranges:
            self._release(first, last)
            self._ids[first:last] = NULL_BLOCK
        self._dropped = ranges

    def own_blocks(self, first: int) -> list[tuple[int, int]]:
        """Take own blocks for those from index `first` on that somebody else holds as well. They are in the table once
        their contents are copied, see `swap`.

        Returns:
            (shared, own) blocks.

        Raises:
            OutOfBlocks: there are fewer; nothing was changed.
        """
        shared = [int(block) for block in self.blocks[first:] if block >= 0 and self.pool.ref_counts[block] > 1]
        return list(zip(shared, self.pool.allocate_run(len(shared)), strict=True))

    def swap(self, copies: Iterable[tuple[int, int]]) -> None:
        """Put own blocks in the place of shared ones."""
        for shared, own in copies:
            self._ids[: self._size][self.blocks == shared] = own
            self.pool.release(shared)

    def cut(self, first: int, last: int) -> None:
        """Close the gap of the dropped blocks first..last - 1: tokens behind it get indices lower by as many tokens.

        Their keys are about to be changed with them, so no block behind the gap may be somebody else's as well.
        """
        assert (self._ids[first:last] == NULL_BLOCK).all(), "only dropped blocks can be cut out"
        assert not self.num_shared(last), "keys that somebody else reads would be turned"
        self._ids = np.delete(self._ids, slice(first, last))
        self._size -= last - first
        self.num_tokens -= (last - first) * self.pool.block_size
        self.num_cut += (last - first) * self.pool.block_size
        self._dropped = ()

    def compact(self, blocks: Sequence[int], num_tokens: int) -> None:
        """Of all tokens, `num_tokens` are left, and lie in `blocks`. Those of them that the table does not hold come
        with a reference; of those that it holds, the others are given back.
        """
        left = set(blocks)
        for block in reversed(self.blocks.tolist()):
            if block not in left:
                self.pool.release(block)
        num_evicted = self.num_tokens - num_tokens
        self._ids, self._size, self._dropped = np.array(blocks, dtype=np.int32), len(blocks), ()
        self.num_tokens = num_tokens
        self.num_cut += num_evicted
        self.num_evicted += num_evicted
        self.num_settled = self.num_seen

    def num_shared(self, first: int) -> int:
        """Blocks at index `first` of the table and behind it that somebody else holds as well."""
        return sum(self.pool.ref_counts[block] > 1 for block in self.blocks[first:] if block != NULL_BLOCK)

    @property
    def num_seen(self) -> int:
        """Tokens of the request so far, those cut out or evicted included."""
        return self.num_tokens + self.num_cut

    @property
    def is_mixed(self) -> bool:
        """Whether another state of the model computed some of its tokens than it is in now. It may come back."""
        return self._is_mixed or (self._num_noted > 0 and self._content != self.pool.content)

    def note(self, content: int | None) -> None:
        """The model is about to leave the state of this number."""
        if not self.num_tokens:
            return
        if not self._num_noted:
            self._content = content
        elif self._num_appended != self._num_noted and self._content != content:
            self._is_mixed = True
        self._num_noted = self._num_appended

    @property
    def num_live(self) -> int:
        """Tokens that are still stored."""
        return self.num_tokens - int((self.blocks == NULL_BLOCK).sum()) * self.pool.block_size

    def release(self) -> None:
        """Give everything back. May be called twice."""
        self.truncate(0)
        self.num_cut = self.num_evicted = self.num_settled = 0
        self.cap, self.ring = None, None
        self._num_appended, self._content, self._num_noted, self._is_mixed = 0, None, 0, False

    def _twin(self, blocks: np.ndarray) -> BlockTable:
        twin = BlockTable(self.pool, blocks, self.num_tokens)
        twin.num_cut, twin._dropped = self.num_cut, self._dropped
        twin._num_appended, twin._num_noted = self._num_appended, self._num_noted
        twin._content, twin._is_mixed = self._content, self._is_mixed
        twin.num_evicted, twin.num_settled, twin.cap = self.num_evicted, self.num_settled, self.cap
        twin.ring = self.ring
        if self.ring is not None:
            self.ring.is_shared = True
        return twin

    def _must_copy_last(self) -> bool:
        """Whether the next token falls into a block that somebody else holds as well."""
        if self.num_tokens % self.pool.block_size == 0:
            return False
        return self.pool.ref_counts[self._ids[self._size - 1]] > 1

    def _release(self, first: int, last: int) -> None:
        blocks = self._ids[first:last].tolist()
        for block in reversed(blocks):  # the last first: of what is kept for others, the start stays longest
            if block != NULL_BLOCK:
                self.pool.release(block)


def main() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)

    def show(event: str, **tables: BlockTable) -> None:
        rows = "   ".join(f"{name}: {table.num_tokens:2} tokens in {table.blocks}" for name, table in tables.items())
        print(f"{event:<34} {rows}   free {pool.num_free}")

    print("A pool of 8 blocks, 4 tokens each.\n")
    a = BlockTable(pool)
    a.append(10)
    show("A: a prompt of 10 tokens", A=a)
    b = a.fork()
    show("B: a second sample, nothing copied", A=a, B=b)
    copies = b.append(1)
    show(f"B writes: copy on write {copies}", A=a, B=b)
    a.append(3)
    show("A grows by 3, in place", A=a, B=b)
    a.release()
    show("A ends; B keeps the shared blocks", A=a, B=b)
    stored, reserved = b.num_tokens, len(b.blocks) * pool.block_size
    print(f"\nWaste: {reserved - stored} of {reserved} slots, never more than a block less one token a request.")
    pool.check_integrity()


if __name__ == "__main__":
    main()
