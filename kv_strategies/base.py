"""The questions that a strategy answers, and the answers of a plain block pool.

| policy      | question                          | null object here | answered in    |
|-------------|-----------------------------------|------------------|----------------|
| `Sharing`   | who already holds these tokens?   | nobody           | `prefix.py`    |
| `Retention` | which blocks may still be seen?   | all of them      | `window.py`    |
| `Placement` | which tier holds these bytes?     | the model's own  | `offload.py`   |
| `Codec`     | what bytes encode K and V?        | as they come     | `quantized.py` |

The fifth question, where is token t, is the pool's own (`paged.py`). No policy asks what another one is. `strategy.py`
runs them together, `strategies.py` puts them together by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernels import attention, store_kv
from .kernels.linear import Rotary
from .paged import BlockPool, BlockTable
from .step.plan import LayerStore, Plan
from .step.store import BlockStore, block_bytes

if TYPE_CHECKING:
    from .strategy import Strategy
    from .tiers.saved import Loaded


class Sharing:
    """Who already holds these tokens? Here: nobody, every request computes its own."""

    def match(self, token_ids: Sequence[int], salt: str) -> tuple[list[int], int]:
        """The blocks that hold the start of `token_ids`, one reference each to the caller, and how many tokens."""
        return [], 0

    def publish(self, token_ids: Sequence[int], table: BlockTable, salt: str) -> None:
        """Offer the full blocks of `table`, which hold the first `table.num_tokens` of `token_ids`, to others."""

    def evict(self, num_blocks: int) -> int:
        """Give back up to `num_blocks` blocks that no request uses. Returns how many."""
        return 0

    def num_evictable(self) -> int:
        """How many blocks `evict` could give back."""
        return 0

    def held_blocks(self) -> list[int]:
        """The blocks kept for later hits, one entry a reference."""
        return []

    def clear(self) -> None:
        """Forget everything, and give all held blocks back."""

    def open(self, pool: BlockPool, identity: dict[str, object], tiers: LowerTiers) -> None:
        """Called once: the pool to share from, what K and V depend on beside the tokens (see `identity.py`), and where
        evicted blocks may go.
        """

    def count_hit(self, blocks: Iterable[int]) -> None:
        """A request that begins with these shared blocks was admitted."""

    num_pinned = 0  # blocks that are kept whatever happens

    def num_pinned_of(self, token_ids: Sequence[int], salt: str) -> int:
        """How many pinned blocks a request with this prompt shares."""
        return 0

    def preload(self, strategy: Strategy, token_ids: Sequence[int], salt: str) -> int:
        """See `Strategy.preload`."""
        raise self._refusal("preload")

    def forget(self, token_ids: Sequence[int], salt: str) -> None:
        """See `Strategy.forget`."""
        raise self._refusal("forget")

    def save(self, path: str | Path, placement: Placement) -> int:
        """See `Strategy.save`."""
        raise self._refusal("save")

    def load(self, path: str | Path, placement: Placement) -> Loaded:
        """See `Strategy.load`."""
        raise self._refusal("load")

    def _refusal(self, what: str) -> ValueError:
        return ValueError(f"{what} needs a strategy that keeps blocks for later requests: build it with 'prefix'")


class Retention:
    """Which blocks may still be seen? Here: all of them."""

    window = 0  # tokens that a query sees, itself included; 0 for all
    sinks = 0  # first tokens of the row that stay visible

    def dead(self, num_tokens: int, block_size: int) -> tuple[int, int]:
        """First and last + 1 table position of the blocks that no query from token `num_tokens` on can see."""
        return 0, 0

    def num_visible(self, num_tokens: int) -> int:
        """The most tokens that a query of a row of `num_tokens` sees: how far apart it has to tell positions."""
        return num_tokens

    def num_blocks(self, num_tokens: int, chunk: int, block_size: int) -> int:
        """The most blocks that a row of `num_tokens`, fed `chunk` tokens at a time, holds at once."""
        return -(-num_tokens // block_size)

    def sink_query(self, query: Tensor, plan: Plan) -> Tensor | None:
        """What stands in for the queries [T, Hq, D] where they meet the sinks; None for the queries themselves."""
        return None

    def stale(self, num_tokens: int, block_size: int) -> tuple[int, int]:
        """First and last + 1 table position of the dead blocks to cut out, so that indices stay small; mostly none."""
        return 0, 0

    def move_keys(self, layer: LayerStore, blocks: Tensor, num_places: int) -> None:
        """Turn the keys of `blocks` as if their tokens stood `num_places` further on."""


class Codec:
    """What bytes encode K and V? Here: the model's own dtype."""

    lossless = True  # what is read is what was written

    def planes(self, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> dict:
        """Name -> (shape of one layer of one block, dtype), see `BlockStore`."""
        shape = (num_kv_heads, block_size, head_dim)
        return {"k": (shape, dtype), "v": (shape, dtype)}

    def write(
        self,
        layer: LayerStore,
        slot_mapping: Tensor,
        key: Tensor,
        value: Tensor,
        query: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        """Store K and V [T, Hkv, D] of the tokens at their slots; with `rotary`, queries and keys are rotated first."""
        store_kv(key, value, layer, slot_mapping, query, rotary)


class LowerTiers:
    """Where the contents of idle blocks go when a block is given to others. Here: nowhere, they are computed again.

    A key names the contents of one block, all layers, K and V.
    """

    num_places = 0  # blocks that can be kept at once

    def demote(self, key: bytes, block: int, tokens: bytes = b"") -> None:
        """Keep a copy of `block`, which holds `tokens`, under `key`. It may be overwritten as soon as this returns."""

    def num_promotable(self, wanted: Iterable[tuple[bytes, bytes]]) -> int:
        """How many of the first (key, tokens) of `wanted` are kept, and faster fetched than computed again."""
        return 0

    def promote(self, key: bytes, block: int) -> bool:
        """Fill `block` with what is kept under `key`, which is then forgotten. False where it has been lost."""
        return False

    def discard(self, key: bytes) -> None:
        """Forget `key`, if it is kept."""

    def stats(self) -> dict[str, object]:
        return {}

    def clear(self) -> None:
        """Forget everything."""


class Placement:
    """Which tier holds these bytes? Here: the device of each layer, K and V alike."""

    reads = "all"  # else what a lossy read leaves out, since K and V of later layers depend on it

    tiers = LowerTiers()
    capturable = True  # whether a decode step may be recorded as a CUDA graph
    prefill_capturable = True  # whether a step with new tokens of a prompt may be, too

    def bytes_per_block(self, planes: dict, layer_devices: list[torch.device]) -> dict[torch.device, int]:
        """What one block of the pool takes of the memory of each device."""
        return {device: block_bytes(layer_devices.count(device), planes) for device in dict.fromkeys(layer_devices)}

    def allocate(self, num_blocks: int, planes: dict, layer_devices: list[torch.device]) -> None:
        self.stores: dict[torch.device, BlockStore] = {}
        self._layers: list[LayerStore] = []
        for device in dict.fromkeys(layer_devices):
            self.stores[device] = BlockStore(num_blocks, layer_devices.count(device), planes, device)
        seen = dict.fromkeys(self.stores, 0)
        for device in layer_devices:
            self._layers.append(self.stores[device].layer(seen[device]))
            seen[device] += 1

    def open(self, layer_idx: int, plan: Plan) -> LayerStore:
        """The K and V of a layer, ready to be written and read."""
        return self._layers[layer_idx]

    def read(self, layer_idx: int, query: Tensor, layer: LayerStore, plan: Plan, **options) -> Tensor:
        """Attention [T, Hq, D] of the queries over an open layer. Options as in `kernels.attention`."""
        return attention(query, layer, plan, **options)

    def close(self, layer_idx: int, plan: Plan) -> None:
        """The attention of this layer has been launched."""

    def key_layers(self) -> Iterable[LayerStore]:
        """The K of every layer where it lies, to be changed between two steps. V need not be there."""
        return self._layers

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) blocks of all layers."""
        for store in self.stores.values():
            store.copy_blocks([source for source, _ in copies], [destination for _, destination in copies])

    def read_blocks(self, blocks: list[int]) -> Tensor:
        """Whole blocks, copied to the host: [n, bytes] uint8, K of all layers, then V, then any scales."""
        stores = list(self.stores.values())
        return torch.cat([store.read(name, blocks) for name in stores[0].planes for store in stores], dim=1)

    def write_blocks(self, blocks: list[int], data: Tensor) -> None:
        """Put back what `read_blocks` gave, into these blocks."""
        stores = list(self.stores.values())
        for name in stores[0].planes:
            for store in stores:
                size = store.bytes_of(name)
                store.write(name, blocks, data[:, :size])
                data = data[:, size:]

    def bytes_per_tier(self) -> dict[str, int]:
        """Bytes that the blocks take, for every tier in use."""
        tiers: dict[str, int] = {}
        for device, store in self.stores.items():
            tiers[device.type] = tiers.get(device.type, 0) + store.num_bytes
        return tiers

    def stats(self) -> dict[str, object]:
        """What has moved between tiers, and what was left out of it."""
        return {"bytes_to_device": 0, "bytes_to_host": 0, **self.tiers.stats()}


@dataclass
class Spec:
    """What a strategy is built from. It starts as a plain block pool, and each part of the name changes its answer."""

    block_size: int = 16
    sharing: Sharing = field(default_factory=Sharing)
    retention: Retention = field(default_factory=Retention)
    placement: Placement = field(default_factory=Placement)
    codec: Codec = field(default_factory=Codec)
