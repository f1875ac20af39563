"""Compaction: a row is left with what is worth keeping of it (`evict.py`).

    watch      before a forward: rows that are to be compacted get a ring for their last queries
    choose     a layer at a time, over K of one row; nothing changes
    move       survivors go to the first blocks of the row or, where others hold these as well, to blocks of its own
    settle     the table says so, and what it held beyond goes back to the pool

Where choosing or finding room fails the row is as it was. One whose survivors could not all be moved is empty when the
error comes out, and has to be computed again.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .base import Codec, KeepAllTokens, Policies, Unsound
from .paged import BlockPool, BlockTable
from .step.plan import Plan
from .step.rings import QueryRings
from .step.store import KVShape

_NEVER = sys.maxsize  # more tokens than a row ever has


class Compaction:
    """Rows of a strategy, and what its policy of selection says of them."""

    def __init__(self, pool: BlockPool, policies: Policies, shape: KVShape):
        self._pool, self._layer_devices = pool, shape.layer_devices
        self._selection, self._placement, self._codec = policies.selection, policies.placement, policies.codec
        self.keeps_all = isinstance(policies.selection, KeepAllTokens)
        self.rings = QueryRings(shape)
        self.num_compacted = self.num_evicted = self.num_unsound = 0

    # --- which rows, and when

    def num_sharable(self, num_tokens: int, num_prompt: int) -> int:
        """How many of its first tokens a new row may take from others: of the prompt alone, since what follows was
        computed after a compaction, and without the queries that are asked for.
        """
        if self.keeps_all:
            return max(0, num_tokens - 1)
        return max(0, min(num_tokens, num_prompt) - max(1, self._selection.num_queries))

    def num_until_due(self, table: BlockTable, num_prompt: int) -> int:
        """Tokens that a row with such a prompt takes in before it is to be compacted; 0 for now."""
        if self.keeps_all:
            return _NEVER
        if table.cap is None:
            return max(0, num_prompt - table.num_seen)
        every = self._selection.every
        return _NEVER if every is None else max(0, table.cap + every - table.num_tokens)

    # --- what attention leaves for it

    def watch(self, rows: Iterable[tuple[BlockTable, int]]) -> None:
        """These rows are about to take in so many tokens: those to be compacted later have a ring of their own."""
        if not self._selection.num_queries:
            return
        asked = [(table, num_tokens) for table, num_tokens in rows if num_tokens and self._is_asked(table)]
        new = [table for table, _ in asked if not table.ring or table.ring.is_shared]
        for table, own in zip(new, self.rings.take(len(new)), strict=True):
            if table.ring:
                self.rings.copy(table.ring, own)
            table.ring = own
        for table, num_tokens in asked:
            table.ring.extend(table.num_seen, num_tokens)

    def expect(self, num_rows: int) -> None:
        """Set rings aside for so many rows: where they come to lie elsewhere later, captured steps are lost."""
        if self._selection.num_queries:
            self.rings.take(num_rows)  # and give them back

    def _is_asked(self, table: BlockTable) -> bool:
        """Whether the next queries of this row are asked for."""
        return table.cap is None or (self._selection.every is not None and table.cap != _NEVER)

    def records(self, plan: Plan) -> bool:
        """Whether rings take in queries of this forward. Captured decode steps do where rows are compacted again, and
        else have none to take in, see `may_replay`.
        """
        if not self._selection.num_queries:
            return False
        is_step = plan.is_replayed and plan.num_decodes == len(plan.query_lens)
        return self._selection.every is not None or not is_step

    def may_replay(self, tables: Iterable[BlockTable]) -> bool:
        """Whether a captured decode step serves these rows; not where one token is the end of a prompt, say."""
        return self._selection.every is not None or not any(table.ring for table in tables)

    # --- a compaction

    def compact(self, rows: Sequence[tuple[BlockTable, int]], make_room: Callable[[int], None]) -> None:
        """Compact each of the tables, with so many tokens of a prompt, that is to be compacted now. Those that are
        forks of one another, over the same tokens, are compacted as one and share what is left.

        Args:
            make_room: so many blocks are free when it returns.

        Raises:
            OutOfBlocks: there is no room for survivors that need blocks of their own.
        """
        if self.keeps_all:
            return
        alike: dict[object, list[BlockTable]] = {}
        for table, num_prompt in rows:
            if table.num_tokens and not self.num_until_due(table, num_prompt):
                alike.setdefault((table.blocks.tobytes(), table.num_tokens, table.cap), []).append(table)
        for tables in alike.values():
            self._compact(tables, make_room)

    def _compact(self, tables: list[BlockTable], make_room: Callable[[int], None]) -> None:
        table = tables[0]
        cap = self._selection.cap(table.num_seen) if table.cap is None else table.cap
        if table.num_tokens > cap:
            try:
                kept = self._choose(table, cap)
            except Unsound as error:
                warnings.warn(f"{error}: the row of {table.num_seen} tokens is finished exactly", stacklevel=2)
                cap = _NEVER
                self.num_unsound += len(tables)
            else:
                self._move(tables, cap, kept, make_room)
                self.num_compacted += len(tables)
        for table in tables:
            table.cap = cap
            if not self._is_asked(table):
                table.ring = None

    def _choose(self, table: BlockTable, num_kept: int) -> list[Tensor]:
        """For each device of layers, in their order: the tokens that each layer and head keeps, [L, Hkv, num_kept]."""
        selection, devices = self._selection, self._layer_devices
        kept: dict[torch.device, list[Tensor]] = {device: [] for device in devices}
        are_sound = []
        read = _Reader(table, self._codec)
        for layer_idx, (layer, device) in enumerate(zip(self._placement.layers(), devices, strict=True)):
            keys = read(layer.k, layer.k_scale, device)
            values = read(layer.v, layer.v_scale, device) if selection.reads_values else None
            queries = None
            if selection.num_queries:
                count = min(selection.num_queries, table.num_tokens)
                queries = self.rings.read(table.ring, layer_idx, table.num_seen, count)
            index, is_sound = selection.choose(layer_idx, keys, values, queries, num_kept, table.num_seen - 1)
            kept[device].append(index)
            are_sound.append(is_sound.to(devices[0]))
        are_sound = torch.stack(are_sound).tolist()  # the one time that the host waits
        if not all(are_sound):
            raise Unsound(f"{selection.name} gives NaN in layer {are_sound.index(False)}")
        return [torch.stack(layers) for layers in kept.values()]

    def _move(
        self, tables: list[BlockTable], num_kept: int, kept: list[Tensor], make_room: Callable[[int], None]
    ) -> None:
        pool, sources = self._pool, tables[0].blocks.tolist()
        targets = sources[: -(-num_kept // pool.block_size)]
        shared = [place for place, block in enumerate(targets) if pool.ref_counts[block] > len(tables)]
        if shared:
            make_room(len(shared))
        own = pool.allocate_run(len(shared))
        for place, block in zip(shared, own, strict=True):
            targets[place] = block
        try:
            self._placement.compact(sources, targets, kept)
        except BaseException:
            for table in tables:
                table.release()
            for block in own:
                pool.release(block)
            raise
        for table in tables:
            self.num_evicted += table.num_tokens - num_kept
            if table is not tables[0]:
                for block in own:
                    pool.share(block)
            table.compact(targets, num_kept)

    # --- looking after it

    def stats(self) -> dict[str, int]:
        """Nothing where all is kept."""
        if self.keeps_all:
            return {}
        return {
            "rows_compacted": self.num_compacted,
            "rows_left_whole": self.num_unsound,
            "tokens_evicted": self.num_evicted,
            "scoring_bytes": self.rings.num_bytes,
        }

    def check_integrity(self) -> None:
        """Raises AssertionError where the rings do not balance."""
        self.rings.check_integrity(table.ring for table in self._pool.tables if table.ring)

    def reset(self) -> None:
        self.num_compacted = self.num_evicted = self.num_unsound = 0


class _Reader:
    """K or V of a row in one piece."""

    def __init__(self, table: BlockTable, codec: Codec):
        self._num_tokens, self._codec = table.num_tokens, codec
        self._blocks = torch.from_numpy(table.blocks.astype("int64"))
        self._on: dict[torch.device, Tensor] = {}

    def __call__(self, plane: Tensor, scale: Tensor | None, device: torch.device) -> Tensor:
        """[Hkv, n, D] of a layer: numbers as they are stored, or of codes what they mean."""
        codes = self._gather(plane, device)
        if scale is None and self._codec.in_kernels:
            return codes
        return self._codec.decode(codes, None if scale is None else self._gather(scale, device))

    def _gather(self, plane: Tensor, device: torch.device) -> Tensor:
        if plane.device not in self._on:  # V may lie in host memory
            self._on[plane.device] = self._blocks.to(plane.device)
        return plane.transpose(0, 1)[:, self._on[plane.device]].flatten(1, 2)[:, : self._num_tokens].to(device)
