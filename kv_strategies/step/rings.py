"""Rings of queries: the last of a row's, kept as attention passes for who asks what they looked at (`evict.py`).

A row under way has a ring of RING_SIZE places for each layer; the query at position p goes to place p % RING_SIZE, over
the one that stood there. To the kernel that stores K and V a ring is a block of RING_SIZE tokens with as many heads as
there are queries, so it stores these as well, also in a CUDA graph.

Costs RING_SIZE queries a layer for each row whose prompt is being computed (Llama-2-7B: 16.8 MB), and where rows are
compacted as they grow, for each row. Memory is added as rows ask for it, and stays.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .plan import RING_SIZE, LayerStore
from .store import KVShape

_LEAST = 4  # rings that are set aside at a time


class Ring:
    """One ring, free again when no table refers to it."""

    def __init__(self, number: int, free: list[int]):
        self.number = number
        self.is_shared = False  # whether the row was forked: who writes next takes one of its own
        self._first = self._end = 0  # positions of the queries that it holds, as far as it has room for them
        weakref.finalize(self, free.append, number).atexit = False

    def extend(self, position: int, count: int) -> None:
        """Queries at this position and behind it are about to come, where they were before as well after a crop."""
        self._first = min(self._oldest, position)
        self._end = position + count

    def newest(self, position: int, count: int) -> range:
        """Of the `count` positions before this one, those whose queries are here."""
        return range(min(max(self._oldest, position - count), position), position)

    @property
    def _oldest(self) -> int:
        """Of the queries that stand here; those before have been written over."""
        return max(self._first, self._end - RING_SIZE)


class QueryRings:
    """All rings of a strategy, on the devices of the layers."""

    def __init__(self, shape: KVShape):
        self._shape = shape
        self._layers: list[Tensor] = [self._memory(0, device) for device in shape.layer_devices]  # [n, Hq, size, D]
        self.free: list[int] = []
        self.num_growths = 0  # a captured step reads and writes where the rings lay

    def take(self, count: int) -> list[Ring]:
        """Rings that nobody has; more memory is set aside where there are too few."""
        lacking = count - len(self.free)
        if lacking > 0:
            before = len(self._layers[0])
            more = max(lacking, before, _LEAST)
            with torch.inference_mode(False):  # what is made in that mode could not be written outside of it
                self._layers = [torch.cat((old, self._memory(more, old.device))) for old in self._layers]
            self.free += range(before, before + more)
            self.num_growths += 1
        return [Ring(self.free.pop(), self.free) for _ in range(count)]

    def copy(self, source: Ring, target: Ring) -> None:
        """Copy what a ring holds, of all layers."""
        for memory in self._layers:
            memory[target.number] = memory[source.number]
        target._first, target._end = source._first, source._end

    def layer(self, layer_idx: int) -> LayerStore:
        """Where the queries [T, Hq, D] of a layer go, K and V being the same."""
        memory = self._layers[layer_idx]
        return LayerStore(memory, memory)

    def read(self, ring: Ring, layer_ids: Sequence[int], num_seen: int, count: int) -> Tensor:
        """The last queries [l, Hq, count or fewer, D] of a row that has seen so many tokens, the newest last, of layers
        on one device.
        """
        layers, newest = torch.stack([self._layers[i][ring.number] for i in layer_ids]), ring.newest(num_seen, count)
        places = torch.arange(newest.start, newest.stop, device=layers.device) % RING_SIZE
        return layers[:, :, places]

    @property
    def num_bytes(self) -> int:
        return sum(memory.numel() * memory.element_size() for memory in self._layers)

    def check_integrity(self, held: Iterable[Ring]) -> None:
        """Raises AssertionError where a ring is lost or has two owners."""
        used = {id(ring): ring.number for ring in held}.values()
        assert sorted([*self.free, *used]) == list(range(len(self._layers[0]))), "a ring is lost, or has two owners"

    def _memory(self, count: int, device: torch.device) -> Tensor:
        shape = self._shape
        return torch.zeros(count, shape.num_heads, RING_SIZE, shape.head_dim, dtype=shape.dtype, device=device)


def ring_bytes(shape: KVShape, num_rows: int) -> int:
    """Of all layers, for so many rows at once that are known ahead."""
    numbers = len(shape.layer_devices) * shape.num_heads * RING_SIZE * shape.head_dim
    return max(_LEAST, num_rows) * numbers * shape.dtype.itemsize
