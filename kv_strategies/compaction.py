"""Compaction: a row is left with what is worth keeping of it (`evict.py`).

    watch      before a forward: rows that are to be compacted get a ring for their last queries
    choose     some layers at a time, over K of one row; nothing changes
    move       survivors go to the first blocks of the row or, where others hold these as well, to blocks of its own
    settle     the table says so, and what it held beyond goes back to the pool

Where choosing or finding room fails the row is as it was. One whose survivors could not all be moved is empty when the
error comes out, and has to be computed again.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Codec, KeepAllTokens, Policies, Site, Unsound
from .kernels.reference import HALF_BYTES
from .paged import BlockPool, BlockTable
from .step.plan import Plan
from .step.rings import QueryRings
from .step.sampling import to_device
from .step.store import KVShape, layers_of

#: Numbers of K that are looked at at once, of as many layers as that allows, one at least, and as many of V: enough to
#: keep a GPU busy, and 64 MB of 16 bits.
NUMBERS_AT_ONCE = 1 << 25
_NEVER = sys.maxsize  # more tokens than a row ever has


class Compaction:
    """Rows of a strategy, and what its policy of selection says of them."""

    def __init__(self, pool: BlockPool, policies: Policies, shape: KVShape):
        self._pool, self._layer_devices, self._layers_of = pool, shape.layer_devices, layers_of(shape.layer_devices)
        self._layer_ids, self._width = list(chain(*self._layers_of)), shape.num_kv_heads * shape.head_dim
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
        chosen = [choice for tables in alike.values() if (choice := self._choose(tables))]
        if not chosen:
            return
        sound = torch.stack([choice.are_sound for choice in chosen]).tolist()  # the one time that the host waits
        for (tables, cap, kept, _), are_sound in zip(chosen, sound, strict=True):
            if not all(are_sound):
                layer_idx = self._layer_ids[are_sound.index(False)]
                self._leave_whole(tables, f"{self._selection.name} gives NaN in layer {layer_idx}")
                continue
            self._move(tables, cap, kept, make_room)
            self.num_compacted += len(tables)
            self._settle(tables, cap)

    def _choose(self, tables: list[BlockTable]) -> _Choice | None:
        """What tables that are alike keep; None where that is all, and they are settled. Nothing waits for a device."""
        table = tables[0]
        cap = self._selection.cap(table.num_seen) if table.cap is None else table.cap
        if table.num_tokens <= cap:
            self._settle(tables, cap)
            return None
        try:
            homes = zip(self._placement.planes(), self._layers_of, strict=True)
            chosen = [list(self._choose_there(table, cap, *home)) for home in homes]
        except Unsound as error:
            self._leave_whole(tables, str(error))
            return None
        kept = [torch.cat([index for index, _ in there]) for there in chosen]
        are_sound = [is_sound.to(self._layer_devices[0]) for there in chosen for _, is_sound in there]
        return _Choice(tables, cap, kept, torch.cat(are_sound))

    def _choose_there(
        self, table: BlockTable, cap: int, planes: dict[str, Tensor], layer_ids: list[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What `Selection.choose` says of the layers of a device, of as many at a time as memory is meant for."""
        selection, read = self._selection, _Reader(planes, table, self._codec, self._layer_devices[layer_ids[0]])
        at_once = max(1, NUMBERS_AT_ONCE // (self._width * table.num_tokens))
        for first in range(0, len(layer_ids), at_once):
            these, some = slice(first, first + at_once), layer_ids[first : first + at_once]
            values = read("v", these) if selection.reads_values else None
            queries = self._queries(table, some, cap)
            yield selection.choose(some, read("k", these), values, queries, cap, table.num_seen - 1)

    def _queries(self, table: BlockTable, layer_ids: list[int], cap: int) -> Tensor | None:
        """The last queries, of tokens that are here one behind the other: what an older one saw, indices do not say."""
        num_newest = table.num_seen - table.num_settled + self._selection.num_recent(cap)
        count = min(self._selection.num_queries, table.num_tokens, num_newest)
        return self.rings.read(table.ring, layer_ids, table.num_seen, count) if count else None

    def _leave_whole(self, tables: list[BlockTable], why: str) -> None:
        self.num_unsound += len(tables)
        self._settle(tables, _NEVER)
        outcome = "not compacted again" if tables[0].num_settled else "finished exactly"
        warnings.warn(f"{why}: the row of {tables[0].num_seen} tokens is {outcome}", stacklevel=2)

    def _settle(self, tables: list[BlockTable], cap: int) -> None:
        """They are as they are to be until they have grown beyond so many tokens."""
        for table in tables:
            table.cap = cap
            if not self._is_asked(table):
                table.ring = None

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


def choosing_bytes(policies: Policies, site: Site, num_tokens: int, num_kept: int) -> int:
    """What looking at a row of so many tokens takes at most, until it is compacted to `num_kept`: K of some layers, V
    where that is looked at as well, what decodes them, what a score makes of them, and which tokens each head keeps.
    """
    shape, selection = site.shape, policies.selection
    of_a_layer = shape.num_kv_heads * shape.head_dim * num_tokens
    # Not rounded down to layers, as `_choose_there` does: what holds a row holds every shorter one.
    numbers = min(len(shape.layer_devices) * of_a_layer, max(NUMBERS_AT_ONCE, of_a_layer))
    keys, decoding_keys = (numbers * size for size in _sizes(policies.codec, site, "k"))
    values, decoding_values = (numbers * size for size in _sizes(policies.codec, site, "v"))
    if not selection.reads_values:
        values = decoding_values = 0
    scoring = selection.choosing_bytes(numbers // shape.head_dim, num_tokens, shape)
    kept = kept_bytes(shape, num_kept)
    return kept + max(decoding_values, values + max(decoding_keys, keys + scoring), kept)  # of each layer, then of all


def kept_bytes(shape: KVShape, num_kept: int) -> int:
    """Of the indices that say which tokens of a row are kept."""
    return torch.int64.itemsize * len(shape.layer_devices) * shape.num_kv_heads * num_kept


def _sizes(codec: Codec, site: Site, name: str) -> tuple[int, int]:
    """Bytes a number of K or V that `_Reader` gives, and while it does."""
    planes = codec.planes(site.shape.num_kv_heads, site.block_size, site.shape.head_dim, site.shape.dtype)
    dtype = planes[name][1]
    if not _is_decoded(codec, planes, name):
        return dtype.itemsize, dtype.itemsize
    copies = 4 if dtype == HALF_BYTES else 2  # float32: unpacked and times the scale; then turned, in two more
    return 4, dtype.itemsize + 4 * copies


def _is_decoded(codec: Codec, planes: Collection[str], name: str) -> bool:
    """Whether K or V are read as numbers that codes stand for, and not as they are stored."""
    return f"{name}_scale" in planes or not codec.in_kernels


class _Choice(NamedTuple):
    """What tables that are alike keep: 8 bytes for K and V of a token, head and layer."""

    tables: list[BlockTable]
    cap: int
    kept: list[Tensor]  # for each device of layers, in their order, [L, Hkv, cap] indices
    are_sound: Tensor  # [layers] bool, whether they can be trusted, device after device


class _Reader:
    """K or V of a row in one piece, of some of the layers of a device."""

    def __init__(self, planes: dict[str, Tensor], table: BlockTable, codec: Codec, device: torch.device):
        self._planes, self._num_tokens, self._codec, self._device = planes, table.num_tokens, codec, device
        self._blocks = to_device(table.blocks.tolist(), device)

    def __call__(self, name: str, layers: slice) -> Tensor:
        """[l, Hkv, n, D] numbers as they are stored, or of codes what they mean."""
        codes, scale = self._gather(name, layers), f"{name}_scale"
        if not _is_decoded(self._codec, self._planes, name):
            return codes
        return self._codec.decode(codes, self._gather(scale, layers) if scale in self._planes else None)

    def _gather(self, name: str, layers: slice) -> Tensor:
        plane = self._planes[name][:, layers].movedim(0, 2)  # [l, Hkv, N, block_size, ..]
        blocks = self._blocks.to(plane.device)  # V may lie in host memory
        return plane[:, :, blocks].flatten(2, 3)[:, :, : self._num_tokens].to(self._device)
