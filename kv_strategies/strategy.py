"""A strategy at work: a block pool, its memory, and four policies (`base.py`) that are asked in turn.

Once a step, on integers: `reserve` finds room in the block tables, `retire` and `rebase` let go of what nobody sees.
Once a layer, on tensors: `attend` stores the new K and V and attends to the blocks.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Codec, LowerTiers, Spec
from .kernels.linear import Rotary
from .paged import BlockPool, BlockTable, OutOfBlocks
from .step.plan import NULL_BLOCK, Plan
from .step.store import block_bytes
from .tiers.identity import identity

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from .generate import StrategyCache
    from .step.fused import FusedStack
    from .step.graphs import StackGraphs
    from .tiers.saved import Loaded


class Strategy:
    """A block pool, its memory and its policies, for one model. Long-lived: it outlives requests and calls.

    Use `build`. Two doors lead in: `cache()` for `model.generate()`, and `Runner` for batches of requests.
    """

    def __init__(self, name: str, model: LlamaForCausalLM, spec: Spec, num_blocks: int):
        self.name = name
        self.model = model
        self.sharing, self.retention = spec.sharing, spec.retention
        self.placement, self.codec = spec.placement, spec.codec
        self.shape = KVShape.of(model)
        self.pool = BlockPool(num_blocks, spec.block_size)
        planes = self.shape.planes(self.codec, spec.block_size)
        self.placement.allocate(num_blocks, planes, self.shape.layer_devices)
        about = identity(model, planes, spec.block_size, self.retention, self.placement)
        self.sharing.open(self.pool, about, self.placement.tiers)
        self.num_prompt_tokens = self.num_hit_tokens = 0
        self.num_evictions = 0
        #: Whether the layers run in one piece with fused kernels (`fused.py`) where the model allows it.
        self.fused = True
        self._stack_graphs: StackGraphs | None = None

    @property
    def stack(self) -> FusedStack | None:
        """What runs the decoder layers; None for the layers themselves."""
        from .step.fused import stack_of

        return stack_of(self.model) if self.fused else None

    @property
    def stack_graphs(self) -> StackGraphs | None:
        """Decode steps of the stack for `generate()` to replay, where they can be captured."""
        stack = self.stack
        if stack is None or stack.device.type != "cuda" or not self.placement.capturable:
            return None
        from .step.graphs import StackGraphs

        if self._stack_graphs is None or self._stack_graphs.stack is not stack:
            self._stack_graphs = StackGraphs(stack)
        return self._stack_graphs

    @property
    def block_size(self) -> int:
        return self.pool.block_size

    @property
    def max_tokens(self) -> int:
        """The longest context that the pool can hold when a request has it alone, beside what is pinned."""
        return (self.pool.num_blocks - self.sharing.num_pinned) * self.pool.block_size

    # --- the doors

    def cache(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, salt: str = ""
    ) -> StrategyCache:
        """A cache for one call of `generate()`: `model.generate(ids, cache=strategy.cache())`.

        It gives its blocks back when it is no longer referenced. Before Transformers 5.24 the keyword is
        `past_key_values`.

        Args:
            input_ids: [B, n] the prompt, so that tokens another request has computed are skipped.
            attention_mask: [B, n] 1 for a token, 0 for padding; as given to `generate()`.
            salt: only calls with the same salt share.
        """
        from .generate import PromptCache, StrategyCache

        return StrategyCache(self) if input_ids is None else PromptCache(self, input_ids, attention_mask, salt)

    def open_table(self, token_ids: Sequence[int], salt: str = "", suspended: Suspended | None = None) -> BlockTable:
        """A block table for a new request, with the blocks that already hold the start of `token_ids`.

        At least the last token is left to compute, since its logits are wanted.

        Args:
            suspended: what `suspend` gave when the request was preempted; brought back where that pays.
        """
        table = BlockTable(self.pool, *self.sharing.match(token_ids[:-1], salt))
        if suspended is None or table.num_tokens + self.block_size > suspended.table.num_seen:
            return table
        return self._resume(suspended, beside=table) or table

    def suspend(self, table: BlockTable) -> Suspended | None:
        """Copy the contents of a table to a lower tier, if there is room: its blocks may be given back then."""
        places = [place for place, block in enumerate(table.blocks) if block != NULL_BLOCK]
        tiers = self.placement.tiers
        if not places or len(places) > tiers.num_places:
            return None
        suspended = Suspended(table.hollow(), {place: uuid.uuid4().bytes for place in places}, tiers)
        for place, key in suspended.keys.items():
            tiers.demote(key, int(table.blocks[place]))
        return suspended

    def _resume(self, suspended: Suspended, beside: BlockTable) -> BlockTable | None:
        """The table as it was, or None: there is no room yet, computing is faster, or a part has been lost."""
        keys, tiers = suspended.keys, self.placement.tiers
        needed = len(keys) + 1
        if needed > self.pool.num_free + self.sharing.num_evictable():
            return None
        if tiers.num_promotable([(key, b"") for key in keys.values()]) < len(keys):
            return None
        beside.release()
        if needed > self.pool.num_free:
            self.num_evictions += self.sharing.evict(needed - self.pool.num_free)
        table = suspended.table
        table.fill(keys)
        if all(tiers.promote(key, int(table.blocks[place])) for place, key in keys.items()):
            return table
        table.release()
        return None

    def count_hit(self, token_ids: Sequence[int], table: BlockTable) -> None:
        """A request was admitted with a table that `open_table` gave."""
        self.num_prompt_tokens += len(token_ids)
        self.num_hit_tokens += table.num_tokens
        self.sharing.count_hit(table.blocks.tolist())

    def num_blocks_for(self, token_ids: Sequence[int], num_tokens: int, chunk: int, salt: str) -> int:
        """The most blocks, pinned ones apart, that this prompt takes at once on its way to `num_tokens`."""
        needed = self.retention.num_blocks(num_tokens, chunk, self.block_size)
        if needed < -(-num_tokens // self.block_size):
            return needed  # it lets go of blocks on the way, and those may be the pinned ones
        return needed - self.sharing.num_pinned_of(token_ids[:-1], salt)

    def has_room(self, table: BlockTable, num_tokens: int, chunk: int) -> bool:
        """Whether `reserve` would find room for `num_tokens` more tokens, `chunk` at a time, in this table alone."""
        total = table.num_tokens + num_tokens
        needed = table.num_new_blocks(num_tokens) - -(-total // self.block_size)
        needed += self.retention.num_blocks(total, chunk, self.block_size)
        return needed <= self.pool.num_free or needed <= self.pool.num_free + self.sharing.num_evictable()

    def reserve(self, rows: Sequence[tuple[BlockTable, int]]) -> None:
        """Make room in each table for so many more tokens: free dead blocks, evict, allocate, copy on write.

        Raises:
            OutOfBlocks: there is not enough room, and no table was changed but for its dead blocks.
        """
        self.retire([table for table, _ in rows])
        needed = sum(table.num_new_blocks(num_tokens) for table, num_tokens in rows)
        if needed > self.pool.num_free:
            self.num_evictions += self.sharing.evict(needed - self.pool.num_free)
        if needed > self.pool.num_free:
            raise OutOfBlocks(
                f"{needed} more blocks of {self.block_size} tokens are needed and {self.pool.num_free} of "
                f"{self.pool.num_blocks} are free"
            )
        copies = [copy for table, num_tokens in rows for copy in table.append(num_tokens)]
        if copies:
            self.placement.copy_blocks(copies)

    def retire(self, tables: Sequence[BlockTable]) -> None:
        """Give back the blocks that no further query of these tables can see."""
        for table in tables:
            first, last = self.retention.dead(table.num_tokens, self.block_size)
            if last > max(first, table.num_dead):
                table.drop(first, last)

    def rebase(self, tables: Sequence[BlockTable]) -> None:
        """Cut dead blocks out of long rows and turn the keys behind them, so that token indices stay small.

        For those who take positions from the plan: afterwards a token stands at another index of its row. A table whose
        shared blocks find no room to be copied is left for a later step.
        """
        for table in tables:
            first, last = self.retention.stale(table.num_tokens, self.block_size)
            if first == last:
                continue
            self.retire([table])
            lacking = table.num_shared(last) - self.pool.num_free
            if lacking > 0 and self.sharing.evict(lacking) < lacking:
                continue
            copies = table.rebase(first, last)
            if copies:
                self.placement.copy_blocks(copies)
            blocks = torch.from_numpy(table.blocks[first:].astype("int64"))
            for layer in self.placement.key_layers():
                self.retention.move_keys(layer, blocks.to(layer.k.device), (first - last) * self.block_size)

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Forget all tokens of a table after the first `num_tokens`.

        Raises:
            ValueError: what the next token sees has been given back already.
        """
        if self.retention.dead(num_tokens, self.block_size)[1] < table.num_dead and num_tokens:
            raise ValueError(
                f"cannot go back to {num_tokens} of {table.num_tokens} tokens: what the next token sees there has left "
                f"the window of {self.retention.window} tokens, and its blocks are given back"
            )
        table.truncate(num_tokens)

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
        layer = self.placement.open(layer_idx, plan)
        self.codec.write(layer, plan.slot_mapping, key, value, query, rotary)
        own = {"key": key, "value": value} if self.codec.lossless else {}  # else what comes later reads other bytes
        out = self.placement.read(
            layer_idx,
            query,
            layer,
            plan,
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
            ValueError: shorter than a block, or the strategy keeps nothing for later.
            OutOfBlocks: it does not fit; what was computed of it is cached as usual.
        """
        return self.sharing.preload(self, token_ids, salt)

    def forget(self, token_ids: Sequence[int], salt: str = "") -> None:
        """Undo `preload`: the blocks stay cached until their room is needed."""
        self.sharing.forget(token_ids, salt)

    def save(self, path: str | Path) -> int:
        """Write all blocks that are kept for later requests to a file. Returns how many. See `saved.save`."""
        return self.sharing.save(path, self.placement)

    def load(self, path: str | Path) -> Loaded:
        """Take in what `save` has written, as far as free blocks go. See `saved.load`."""
        return self.sharing.load(path, self.placement)

    # --- looking after it

    def stats(self) -> dict[str, object]:
        """What the pool holds and what has moved. Bytes are what the allocators have set aside for blocks."""
        held = self.sharing.held_blocks()
        num_cached = sum(self.pool.ref_counts[block] == 1 for block in set(held))
        live = [table for table in self.pool.tables if (table.blocks != NULL_BLOCK).any()]
        tokens = sum(table.num_live for table in live)
        places = sum(int((table.blocks >= 0).sum()) for table in live) * self.block_size
        kv_bytes = self.placement.bytes_per_tier()
        return {
            "strategy": self.name,
            "block_size": self.block_size,
            "num_blocks": self.pool.num_blocks,
            "blocks_used": self.pool.num_used - num_cached,
            "blocks_free": self.pool.num_free,
            "blocks_cached": num_cached,
            "tokens_stored": tokens,
            "token_places": places,
            "kv_bytes": sum(kv_bytes.values()),
            "kv_bytes_per_tier": kv_bytes,
            "bytes_per_token": self.shape.bytes_per_token(self.codec, self.block_size),
            "blocks_pinned": self.sharing.num_pinned,
            "prompt_tokens": self.num_prompt_tokens,
            "hit_tokens": self.num_hit_tokens,
            "evictions": self.num_evictions,
            **self.placement.stats(),
        }

    def check_integrity(self) -> None:
        """Raises AssertionError where the books of the pool do not balance (a bug of ours)."""
        self.pool.check_integrity(self.sharing.held_blocks())

    def reset(self) -> None:
        """Forget everything that is cached. Requests and caches in use must have ended.

        Raises:
            RuntimeError: some are still in use.
        """
        in_use = sum(table.num_tokens > 0 for table in self.pool.tables)
        if in_use:
            raise RuntimeError(f"{in_use} block tables are in use; finish their requests or drop their caches first")
        self.sharing.clear()
        self.placement.tiers.clear()
        self.num_prompt_tokens = self.num_hit_tokens = self.num_evictions = 0


@dataclass(frozen=True)
class KVShape:
    """What a model's K and V look like, read from its weights: tensor parallelism leaves them fewer heads than the
    config says.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    layer_devices: list[torch.device]

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> KVShape:
        attentions = [layer.self_attn for layer in model.model.layers]
        weight = attentions[0].k_proj.weight
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        head_dim = attentions[0].head_dim
        return cls(
            num_kv_heads=local.shape[0] // head_dim,
            head_dim=head_dim,
            dtype=model.dtype,
            layer_devices=[attn.k_proj.weight.device for attn in attentions],
        )

    def planes(self, codec: Codec, block_size: int) -> dict:
        return codec.planes(self.num_kv_heads, block_size, self.head_dim, self.dtype)

    def block_bytes(self, codec: Codec, block_size: int) -> int:
        planes = self.planes(codec, block_size)
        devices = self.layer_devices
        return sum(block_bytes(devices.count(device), planes) for device in dict.fromkeys(devices))

    def bytes_per_token(self, codec: Codec, block_size: int) -> float:
        return self.block_bytes(codec, block_size) / block_size


class Suspended:
    """The table of a preempted request, without blocks, and where their contents are: table position -> key."""

    def __init__(self, table: BlockTable, keys: dict[int, bytes], tiers: LowerTiers):
        self.table, self.keys = table, keys
        weakref.finalize(self, _discard, tiers, list(keys.values())).atexit = False


def _discard(tiers: LowerTiers, keys: list[bytes]) -> None:
    for key in keys:
        tiers.discard(key)
