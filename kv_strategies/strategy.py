"""A strategy at work: a block pool, its memory, and five policies (`base.py`) that are asked in turn.

Once a step, on integers: `reserve` finds room in the block tables, `retire` and `rebase` let go of what nobody sees,
`compact` (`compaction.py`) of what is not worth keeping.
Once a layer, on tensors: `attend` stores the new K and V and attends to the blocks.
"""

from __future__ import annotations

import threading
import uuid
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from .base import NoSharing, Policies
from .compaction import Compaction
from .kernels import Kernels, store_kv
from .kernels.linear import Rotary
from .paged import BlockPool, BlockTable, OutOfBlocks
from .step.defaults import current, plain_defaults
from .step.forward import Seen
from .step.fused import FusedStack, stack_of
from .step.interrupts import uninterrupted
from .step.plan import NULL_BLOCK, LayerStore, Plan
from .step.ranks import ranks_of
from .step.requests import integers
from .step.store import KVShape, Planes
from .step.version import watch
from .tiers.identity import identity, is_steered, told_weights, weights_hash
from .tiers.lower import LowerTiers
from .tiers.saved import Loaded


class Door(Protocol):
    """What a strategy leaves to who runs forwards: see `generate.py`."""

    def cache(self, strategy: Strategy, input_ids: Any, attention_mask: Tensor | None, salt: str) -> Cache: ...

    def installed(self, strategy: Strategy, salt: str) -> AbstractContextManager[Strategy]: ...

    def preload(self, strategy: Strategy, token_ids: Sequence[int], salt: str) -> int: ...


class Strategy:
    """A block pool, its memory and its policies, for one model. Long-lived: it outlives requests and calls.

    Use `build`. Two doors lead in: `cache()` for `model.generate()`, and `Runner` for batches of requests.
    """

    def __init__(
        self,
        name: str,
        model: LlamaForCausalLM,
        policies: Policies,
        kernels: Kernels,
        door: Door,
        *,
        num_blocks: int,
        block_size: int,
    ):
        #: Held while tables change and while a forward runs: other threads wait.
        self.lock = Lock(model.device)
        self.name, self.model, self.kernels, self.door = name, model, kernels, door
        self.sharing, self.retention = policies.sharing, policies.retention
        self.placement, self.codec, self.selection = policies.placement, policies.codec, policies.selection
        self.shape, self.ranks, self._watch = KVShape.of(model), ranks_of(model), watch(model)
        #: Whether the layers are on several devices.
        self.is_spread = len(set(self.shape.layer_devices)) > 1
        self._current = current if self.is_spread else nullcontext  # else the lock has said so
        self._planes = planes_of(self.shape, policies, block_size)
        with self.lock, torch.inference_mode(False):  # blocks made in that mode could not be written outside of it
            self.placement.allocate(num_blocks, self._planes, self.shape.layer_devices)
        self.pool = BlockPool(num_blocks, block_size)  # its books of a pool beyond all memory are beyond it as well
        self.selection.open(num_blocks * block_size)
        said = {policy.question: policy.identity() for policy in (self.retention, self.placement, self.codec)}
        self.sharing.open(self.pool, identity(model, self._planes, block_size, said), self.placement.tiers)
        self.compaction = Compaction(self.pool, policies, self.shape)
        self.num_prompt_tokens = self.num_hit_tokens = 0
        self.num_evictions = 0
        self._promises: dict[int, _Promise] = {}  # by the id of their owner
        #: Whether the layers run in one piece with fused kernels (`step/fused.py`) where the model allows it.
        self.fused = True
        numbers = self._watch.numbers
        self.seen = Seen(*numbers, None, self._watch.is_opaque)
        self.sharing.follow(numbers.content)
        self.sharing.join(self.placement, partial(told_weights, model))

    def follow(self) -> None:
        """Look whether the model is what it was (`step/version.py`): before blocks are looked up, and before a forward.

        Where it has changed, what was cached is no longer given to anybody, what is preloaded may be evicted, and what
        a row in flight has computed is its own: it goes on, as with the native cache, and is never published.

        Raises:
            ValueError: it has come to another dtype or device, or has more layers, than the pool was built for.
        """
        stack = stack_of(self.model) if self.fused else None
        numbers = self._watch.numbers if stack is None else self._watch.last
        before, self.seen = self.seen, Seen(*numbers, stack, self._watch.is_opaque)
        if numbers.layout != before.layout:
            try:
                self._check_model()
            except BaseException:
                self.seen = before  # so that the next one is told as well
                raise
        if numbers.content != before.content:
            self.sharing.follow(numbers.content)

    def look_closely(self) -> None:
        """Look as well for what no counter of torch counts: before a call, as long as nothing runs that would wait."""
        if not isinstance(self.sharing, NoSharing):
            self._watch.look_closely()

    def _check_model(self) -> None:
        first = next(self.model.model.layers.parameters())
        devices = [next(layer.self_attn.parameters()).device for layer in self.model.model.layers]
        then, now = (self.shape.dtype, self.shape.layer_devices), (first.dtype, devices)
        if now[0] == then[0] and devices == then[1][: len(devices)]:
            return

        def told(dtype: torch.dtype, devices: list[torch.device]) -> str:
            where = ", ".join(map(str, dict.fromkeys(devices)))
            return f"{str(dtype).removeprefix('torch.')} on {where}, {len(devices)} layers"

        raise ValueError(
            f"the model has been converted or moved since {self.name!r} was built for it: then {told(*then)}, now "
            f"{told(*now)}. Build another strategy for the model as it is, or move it back"
        )

    @property
    def stack(self) -> FusedStack | None:
        """What runs the decoder layers; None for the layers themselves."""
        self.follow()
        return self.seen.stack

    @property
    def capturable(self) -> bool:
        """Whether a decode step may be recorded as a CUDA graph."""
        return self.placement.capturable and self.kernels.capturable and not self.is_spread

    @property
    def addresses(self) -> tuple[int, int]:
        """What a captured step takes for granted: weights and code of the model, and where queries are kept."""
        return self.seen.layout, self.compaction.rings.num_growths

    @property
    def block_size(self) -> int:
        return self.pool.block_size

    @property
    def max_tokens(self) -> int:
        """The longest context that the pool can hold when a request has it alone, beside what is pinned."""
        return (self.pool.num_blocks - self.sharing.num_pinned) * self.pool.block_size

    # --- the doors

    def cache(self, input_ids: Any = None, attention_mask: Tensor | None = None, salt: str = "") -> Cache:
        """A cache for one call of `generate()`: `model.generate(ids, cache=strategy.cache())`.

        It gives its blocks back when it is no longer referenced. Before Transformers 5.24 the keyword is
        `past_key_values`.

        Args:
            input_ids: [B, n] the prompt, so that tokens another request has computed are skipped; or what a tokenizer
                gives, with the mask in it.
            attention_mask: [B, n] 1 for a token, 0 for padding; as given to `generate()`.
            salt: only calls with the same salt share.
        """
        with uninterrupted(), self.lock:
            if input_ids is not None:
                self.look_closely()
            return self.door.cache(self, input_ids, attention_mask, salt)

    def installed(self, salt: str = "") -> AbstractContextManager[Strategy]:
        """Inside, calls of `model.generate()` that bring no cache get one of this strategy, with the prompt known: for
        code that is not yours (`pipeline`, trainers, harnesses). See `installed.py`.
        """
        return self.door.installed(self, salt)

    def open_table(
        self,
        token_ids: Sequence[int],
        salt: str = "",
        suspended: Suspended | None = None,
        num_prompt: int | None = None,
    ) -> BlockTable:
        """A block table for a new request, with the blocks that already hold the start of `token_ids`.

        At least the last token is left to compute, since its logits are wanted; and of the prompt as many as have to be
        seen computed.

        Args:
            suspended: what `suspend` gave when the request was preempted; brought back where that pays.
            num_prompt: tokens of the prompt, where others follow it; all unless told.
        """
        if len(token_ids):
            self.follow()
        known = self.compaction.num_sharable(len(token_ids), len(token_ids) if num_prompt is None else num_prompt)
        table = BlockTable(self.pool, *self.sharing.match(token_ids[:known], salt))
        if suspended is None or table.num_tokens + self.block_size > suspended.table.num_seen:
            return table
        try:
            return self._resume(suspended, beside=table) or table
        except BaseException:
            table.release()
            raise

    def suspend(self, table: BlockTable) -> Suspended | None:
        """Copy the contents of a table to a lower tier, if there is room: its blocks may be given back then."""
        held = [index for index, block in enumerate(table.blocks) if block != NULL_BLOCK]
        tiers = self.placement.tiers
        if not held or len(held) > tiers.num_places:
            return None
        suspended = Suspended(table.hollow(), {index: uuid.uuid4().bytes for index in held}, tiers)
        for index, key in suspended.keys.items():
            if not tiers.attempt(tiers.demote, key, int(table.blocks[index])):
                return None
        return suspended

    def _resume(self, suspended: Suspended, beside: BlockTable) -> BlockTable | None:
        """The table as it was, or None: there is no room yet, computing is faster, or a part has been lost."""
        keys, tiers = suspended.keys, self.placement.tiers
        needed = len(keys) + 1
        if needed > self.pool.num_free + self.sharing.num_evictable():
            return None
        if (tiers.attempt(tiers.num_promotable, [(key, b"") for key in keys.values()]) or 0) < len(keys):
            return None
        beside.release()
        if needed > self.pool.num_free:
            self.num_evictions += self.sharing.evict(needed - self.pool.num_free)
        if needed > self.pool.num_free:
            return None
        table, is_back = suspended.table, False
        table.fill(keys)
        try:
            is_back = all(tiers.attempt(tiers.promote, key, int(table.blocks[index])) for index, key in keys.items())
        finally:
            if not is_back:  # it is computed again
                table.release()
        return table if is_back else None

    def count_hit(self, token_ids: Sequence[int], table: BlockTable) -> None:
        """A request was admitted with a table that `open_table` gave."""
        self.num_prompt_tokens += len(token_ids)
        self.num_hit_tokens += table.num_tokens
        self.sharing.count_hit(table.blocks.tolist())

    def num_blocks_for(
        self, token_ids: Sequence[int], num_tokens: int, chunk: int, salt: str, *, shares: bool = True
    ) -> int:
        """The most blocks that this prompt takes at once on its way to `num_tokens`, without the pinned ones that it
        begins with, where it takes over what is cached.
        """
        needed = self._num_blocks(len(token_ids), num_tokens, chunk)
        if needed < -(-num_tokens // self.block_size):
            return needed  # it lets go of blocks on the way, and those may be the pinned ones
        known = self.compaction.num_sharable(len(token_ids), len(token_ids)) if shares else 0
        return needed - self.sharing.num_pinned_of(token_ids[:known], salt)

    def _num_blocks(self, num_prompt: int, num_tokens: int, chunk: int) -> int:
        """The most blocks that a row with such a prompt holds at once on its way to `num_tokens`."""
        if self.compaction.keeps_all:
            return self.retention.num_blocks(num_tokens, chunk, self.block_size)
        is_shared = not isinstance(self.sharing, NoSharing)
        return self.selection.num_blocks(num_prompt, num_tokens, self.block_size, is_shared)

    def has_room(
        self, table: BlockTable, num_tokens: int, chunk: int, owner: object = None, num_prompt: int | None = None
    ) -> bool:
        """Whether `reserve` would find room for `num_tokens` more tokens, `chunk` at a time, in this table alone.

        Args:
            num_prompt: tokens of the prompt, where others follow it; all unless told.
        """
        total = table.num_tokens + num_tokens
        needed = table.num_new_blocks(num_tokens) - -(-total // self.block_size)
        needed += self._num_blocks(total if num_prompt is None else num_prompt, total, chunk)
        return needed <= self.pool.num_free + self.sharing.num_evictable() - self._promised_to_others(owner)

    def reserve(self, rows: Sequence[tuple[BlockTable, int]], owner: object = None) -> Reservation:
        """Make room in each table for so many more tokens: free dead blocks, evict, allocate, copy on write.

        Args:
            owner: who asks, as `promise` knows it.

        Returns:
            what undoes it, should the forward that was to fill the room not run to its end.

        Raises:
            OutOfBlocks: there is not enough room. Whatever is raised, no table was changed but for its dead blocks.
        """
        self.retire([table for table, _ in rows])
        self._make_room(self.pool.num_new_blocks(rows), owner)
        self.compaction.watch(rows)
        done: list[tuple[BlockTable, int, list[tuple[int, int]]]] = []
        try:
            for table, num_tokens in rows:
                before = table.num_tokens
                done.append((table, before, table.append(num_tokens)))
            if copies := [copy for _, _, copied in done for copy in copied]:
                self.placement.copy_blocks(copies)
            return Reservation([(table, before) for table, before, _ in done])
        except BaseException:
            for table, before, copies in reversed(done):
                table.retract(before, copies)
            raise

    def _make_room(self, needed: int, owner: object) -> None:
        """So many blocks are free, and nobody else was promised them.

        Raises:
            OutOfBlocks: there are not.
        """
        within_reach = self.pool.num_free + self.sharing.num_evictable() - self._promised_to_others(owner)
        if self.pool.num_free < needed <= within_reach:
            self.num_evictions += self.sharing.evict(needed - self.pool.num_free)
        if needed > min(within_reach, self.pool.num_free):
            raise OutOfBlocks(
                f"{needed} more blocks of {self.block_size} tokens are needed and {self.pool.num_free} of "
                f"{self.pool.num_blocks} are free{self.holders(owner)}"
            )

    def compact(self, rows: Sequence[tuple[BlockTable, int]], owner: object = None) -> None:
        """Leave of each table only what is worth keeping, where its prompt of so many tokens has just been computed, or
        where it has grown by enough since. See `compaction.py`.

        Raises:
            OutOfBlocks: survivors need blocks of their own beside shared ones, and there is no room for them.
        """
        self.compaction.compact(rows, lambda needed: self._make_room(needed, owner))

    # --- who was promised what

    def promise(self, owner: object, num_blocks: int, tables: Callable[[], Iterable[BlockTable]]) -> None:
        """Keep so many blocks within reach of `owner`, those that its `tables` hold counted in; 0 ends the promise.

        What was promised nobody else is given, so a runner that was promised what its largest request takes can finish
        all of them, one at a time if need be.
        """
        old = self._promises.get(id(owner))
        if old and old.num_blocks == num_blocks:
            return
        if old:
            old.ended.detach()
            del self._promises[id(owner)]
        if num_blocks:
            ended = weakref.finalize(owner, self._promises.pop, id(owner), None)
            ended.atexit = False
            self._promises[id(owner)] = _Promise(num_blocks, weakref.WeakMethod(tables), ended)

    def num_within_reach(self, owner: object) -> int:
        """Blocks that `owner` could come to hold at once, beside what others hold and were promised."""
        others = self._held_beside(self._promises.get(id(owner)))
        return self.pool.num_blocks - self.sharing.num_pinned - len(others) - self._promised_to_others(owner)

    def _promised_to_others(self, owner: object) -> int:
        """Blocks that others were promised and do not have yet. What they share with tables of somebody else, or with a
        preloaded prompt, is not theirs: it would not come back with them.
        """
        promises = self._promises.copy()  # at once: those of who is found to be gone leave at any moment
        others = [promise for key, promise in promises.items() if key != id(owner)]
        if not others:
            return 0
        pinned = {block for block, count in Counter(self.sharing.held_blocks()).items() if count > 1}
        return sum(
            max(0, promise.num_blocks - len(_held(promise.own_tables) - self._held_beside(promise) - pinned))
            for promise in others
        )

    def _held_beside(self, promise: _Promise | None) -> set[int]:
        """The blocks that other tables hold than those of a promise's owner."""
        mine = {id(table) for table in promise.own_tables} if promise else set()
        return _held(table for table in self.pool.tables if id(table) not in mine)

    def holders(self, owner: object = None) -> str:
        """Who else holds blocks, in words that follow a number of blocks; "" for nobody."""
        promise = self._promises.get(id(owner))
        mine = {id(table) for table in promise.own_tables} if promise else set()
        tables = [table for table in self.pool.tables if id(table) not in mine and (table.blocks != NULL_BLOCK).any()]
        said = []
        if tables:
            count = len(_held(tables))
            said.append(
                f"{count} are held by {len(tables)} rows of generate() caches or other runners, of "
                f"{' + '.join(str(table.num_tokens) for table in tables[:8])}{' + ..' * (len(tables) > 8)} tokens "
                "(a cache holds its blocks until nothing refers to it, a kept output or traceback included)"
            )
        if promised := self._promised_to_others(owner):
            said.append(f"{promised} are promised to accepted requests of other runners")
        return "".join(f"; {text}" for text in said)

    def retire(self, tables: Sequence[BlockTable]) -> None:
        """Give back the blocks that no further query of these tables can see."""
        for table in tables:
            table.drop(self.retention.dead(table.num_tokens, self.block_size))

    def rebase(self, tables: Sequence[BlockTable]) -> None:
        """Cut dead blocks out of long rows and turn the keys behind them, so that token indices stay small.

        For those who take positions from the plan: afterwards a token stands at another index of its row. A table whose
        shared blocks find no room to be copied is left for a later step; one whose keys could not all be turned is
        empty when this raises.
        """
        for table in tables:
            first, last = self.retention.stale(table.num_tokens, self.block_size)
            if first == last:
                continue
            self.retire([table])
            lacking = table.num_shared(last) - self.pool.num_free
            if lacking > 0 and self.sharing.evict(lacking) < lacking:
                continue
            copies = table.own_blocks(last)
            try:
                if copies:
                    self.placement.copy_blocks(copies)
            except BaseException:
                for _, own in copies:
                    self.pool.release(own)
                raise
            table.swap(copies)
            table.cut(first, last)
            live = table.blocks[first:]
            blocks = torch.from_numpy(live[live != NULL_BLOCK].astype("int64"))
            try:
                for layer in self.placement.layers():
                    self._turn_keys(layer, blocks.to(layer.k.device), (first - last) * self.block_size)
            except BaseException:
                table.release()  # some keys are turned and some are not: the row has to be computed again
                raise

    def _turn_keys(self, layer: LayerStore, blocks: Tensor, num_tokens: int) -> None:
        scale = None if layer.k_scale is None else layer.k_scale[blocks]
        keys = self.retention.turn_keys(self.codec.decode(layer.k[blocks], scale), num_tokens)
        layer.k[blocks], scale = self.codec.encode(keys)
        if scale is not None:
            layer.k_scale[blocks] = scale

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Forget all tokens of a table after the first `num_tokens` of those that it has seen.

        Raises:
            ValueError: as `check_truncate`.
        """
        self.check_truncate(table, num_tokens)
        if num_tokens:
            table.truncate(num_tokens - table.num_cut)
        else:
            table.release()

    def check_truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Raises ValueError where `truncate` cannot go back: what the next token sees has been given back already."""
        if 0 < num_tokens < table.num_settled:
            raise ValueError(
                f"cannot go back to {num_tokens} of {table.num_seen} tokens: the row was compacted at "
                f"{table.num_settled}, and what {self.name!r} evicted of those before is gone"
            )
        gone = {index for index, block in enumerate(table.blocks[: -(-num_tokens // self.block_size)]) if block < 0}
        for first, last in self.retention.dead(num_tokens, self.block_size) if gone else ():
            gone.difference_update(range(first, last))
        if gone:
            raise ValueError(
                f"cannot go back to {num_tokens} of {table.num_tokens} tokens: what the next token sees there has been "
                f"given back, as {self.name!r} keeps no more than it needs"
            )

    # --- the data plane: once a layer, tensors only

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        scaling: float,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Store the new K and V, and attend to everything the row may see.

        Args:
            query: [T, Hq, D] packed; key, value: [T, Hkv, D]. Keys arrive rotated, unless `rotary` comes with them.
            scaling: factor of the scores before the softmax.
            rotary: how queries and keys are to be rotated yet, in place.

        Returns:
            [T, Hq, D]
        """
        with self._current(query.device):
            layer = self.placement.open(layer_idx, plan)
            self.kernels.store_kv(key, value, layer, plan.slot_mapping, query, rotary, plan)
            if self.compaction.records(plan):
                ring = self.compaction.rings.layer(layer_idx)
                store_kv(query, query, ring, plan.query_slots, plan=plan)
            own = {"key": key, "value": value} if self.codec.lossless else {}  # else what comes later reads other bytes
            out = self.placement.read(
                layer_idx,
                query,
                layer,
                plan,
                self.kernels,
                scaling=scaling,
                window=self.retention.window,
                sinks=self.retention.sinks,
                sink_query=self.retention.sink_query(query, plan),
                **own,
            )
            self.placement.close(layer_idx, plan)
        return out

    # --- prompts computed ahead, and across restarts

    def preload(self, token_ids: Sequence[int], salt: str = "") -> int:
        """Compute the start of later prompts (a system prompt) ahead, and keep it until `forget`.

        Returns:
            how many tokens are kept: those of full blocks.

        Raises:
            ValueError: no token ids, fewer than a block of them, or the strategy keeps nothing for later.
            OutOfBlocks: it does not fit; what was computed of it is cached as usual.
        """
        with uninterrupted() as shield, self.lock, shield.lifted():
            return self.door.preload(self, integers("token_ids", token_ids).tolist(), salt)

    def forget(self, token_ids: Sequence[int], salt: str = "") -> None:
        """Undo one `preload`: after the last, the blocks stay cached until their room is needed."""
        with uninterrupted(), self.lock:
            self.sharing.forget(integers("token_ids", token_ids), salt)

    def save(self, path: str | Path) -> int:
        """Write all blocks that are kept for later requests to a file. Returns how many. See `saved.save`.

        Of a model over several ranks each writes a file of its own, `path` with its number behind: its heads.

        Raises:
            ValueError: hooks, replaced methods or autocast steer the model, of which a file could not tell.
        """
        with uninterrupted() as shield, self.lock, shield.lifted():
            self.look_closely()
            self.follow()
            return self.sharing.save(self.ranks.own(path), self.placement, self._weights_in_files())

    def load(self, path: str | Path) -> Loaded:
        """Take in what `save` has written, as far as free blocks go. See `saved.load`.

        Raises:
            ValueError: hooks, replaced methods or autocast steer the model, of which no file tells; or ranks find
                different blocks in their files, as one is damaged: nothing is kept of any.
        """
        with uninterrupted() as shield, self.lock, shield.lifted():
            self.look_closely()
            self.follow()
            loaded = error = None
            try:
                loaded = self.sharing.load(self.ranks.own(path), self.placement, self._weights_in_files())
            except (OSError, ValueError) as found:
                error = found
            told = self.ranks.all((loaded, error and str(error)))
            for rank, (theirs, why) in enumerate(told):
                if theirs != told[0][0]:
                    self.sharing.clear()
                    raise ValueError(
                        "the files of the ranks gave different blocks, so that nothing is kept of any: rank 0 found "
                        f"{told[0][0] or told[0][1]}; rank {rank} {theirs or why}"
                    )
            if error is not None:
                raise error
            return loaded

    def _weights_in_files(self) -> str:
        """What the K and V in a file were computed with."""
        if is_steered(self.model):
            raise ValueError(
                "hooks or replaced methods steer this model, or autocast does, and a file tells of its weights alone: "
                "its blocks would pass for those of the model without them. Take them away, or do without a file"
            )
        return weights_hash(self.model)

    # --- looking after it

    def stats(self) -> dict[str, object]:
        """What the pool holds and what has moved. Bytes are what the allocators have set aside for blocks."""
        with uninterrupted(), self.lock:
            return self._stats()

    def _stats(self) -> dict[str, object]:
        held = self.sharing.held_blocks()
        num_cached = sum(self.pool.ref_counts[block] == 1 for block in set(held))
        live = [table for table in self.pool.tables if (table.blocks != NULL_BLOCK).any()]
        tokens = sum(table.num_live for table in live)
        room = sum(int((table.blocks >= 0).sum()) for table in live) * self.block_size
        kv_bytes = self.placement.bytes_per_tier()
        return {
            "strategy": self.name,
            "block_size": self.block_size,
            "num_blocks": self.pool.num_blocks,
            "blocks_used": self.pool.num_used - num_cached,
            "blocks_free": self.pool.num_free,
            "blocks_cached": num_cached,
            "tokens_stored": tokens,
            "token_places": room,
            "kv_bytes": sum(kv_bytes.values()),
            "kv_bytes_per_tier": kv_bytes,
            "bytes_per_token": self.shape.block_bytes(self._planes) / self.block_size,
            "kernels": self.kernels.name,
            "blocks_pinned": self.sharing.num_pinned,
            "prompt_tokens": self.num_prompt_tokens,
            "hit_tokens": self.num_hit_tokens,
            "evictions": self.num_evictions,
            **self.sharing.stats(),
            **self.compaction.stats(),
            **self.placement.stats(),
        }

    def check_integrity(self) -> None:
        """Raises AssertionError where the books of pool, tables, sharing and tiers do not balance (a bug of ours)."""
        with uninterrupted(), self.lock:
            self.pool.check_integrity(self.sharing.held_blocks())
            self.sharing.check_integrity()
            self.compaction.check_integrity()
            self.placement.tiers.check_integrity()

    def reset(self) -> None:
        """Forget everything that is cached. Requests and caches in use must have ended.

        Raises:
            RuntimeError: some are still in use.
        """
        with uninterrupted(), self.lock:
            in_use = sum(table.num_tokens > 0 for table in self.pool.tables)
            if in_use:
                raise RuntimeError(
                    f"{in_use} block tables are in use; finish their requests or drop their caches first"
                )
            self.sharing.clear()
            self.placement.tiers.clear()
            self.num_prompt_tokens = self.num_hit_tokens = self.num_evictions = 0
            self.compaction.reset()


def planes_of(shape: KVShape, policies: Policies, block_size: int) -> Planes:
    """What a layer stores of a block, see `BlockStore`."""
    return policies.codec.planes(shape.num_kv_heads, block_size, shape.head_dim, shape.dtype)


class Lock:
    """One thread at a time changes tables or runs a forward; the others wait. It may enter again.

    What the garbage collector finds in the middle of anything, tables that nobody refers to any more, is released when
    that is safe. Meanwhile torch has its own default dtype and device, whatever the user has set, and `device` is the
    current GPU, if it is one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock, self._depth = threading.RLock(), 0
        self._waiting: deque[Callable[[], object]] = deque()  # what is to be done when nobody is at work
        self._defaults = ExitStack()

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            if not self._depth:
                self._defaults = plain_defaults()
                self._defaults.enter_context(current(self._device))
        except BaseException:
            self._lock.release()
            raise
        self._depth += 1
        if self._waiting:  # put there while the last one left
            try:
                self._do_what_waits()
            except BaseException as error:
                self.__exit__(error)
                raise

    def _do_what_waits(self) -> None:
        while self._depth == 1 and self._waiting:
            self._waiting.popleft()()

    def __exit__(self, *error: object) -> None:
        try:
            self._do_what_waits()
        finally:
            if self._depth == 1:
                self._defaults.close()
            self._depth -= 1
            self._lock.release()

    @uninterrupted()
    def is_mine(self) -> bool:
        """Whether this thread is at work already: a callback of the user's, a signal's handler or a finalizer asks."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._depth > 0
        finally:
            self._lock.release()

    def release_tables(self, tables: list[BlockTable]) -> None:
        """Give back what these tables hold, at once or as soon as nobody is at work."""
        self.when_idle(lambda: release_all(tables))

    @uninterrupted()
    def when_idle(self, work: Callable[[], object]) -> None:
        """Do something at once, or as soon as nobody is at work."""
        self._waiting.append(work)
        if self._lock.acquire(blocking=False):
            try:
                if not self._depth:
                    with self:
                        pass
            finally:
                self._lock.release()


def release_all(tables: Iterable[BlockTable]) -> None:
    for table in tables:
        table.release()


class Reservation:
    """Room for the new tokens of a forward, theirs when it has run to its end."""

    def __init__(self, rows: list[tuple[BlockTable, int]]):
        self._rows = rows

    def undo(self) -> None:
        """The forward has failed: the tables hold as many tokens as before. May be called twice."""
        for table, num_tokens in self._rows:
            if table.num_tokens > num_tokens:
                table.truncate(num_tokens)


class _Promise(NamedTuple):
    num_blocks: int
    tables: weakref.WeakMethod  # the owner may be dropped, promise and all
    ended: weakref.finalize

    @property
    def own_tables(self) -> Iterable[BlockTable]:
        tables = self.tables()
        return tables() if tables else ()


def _held(tables: Iterable[BlockTable]) -> set[int]:
    """The blocks of some tables."""
    return {int(block) for table in tables for block in table.blocks if block != NULL_BLOCK}


class Suspended:
    """The table of a preempted request, without blocks, and where their contents are: index in the table -> key."""

    def __init__(self, table: BlockTable, keys: dict[int, bytes], tiers: LowerTiers):
        self.table, self.keys = table, keys
        weakref.finalize(self, _discard, tiers, list(keys.values())).atexit = False


def _discard(tiers: LowerTiers, keys: list[bytes]) -> None:
    for key in keys:
        tiers.discard(key)
