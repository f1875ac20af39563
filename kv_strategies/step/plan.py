"""The plan: what one forward pass needs to know about where its tokens live.

The control plane (Python integers, once a step) writes it; the data plane (kernels, once a layer) reads it. All
tensors are packed: T query tokens of B rows, one row after the other, without padding. Row `b` owns the queries
`cu_seqlens_q[b]:cu_seqlens_q[b + 1]`, and they are the *last* tokens of its context: query `i` of a row of `n` queries
stands at token index `context_lens[b] - n + i` of that row and sees all tokens up to and including itself. Indices
count what is stored of a row. Positions, by which queries and keys are rotated, count what the row has seen, and run
ahead of them once tokens have been evicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Stands in a block table where a block was freed (out of the window). Never read: the kernels mask by token index.
NULL_BLOCK = -1
#: Stands in a slot mapping where a token must not be stored (the padding rows of a CUDA graph).
NULL_SLOT = -1
#: Stands for the ring of a row whose queries nobody asks for.
NULL_RING = -1
#: The tensors of a plan, in the order of `Plan`.
PLAN_TENSORS = (
    "cu_seqlens_q",
    "context_lens",
    "positions",
    "slot_mapping",
    "query_slots",
    "block_tables",
    "groups",
    "shared_lens",
)
#: Of the queries of a row the last so many are kept, where somebody asks for them (`rings.py`).
RING_SIZE = 64
#: Rows that begin with the same blocks are read as one group where that spares reading so many tokens of a layer. Below
#: it, one more part to merge costs more (an estimate: 16 KiB a token and layer at 3 TB/s against 20 us).
MIN_TOKENS_SPARED = 4096
#: And only where the common start has so many tokens.
MIN_TOKENS_SHARED = 256


class LayerStore(NamedTuple):
    """The K and V of one layer as the kernels see them: N blocks of `block_size` tokens, any strides but the last.

    `k_scale` and `v_scale` are there only where a codec stores K and V in 8 bits (one scale a token and head).
    """

    k: Tensor  # [N, Hkv, block_size, D]
    v: Tensor  # [N, Hkv, block_size, D]
    k_scale: Tensor | None = None  # [N, Hkv, block_size]
    v_scale: Tensor | None = None  # [N, Hkv, block_size]

    @property
    def block_size(self) -> int:
        return self.k.shape[2]


class Row(NamedTuple):
    """One row of a forward, as the control plane says it: where its tokens live, and how many of them are new."""

    blocks: np.ndarray  # [n] int32 block ids in the order of the tokens, NULL_BLOCK where freed
    num_tokens: int  # those that the blocks hold, the new ones included
    num_new: int  # the last ones, queries of this forward
    num_evicted: int = 0  # tokens before them that are no longer stored: positions run so far ahead of indices
    ring: int = NULL_RING  # which ring takes in the last of the queries (`rings.py`)


class Group(NamedTuple):
    """Rows whose first `num_tokens` tokens are in the same blocks: a multiple of block_size, none of them new.

    All queries of the group see all of these tokens, so attention may read them once for all (cascade; Juravsky
    et al., Hydragen, 2024, arXiv 2402.05099) and merge each row's private rest by log-sum-exp:

        rows first..last - 1    [ shared, read once ][ private 0 ]
                                                     [ private 1 ]
    """

    first_row: int
    last_row: int  # one after the last
    num_tokens: int


@dataclass
class Plan:
    """One forward pass. Device tensors for the kernels, host integers for decisions about shapes (no sync needed)."""

    cu_seqlens_q: Tensor  # [B + 1] int32
    context_lens: Tensor  # [B] int32, tokens including those of this step; 0 for a padding row of a CUDA graph
    positions: Tensor  # [T] int64, of each query token: its index in its row, and the tokens evicted before it
    slot_mapping: Tensor  # [T] int64, block * block_size + offset, NULL_SLOT writes nowhere
    block_tables: Tensor  # [B, max_blocks] int32, NULL_BLOCK where freed or beyond the context

    query_lens: list[int]  # [B] on the host
    row_lens: list[int]  # [B] on the host: upper bounds of context_lens (equal to them outside a CUDA graph)
    num_decodes: int  # the first num_decodes rows have exactly one query each; the rest have any number
    # What may be read once for several rows. A kernel is free not to, with the same result: under a window none does.
    # On the host, disjoint, in the order of the rows. In a CUDA graph a bound as row_lens is: a group of all rows, if
    # there may be any, and no row reads more than row_lens - num_tokens by itself.
    row_groups: list[Group] = field(default_factory=list)
    groups: Tensor | None = None  # [B // 2 or 1, 3] int32, the same on the device, zeros where there are fewer
    shared_lens: Tensor | None = None  # [B] int32, num_tokens of the group that a row is in, 0 for none
    # [T] int64, ring * RING_SIZE + position % RING_SIZE, NULL_SLOT where the query is not kept (`rings.py`).
    query_slots: Tensor | None = None
    is_replayed: bool = False  # by a CUDA graph: what its launches cost the host does not matter
    # [T] int64, how far each token stands from the first of its row by the positions that were given, which may jump;
    # None where that is its index.
    distances: Tensor | None = None
    host_tables: np.ndarray | None = None  # [B, max_blocks] the block tables on the host, for who moves blocks
    buffer: PlanBuffer | None = None  # whose memory the tensors are
    scratch: dict = field(default_factory=dict)  # what a kernel derives from the plan once and every layer uses

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.positions.shape[0]

    @cached_property
    def private_lens(self) -> list[int]:
        """[B] on the host: upper bounds of the tokens that no group reads for a row."""
        lens = list(self.row_lens)
        for group in self.row_groups:
            for row in range(group.first_row, group.last_row):
                lens[row] -= group.num_tokens
        return lens

    @property
    def device(self) -> torch.device:
        return self.positions.device

    def on(self, device: torch.device) -> Plan:
        """The plan for a layer that lives on another device: one copy for all layers there."""
        if device == self.device:
            return self
        if device not in self.scratch:
            distances = None if self.distances is None else self.distances.to(device)
            tensors = self.buffer.copied_to(device)
            self.scratch[device] = replace(self, **tensors, distances=distances, scratch={})
        return self.scratch[device]

    def once(self, name: object, make: Callable[[], object]) -> object:
        """`make()`, kept for all layers. A graph capture makes its own, inside the graph, so that a replay computes it
        from that step's values.
        """
        key = (name, self.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        made = self.scratch.get(key)
        if made is None:
            made = self.scratch[key] = make()
        return made


class PlanBuffer:
    """The memory of a plan on one device: filled by numpy on the host, sent in one copy.

    Keep the buffer and fill it again for a CUDA graph, whose addresses may not change; make a new one of the exact
    size otherwise.

    Args:
        num_rows, num_tokens, max_blocks: B, T and the width of the block tables.
        block_size: tokens a block.
        extra: further integers that travel along, name -> number of int64 values (the runner's token ids, say).
    """

    def __init__(
        self,
        device: torch.device,
        num_rows: int,
        num_tokens: int,
        max_blocks: int,
        block_size: int,
        extra: dict[str, int] | None = None,
    ):
        self.device, self.block_size = device, block_size
        self.fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "positions": ((num_tokens,), torch.int64),
            "slot_mapping": ((num_tokens,), torch.int64),
            "query_slots": ((num_tokens,), torch.int64),
            **{name: ((size,), torch.int64) for name, size in (extra or {}).items()},
            "cu_seqlens_q": ((num_rows + 1,), torch.int32),
            "context_lens": ((num_rows,), torch.int32),
            "block_tables": ((num_rows, max_blocks), torch.int32),
            "groups": ((max(1, num_rows // 2), len(Group._fields)), torch.int32),
            "shared_lens": ((num_rows,), torch.int32),
        }
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.fields.values())
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.tensors = self._views(self._bytes)

    def fill(self, rows: Sequence[Row], extra: dict[str, object] | None = None) -> Plan:
        """The plan of a forward over the new tokens of each row.

        Rows with one query come first. Rows of no tokens are padding, as are those that the buffer has beyond the given
        ones: they read nothing and store nothing.

        Args:
            extra: values for the fields declared as extra, array-likes; shorter ones are padded with their last value.
        """
        on_host = self._bytes
        if self.device.type == "cuda":  # torch's pinned allocator keeps the memory until the copy has ended
            on_host = torch.empty(self._bytes.shape, dtype=torch.uint8, pin_memory=True)
        arrays = {name: view.numpy() for name, view in self._views(on_host).items()}
        num_rows, num_tokens = len(arrays["context_lens"]), len(arrays["positions"])
        query_lens = [row.num_new for row in rows]
        total, size = sum(query_lens), self.block_size
        assert len(rows) <= num_rows and total <= num_tokens, "the plan does not fit its buffer"

        ends = np.cumsum(query_lens, dtype=np.int64)
        arrays["cu_seqlens_q"][0] = 0
        arrays["cu_seqlens_q"][1 : len(rows) + 1] = ends
        arrays["cu_seqlens_q"][len(rows) + 1 :] = total
        arrays["context_lens"][len(rows) :] = 0
        arrays["block_tables"].fill(NULL_BLOCK)
        arrays["positions"][total:] = 0
        arrays["slot_mapping"][total:] = NULL_SLOT
        arrays["query_slots"].fill(NULL_SLOT)
        begin = 0
        for number, (blocks, stop, num_new, num_evicted, ring) in enumerate(rows):
            end = begin + num_new
            arrays["context_lens"][number] = stop
            arrays["block_tables"][number, : len(blocks)] = blocks
            if num_new and not stop:  # padding, in the place of a row with one query
                arrays["positions"][begin], arrays["slot_mapping"][begin] = 0, NULL_SLOT
            elif num_new == 1:  # a decode row: scalars, since a numpy call costs more than the arithmetic
                block, rest = divmod(stop - 1, size)
                arrays["positions"][begin] = stop - 1 + num_evicted
                arrays["slot_mapping"][begin] = int(blocks[block]) * size + rest
            else:
                index = np.arange(stop - num_new, stop)
                arrays["positions"][begin:end] = index + num_evicted
                arrays["slot_mapping"][begin:end] = blocks[index // size].astype(np.int64) * size + index % size
            if ring >= 0:
                kept = arrays["positions"][max(begin, end - RING_SIZE) : end]
                arrays["query_slots"][end - len(kept) : end] = ring * RING_SIZE + kept % RING_SIZE
            begin = end
        past_lens = [row.num_tokens - row.num_new for row in rows]
        groups = find_groups(arrays["block_tables"], past_lens, size) if len(rows) > 1 else []
        arrays["groups"].fill(0)
        arrays["shared_lens"].fill(0)
        for index, group in enumerate(groups):
            arrays["groups"][index] = group
            arrays["shared_lens"][group.first_row : group.last_row] = group.num_tokens
        for name, values in (extra or {}).items():
            array, values = arrays[name], np.asarray(values)
            array[: len(values)] = values
            array[len(values) :] = values[-1]
        if on_host is not self._bytes:
            self._bytes.copy_(on_host, non_blocking=True)

        return Plan(
            **{name: self.tensors[name] for name in PLAN_TENSORS},
            query_lens=query_lens,
            row_lens=[row.num_tokens for row in rows],
            row_groups=groups,
            host_tables=arrays["block_tables"],
            buffer=self,
            num_decodes=next((i for i, query_len in enumerate(query_lens) if query_len != 1), len(rows)),
        )

    def copied_to(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors of the plan on another device."""
        views = self._views(self._bytes.to(device, non_blocking=True))
        return {name: views[name] for name in PLAN_TENSORS}

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        views, offset = {}, 0
        for name, (shape, dtype) in self.fields.items():  # int64 fields first, so that all are aligned
            size = math.prod(shape) * dtype.itemsize
            views[name] = buffer[offset : offset + size].view(dtype).view(shape)
            offset += size
        return views


def find_groups(block_tables: np.ndarray, past_lens: list[int], block_size: int) -> list[Group]:
    """Neighbouring rows to be read as groups: all of a stretch, or the stretches between its weakest links.

    Args:
        block_tables: [B or more, max_blocks].
        past_lens: [B] tokens of each row that are not new in this step.
    """
    above, below = block_tables[: len(past_lens) - 1], block_tables[1 : len(past_lens)]
    if not ((above[:, 0] == below[:, 0]) & (above[:, 0] != NULL_BLOCK)).any():
        return []  # the usual case
    differs = (above != below) | (above == NULL_BLOCK)
    common = np.where(differs.any(axis=1), differs.argmax(axis=1), differs.shape[1])  # [B - 1] blocks, of neighbours
    past = np.array(past_lens)
    common = np.minimum(common, np.minimum(past[:-1], past[1:]) // block_size) * block_size

    def choose(first: int, last: int) -> tuple[int, list[Group]]:
        """Tokens spared among rows first..last - 1, and the groups that spare them."""
        between = common[first : last - 1]
        longest = int(between.max(initial=0))
        if longest < MIN_TOKENS_SHARED or longest * len(between) < MIN_TOKENS_SPARED:
            return 0, []
        shortest = int(between.min())
        spared = shortest * len(between) if shortest >= MIN_TOKENS_SHARED else 0
        whole = (spared, [Group(first, last, shortest)]) if spared >= MIN_TOKENS_SPARED else (0, [])
        if shortest == longest:
            return whole
        cuts = [first, *(np.flatnonzero(between == shortest) + first + 1).tolist(), last]
        pieces = [choose(low, high) for low, high in pairwise(cuts)]
        parts = sum(spared for spared, _ in pieces), [group for _, groups in pieces for group in groups]
        return max(whole, parts, key=lambda choice: choice[0])

    return choose(0, len(past_lens))[1]
