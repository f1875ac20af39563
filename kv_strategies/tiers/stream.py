"""Streaming: layers that live in host memory pass through a few buffers on the device.

    host      [ layer 0 | layer 1 | layer 2 | ... ]     all blocks of the pool, page-locked
                   |         |         |
    device    [ buffer 0 | buffer 1 ]  |                a block has the same number here and there
                 attends   arriving    waits for buffer 0

While the model works on one layer, the blocks that the next ones will read are on their way. A buffer has room for
every block of the pool, in one layer, so block tables hold for it as they are; what is copied are the blocks in use,
and consecutive ones in one piece. The tokens of this step go to the buffer first and, once their layer has attended,
from there to the host: each token is appended once.

Three lanes: the model's, one that fetches, one that appends; the link works in both directions at once. Marks keep them
in order, and nothing waits on the host, so a step that is launched early starts to fetch early.

A CPU reads host memory where it is (`LayersInPlace`).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..step.plan import Plan
from ..step.store import BlockStore, block_bytes, views_of
from .transfer import Lane, Mark, copy_row, host_memory

#: A gap between blocks in use is copied along where that is cheaper than one more copy.
_GAP_BYTES = 256 << 10


class LayerStream:
    """The layers of one device that live in its host's memory.

    Args:
        planes: name -> (shape of one layer of one block, dtype), those that are streamed.
        num_buffers: layers that are on the device at once.
        in_order: the model's own lane also reads and writes host memory, outside of `open` and `close`.
    """

    def __init__(
        self,
        num_blocks: int,
        num_layers: int,
        planes: dict[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
        *,
        num_buffers: int = 2,
        in_order: bool = False,
    ):
        self.device, self.num_layers, self.num_buffers = device, num_layers, min(num_buffers, num_layers)
        row_bytes = block_bytes(1, planes)
        self.host = host_memory(num_layers, num_blocks, row_bytes, device=device)
        self.buffers = torch.empty(self.num_buffers, num_blocks, row_bytes, dtype=torch.uint8, device=device)
        self.memories = [self.host]
        self.host_bytes, self.device_bytes = self.host.numel(), self.buffers.numel()
        self.planes, buffered = _planes_of(self.host, planes), _planes_of(self.buffers, planes)
        self.host_layers, self.buffer_layers = (
            [{name: plane[:, layer] for name, plane in views.items()} for layer in range(count)]
            for views, count in ((self.planes, num_layers), (buffered, self.num_buffers))
        )
        self.bytes_fetched = self.bytes_appended = 0
        self._block_size = next(iter(planes.values()))[0][1]
        self._token_bytes = row_bytes // self._block_size
        self._gap = _GAP_BYTES // row_bytes
        self._in_order = in_order
        self._main, self._fetching, self._appending = Lane(device, main=True), Lane(device), Lane(device)
        self._stored: list[Mark] = [None] * num_layers  # the host has all tokens of the layer
        self._free: list[tuple[Mark, ...]] = [()] * self.num_buffers  # nobody needs what the buffer holds
        self._plan: Plan | None = None
        self._runs: list[tuple[int, int]] = []  # of the plan: first and last + 1 of the blocks to fetch
        self._under_way: list[tuple[int, int, Mark]] = []  # layer, buffer, when it has arrived
        self._opened: tuple[int, int] | None = None  # layer and buffer
        self._is_appended = False
        self._next_layer = self._next_buffer = 0

    def open(self, layer: int, plan: Plan) -> dict[str, Tensor]:
        """The planes of a layer on the device, with all that its past blocks hold; the next layers set out."""
        if plan is not self._plan or layer == 0:
            self._begin(plan)
        if not self._under_way or self._under_way[0][0] != layer:
            self._under_way, self._next_layer = [], layer
            self._fetch_ahead(1)
        _, buffer, arrived = self._under_way.pop(0)
        self._opened, self._is_appended = (layer, buffer), False
        self._fetch_ahead(self.num_buffers - 1)
        self._main.wait(arrived)
        return self.buffer_layers[buffer]

    def append(self, plan: Plan) -> None:
        """Bring this step's tokens of the open layer to the host."""
        layer, buffer = self._opened
        written = self._main.mark()
        with self._appending as lane:
            lane.wait(written)
            copy_slots(self.buffer_layers[buffer], self.host_layers[layer], plan.slot_mapping)
            self._stored[layer] = lane.mark()
        self._is_appended = True
        self.bytes_appended += plan.num_tokens * self._token_bytes

    def close(self, plan: Plan) -> None:
        """The open layer has attended: its tokens go to the host, and its buffer to a layer further on."""
        layer, buffer = self._opened
        if not self._is_appended:
            self.append(plan)
        self._free[buffer] = self._main.mark(), self._stored[layer]
        self._opened = None
        self._fetch_ahead(self.num_buffers)
        if self._in_order and layer == self.num_layers - 1:
            self.settle()

    def settle(self) -> None:
        """What follows in the model's lane finds all tokens in host memory."""
        self._main.wait(self._appending.mark())

    def touched(self) -> None:
        """The model's lane has written to host memory: nothing is fetched before that is done."""
        self._stored = [self._main.mark()] * self.num_layers
        self._plan = None

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy (source, destination) blocks of all layers, in host memory."""
        self.settle()
        try:
            with self._main:
                for source, destination in copies:
                    copy_row(self.host, source, self.host, destination)
        finally:
            self.touched()

    def _begin(self, plan: Plan) -> None:
        if self._opened is not None:  # a forward that ended in an error
            self._free[self._opened[1]] = (self._main.mark(),)
        self._plan, self._runs, self._under_way, self._next_layer = (
            plan,
            past_runs(plan, self._block_size, self._gap),
            [],
            0,
        )
        self._appending.uses(plan.slot_mapping)
        if self._in_order:
            self._fetching.wait(self._main.mark())

    def _fetch_ahead(self, count: int) -> None:
        """Send layers on their way until so many are."""
        while len(self._under_way) < count and self._next_layer < self.num_layers:
            layer, buffer = self._next_layer, self._next_buffer
            self._next_layer, self._next_buffer = layer + 1, (buffer + 1) % self.num_buffers
            with self._fetching as lane:
                lane.wait(*self._free[buffer], self._stored[layer])
                for first, last in self._runs:
                    self.buffers[buffer, first:last].copy_(self.host[layer, first:last], non_blocking=True)
                self._under_way.append((layer, buffer, lane.mark()))
            self.bytes_fetched += sum(last - first for first, last in self._runs) * self.host.shape[2]


class LayersInPlace:
    """What `LayerStream` is for a GPU, for a model that computes in host memory itself: nothing is copied, and what
    would cross a link is counted.
    """

    device_bytes = 0

    def __init__(
        self,
        num_blocks: int,
        num_layers: int,
        planes: dict[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
    ):
        self._store = BlockStore(num_blocks, num_layers, planes, device)
        self.planes, self.memories, self.host_bytes = self._store.planes, self._store.memories, self._store.num_bytes
        self._layers = [{name: plane[:, layer] for name, plane in self.planes.items()} for layer in range(num_layers)]
        self.bytes_fetched = self.bytes_appended = 0
        self._block_size = next(iter(planes.values()))[0][1]
        self._block_bytes = block_bytes(1, planes)

    def open(self, layer: int, plan: Plan) -> dict[str, Tensor]:
        self.bytes_fetched += plan.once("bytes of past blocks", lambda: self._past_bytes(plan))
        return self._layers[layer]

    def _past_bytes(self, plan: Plan) -> int:
        runs = past_runs(plan, self._block_size, 0)
        return sum(last - first for first, last in runs) * self._block_bytes

    def append(self, plan: Plan) -> None:
        pass

    def close(self, plan: Plan) -> None:
        self.bytes_appended += plan.num_tokens * (self._block_bytes // self._block_size)

    def settle(self) -> None:
        pass

    def touched(self) -> None:
        pass

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        self._store.copy_blocks([source for source, _ in copies], [destination for _, destination in copies])


def _planes_of(memory: Tensor, planes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Name -> [num_blocks, L, *shape], of memory [L, num_blocks, bytes]."""
    rows = views_of(memory.flatten(0, 1), 1, planes)  # [L * num_blocks, 1, *shape]
    return {name: view[:, 0].unflatten(0, memory.shape[:2]).transpose(0, 1) for name, view in rows.items()}


def past_runs(plan: Plan, block_size: int, gap: int) -> list[tuple[int, int]]:
    """First and last + 1 of the runs of blocks that hold tokens from before this step, gaps up to `gap` included."""
    used = [
        row[: -(-(row_len - query_len) // block_size)]
        for row, row_len, query_len in zip(plan.host_tables, plan.row_lens, plan.query_lens, strict=False)
    ]
    blocks = np.unique(np.concatenate(used)) if used else np.empty(0, np.int32)
    blocks = blocks[blocks >= 0]
    if not len(blocks):
        return []
    edges = [0, *(np.flatnonzero(np.diff(blocks) > gap + 1) + 1).tolist(), len(blocks)]
    return [(int(blocks[low]), int(blocks[high - 1]) + 1) for low, high in pairwise(edges)]


def copy_slots(source: dict[str, Tensor], target: dict[str, Tensor], slot_mapping: Tensor) -> None:
    """Copy the tokens in these slots [T] from one layer's planes to another's; slot -1 copies nothing."""
    if slot_mapping.is_cuda:
        from ..kernels.blocks.triton_rows import copy_slots as copy_on_gpu  # Triton is there only where a GPU is

        return copy_on_gpu(source, target, slot_mapping)
    slots = slot_mapping[slot_mapping >= 0]
    for name, data in source.items():
        block, offset = slots // data.shape[2], slots % data.shape[2]
        target[name][block, :, offset] = data[block, :, offset]
