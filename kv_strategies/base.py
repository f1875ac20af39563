"""The contract of a policy, and the answers of a plain block pool.

A strategy is a block pool and five policies. Each answers one question; none asks what another one is:

| policy      | question                          | here: the null object     | answered in    |
|-------------|-----------------------------------|---------------------------|----------------|
| `Sharing`   | who already holds these tokens?   | `NoSharing`: nobody       | `prefix.py`    |
| `Retention` | which blocks may still be seen?   | `KeepAll`: all of them    | `window.py`    |
| `Placement` | which tier holds these bytes?     | `OnDevice`: the model's   | `offload.py`   |
| `Codec`     | what bytes encode K and V?        | `Plain`: as they come     | `quantized.py` |
| `Selection` | which tokens are worth keeping?   | `KeepAllTokens`: each     | `evict.py`     |

The sixth question, where is token t, is the pool's own (`paged.py`); a `Layout` says no more than how large a block is.
`strategy.py` runs the policies together, `registry.py` puts them together by name.

**To write one**, subclass one of them and override what differs: every method here works as it stands, but for the
three of `Codec`. Options are the keywords of its constructor, with annotations, which `build` checks what it is given
against. What the model is like comes at `bind`.

**Who calls when.** Once, at `build`: the constructor, `bind`, `Codec.planes`, `Placement.allocate`, `identity`,
`Sharing.open`. Once a forward, on integers: `Sharing.follow` where the model has changed; `Sharing.match` for a new
row; `Selection.choose` and `Placement.compact` where a row shrinks; `Retention.dead`, `Sharing.evict` and
`Placement.copy_blocks` to make room; the plan; after the forward `Sharing.publish`. Once a layer, on tensors:
`Placement.open`, the codec's `encode`, `Retention.sink_query`, `Placement.read` (which decodes and masks), then
`Placement.close`.

**What it may not do.** Per layer: no `.item()`, no wait for the device, no allocation whose size depends on values;
this is what a CUDA graph could not hold. It never runs a forward (a door's work), never keeps a `Plan` (its memory is
filled again), never writes to a block that it does not own alone.

**What is checked** at `build` (`contract.py`), by name: misspelt overrides, arguments that differ, a codec that does
not give back the shapes it was given or loses what it calls lossless, a mask that shows what has been given back.

Shapes: T packed query tokens of B rows, Hq query heads in groups over Hkv heads of K and V, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .kernels import Kernels, compact
from .paged import BlockPool, BlockTable, Ranges
from .step.defaults import current
from .step.plan import LayerStore, Plan
from .step.sampling import to_device
from .step.store import BlockStore, KVShape, Planes, block_bytes, layers_of
from .tiers.lower import LowerTiers
from .tiers.saved import Loaded


@dataclass(frozen=True)
class Site:
    """What a policy may know of the model and the pool that it works for."""

    shape: KVShape  # heads, head dim, dtype and the device of each layer
    block_size: int  # tokens a block
    rotary_emb: nn.Module  # the model's own: `inv_freq` [D / 2], `rope_type`
    num_ranks: int = 1  # processes that hold the model together, and have to find the same without asking


class Policy:
    """What all policies have in common."""

    question: str  # as a preset names it: "layout", "sharing", "retention", "placement" or "codec"
    options: dict[str, object] = {}  # noqa: RUF012  what it was built with, defaults included; set by `build`

    def bind(self, site: Site) -> None:
        """Called once, before anything else is. Raises ValueError where the policy cannot serve such a model."""

    def identity(self) -> dict[str, object]:
        """What K and V in the blocks depend on through this policy, as JSON values: two strategies exchange blocks (in
        a file, say) only where all their policies say the same. By default the class and its options; {} is for those
        that change no number, whatever their options.
        """
        return {"policy": f"{type(self).__module__}.{type(self).__qualname__}", **self.options}


class Layout(Policy):
    """Where is token t? Here: in blocks of 16 tokens, or of as many as `build` is told."""

    question = "layout"

    def block_size(self, asked: int | None, longest: int) -> int:
        """Tokens a block, for a model of contexts of at most `longest` tokens."""
        return 16 if asked is None else asked


class Sharing(Policy):
    """Who already holds these tokens? Here: nobody, every request computes its own."""

    question = "sharing"
    num_pinned = 0  # blocks that are kept whatever happens

    def open(self, pool: BlockPool, identity: dict[str, object], tiers: LowerTiers) -> None:
        """The pool to share from, what K and V depend on beside the tokens (`tiers/identity.py`), and where evicted
        blocks may go.
        """

    def join(self, placement: Placement, weights: Callable[[], str | None]) -> None:
        """Called after `open`: where K and V lie, and what gives the hash of the model's weights, None where other
        processes cannot be told all that K and V depend on. For who shares with them.

        Raises:
            ValueError: it cannot be done with what the options say.
        """

    def follow(self, content: int) -> None:
        """The model has changed, and what is published from here on belongs to its state of this number: `match` gives
        nothing of another one, until the model is in that again.
        """

    def match(self, token_ids: Sequence[int], salt: str) -> tuple[list[int], int]:
        """The blocks that hold the start of `token_ids`, one reference each to the caller, and how many tokens: all of
        full blocks. Only what was published with this salt. Where it raises, no reference has been given.
        """
        return [], 0

    def publish(self, token_ids: Sequence[int], table: BlockTable, salt: str) -> None:
        """Offer the full blocks of `table`, which hold the first `table.num_tokens` of `token_ids`, to others. Called
        when their K and V have been computed.
        """

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

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance (a bug of ours)."""

    def count_hit(self, blocks: Iterable[int]) -> None:
        """A request that begins with these shared blocks was admitted."""

    def num_pinned_of(self, token_ids: Sequence[int], salt: str) -> int:
        """How many pinned blocks a request with this prompt shares."""
        return 0

    def pin(self, token_ids: Sequence[int], salt: str) -> int:
        """Keep what is published of these tokens until `forget` has been called as often. Returns how many tokens that
        are.
        """
        raise self._refusal("preload")

    def forget(self, token_ids: Sequence[int], salt: str) -> None:
        """Undo one `pin`."""
        raise self._refusal("forget")

    def save(self, path: str | Path, placement: Placement, weights: str = "") -> int:
        """See `Strategy.save`. `weights` is the hash of the model's, which blocks in a file depend on as well."""
        raise self._refusal("save")

    def load(self, path: str | Path, placement: Placement, weights: str = "") -> Loaded:
        """See `Strategy.load`."""
        raise self._refusal("load")

    def stats(self) -> dict[str, object]:
        """What has moved between processes."""
        return {}

    def _refusal(self, what: str) -> ValueError:
        return ValueError(f"{what} needs a strategy that keeps blocks for later requests: build it with 'prefix'")


class NoSharing(Sharing):
    """The null object."""


class Retention(Policy):
    """Which blocks may still be seen? Here: all of them.

    A mask is what `visible` says. The fast kernels know `window` and `sinks`; where `visible` is overridden, the
    reference kernels serve.
    """

    question = "retention"
    window = 0  # tokens that a query sees, itself included; 0 for all
    sinks = 0  # first tokens of the row that stay visible

    def visible(self, position: Tensor, index: Tensor) -> Tensor:
        """Which tokens of its row a query sees, beside those after it, which nobody does.

        Args:
            position: [n, 1] int64, index of the query in its row; index: [m] int64, of the tokens.

        Returns:
            [n, m] bool
        """
        seen = torch.ones(len(position), len(index), dtype=torch.bool, device=index.device)
        return (index > position - self.window) | (index < self.sinks) if self.window else seen

    def dead(self, num_tokens: int, block_size: int) -> Ranges:
        """First and last + 1 table index of the stretches of blocks that no query from token `num_tokens` on can see.

        Of full blocks before that token; once dead, dead for ever.
        """
        return ()

    def num_visible(self, num_tokens: int) -> int:
        """The most tokens that a query of a row of `num_tokens` sees: how far apart it has to tell positions."""
        return num_tokens

    def num_blocks(self, num_tokens: int, chunk: int, block_size: int) -> int:
        """The most blocks that a row holds at once on its way to `num_tokens`, fed `chunk` tokens at a time: never
        fewer for more tokens, since a request is accepted by what it takes at its end.
        """
        return -(-num_tokens // block_size)

    def sink_query(self, query: Tensor, plan: Plan) -> Tensor | None:
        """What stands in for the queries [T, Hq, D] where they meet the sinks; None for the queries themselves."""
        return None

    def stale(self, num_tokens: int, block_size: int) -> tuple[int, int]:
        """First and last + 1 table index of the dead blocks to cut out, so that indices stay small; mostly none."""
        return 0, 0

    def turn_keys(self, keys: Tensor, num_tokens: int) -> Tensor:
        """Keys [.., D] float32 as if their tokens stood `num_tokens` further on. Needed where `stale` cuts."""
        raise NotImplementedError


class KeepAll(Retention):
    """The null object."""

    def identity(self) -> dict[str, object]:
        return {}


class Codec(Policy):
    """What bytes encode K and V? A codec says how to make them of numbers, and numbers of them, a token at a time.

    Where they go, and that keys are rotated before, is the kernels' business.
    """

    question = "codec"
    lossless = False  # what is decoded is what was encoded, to the bit
    #: Whether the fast kernels encode and decode these planes by themselves: numbers of the model's dtype, or codes of
    #: int8, float8_e4m3fn or 4 bits (`kernels.reference.quantise`) with a scale a token and head. Elsewhere the
    #: reference kernels serve, and call the methods.
    in_kernels = False

    def planes(self, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Planes:
        """What a layer stores of one block, name -> (shape, dtype): "k" and "v" [Hkv, block_size, ..] and, if there are
        any, "k_scale" and "v_scale" [Hkv, block_size, ..].
        """
        raise NotImplementedError

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """K or V [.., D] of any float dtype -> codes [.., as the planes say] and scales, None where there are none."""
        raise NotImplementedError

    def encode_values(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Likewise of V alone, where its bytes are others than those of K."""
        return self.encode(states)

    def decode(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        """The reverse, of K and V -> [.., D] float32."""
        raise NotImplementedError


class Plain(Codec):
    """The null object: numbers of the model's own dtype."""

    lossless = in_kernels = True

    def bind(self, site: Site) -> None:
        self._dtype = site.shape.dtype

    def planes(self, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Planes:
        shape = (num_kv_heads, block_size, head_dim)
        return {"k": (shape, dtype), "v": (shape, dtype)}

    def encode(self, states: Tensor) -> tuple[Tensor, None]:
        return states.to(self._dtype), None

    def decode(self, codes: Tensor, scale: None) -> Tensor:
        return codes.float()

    def identity(self) -> dict[str, object]:
        return {}  # the planes say the dtype


class Selection(Policy):
    """Which tokens are worth keeping? Here: all of them.

    A row is *compacted* at the end of its prompt, and perhaps as it grows: each KV head keeps the tokens that it
    chooses, all heads of all layers equally many, and the blocks that this empties go back to the pool.
    """

    question = "selection"
    name = "the selection"  # as errors call it
    num_queries = 0  # how many of the last queries of a row `choose` wants, at most `step.plan.RING_SIZE`
    reads_values = False  # whether it wants V
    every: int | None = None  # tokens that a row may grow by before it is compacted again; None for no further time

    def cap(self, num_prompt: int) -> int:
        """How many tokens a row keeps of those of its prompt, and whenever it is compacted again."""
        return num_prompt

    def num_recent(self, num_kept: int) -> int:
        """How many of the newest tokens are among those kept in any case."""
        return 0

    def open(self, num_tokens: int) -> None:
        """The pool holds so many tokens. Raises ValueError where that cannot serve."""

    def choose(
        self,
        layer_ids: Sequence[int],
        keys: Tensor,
        values: Tensor | None,
        queries: Tensor | None,
        num_kept: int,
        position: int,
    ) -> tuple[Tensor, Tensor]:
        """The tokens of a row that each head of some layers keeps. Called for all layers before any of them changes.

        Args:
            layer_ids: of l layers.
            keys, values: [l, Hkv, n, D] as they are stored, decoded; queries: [l, Hq, m, D] of the last m tokens, which
                have come one behind the other. See `scores.Score.score`.
            num_kept: fewer than n.
            position: of the newest token.

        Returns:
            indices [l, Hkv, num_kept] int64, ascending, and whether those of a layer can be trusted, bool [l].

        Raises:
            Unsound: they cannot, and why.
        """
        raise NotImplementedError

    def choosing_bytes(self, num_keys: int, num_tokens: int, shape: KVShape) -> int:
        """Bytes that `choose` takes at most beside what it is given: so many keys of all heads of some layers, which
        are `num_tokens` of each. For who plans ahead.
        """
        return 0

    def num_blocks(self, num_prompt: int, num_tokens: int, block_size: int, is_shared: bool) -> int:
        """The most blocks that a row with a prompt of `num_prompt` tokens holds at once on its way to `num_tokens`.

        Args:
            is_shared: others may hold its blocks as well, so that survivors need blocks of their own beside them.
        """
        return -(-num_tokens // block_size)


class Unsound(ValueError):
    """What was to say which tokens to keep did not."""


class KeepAllTokens(Selection):
    """The null object."""

    def identity(self) -> dict[str, object]:
        return {}


class Placement(Policy):
    """Which tier holds these bytes? Here: the device of each layer, K and V alike."""

    question = "placement"
    tiers = LowerTiers()
    capturable = True  # whether a decode step may be recorded as a CUDA graph
    reads_some = False  # whether a read leaves tokens out
    prefill_capturable = True  # whether a step with new tokens of a prompt may be, too
    prefetches = True  # whether what comes over the link comes while something else is computed

    # Memory

    def bytes_per_block(self, planes: Planes, layer_devices: list[torch.device]) -> dict[torch.device, int]:
        """What one block of the pool takes of the memory of each device."""
        return {device: block_bytes(layer_devices.count(device), planes) for device in dict.fromkeys(layer_devices)}

    def allocate(self, num_blocks: int, planes: Planes, layer_devices: list[torch.device]) -> None:
        """Set the memory of `num_blocks` blocks aside."""
        self.stores: dict[torch.device, BlockStore] = {}
        self._layers: list[LayerStore] = []
        for device in dict.fromkeys(layer_devices):
            self.stores[device] = BlockStore(num_blocks, layer_devices.count(device), planes, device)
        seen = dict.fromkeys(self.stores, 0)
        for device in layer_devices:
            self._layers.append(self.stores[device].layer(seen[device]))
            seen[device] += 1
        self._layers_of = layers_of(layer_devices)

    def read_bytes(self, num_tokens: int, planes: Planes, site: Site, is_decode: bool) -> tuple[int, int | None]:
        """What a forward reads for a row that sees `num_tokens`, a decode step or one over a prompt: bytes of the
        devices' memory, and bytes that come over the link from the host; None where only the text says how many.
        """
        return block_bytes(len(site.shape.layer_devices), planes) * num_tokens // site.block_size, 0

    # Once a layer

    def open(self, layer_idx: int, plan: Plan) -> LayerStore:
        """The K and V of a layer, ready to be written and read."""
        return self._layers[layer_idx]

    def read(self, layer_idx: int, query: Tensor, layer: LayerStore, plan: Plan, kernels: Kernels, **options) -> Tensor:
        """Attention [T, Hq, D] of the queries over an open layer. All options go to the kernels, see
        `kernels.attention`; what one of them does not know, it refuses.
        """
        return kernels.attention(query, layer, plan, **options)

    def close(self, layer_idx: int, plan: Plan) -> None:
        """The attention of this layer has been launched."""

    # Between forwards

    def layers(self) -> Iterable[LayerStore]:
        """K and V of every layer where they lie, to be read, and K to be changed, between two steps."""
        return self._layers

    def planes(self) -> list[dict[str, Tensor]]:
        """For each device of layers, in their order, the planes in all layers of that device where they lie, to be read
        and changed between two steps: name -> [num_blocks, L, Hkv, block_size, ..].
        """
        return [store.planes for store in self.stores.values()]

    def compact(self, sources: Sequence[int], targets: Sequence[int], kept: Sequence[Tensor]) -> None:
        """Move survivors of one row into its first blocks: what stood in `sources` at index kept[l, h, j] of the row
        stands in `targets` at index j, for layer l and head h.

        Args:
            targets: each of them is free of others' tokens: it is the same in `sources`, or not in there.
            kept: for each device of layers, in their order, [L, Hkv, m] int64, ascending.
        """
        for planes, index in zip(self.planes(), kept, strict=True):
            source, target = to_device([*sources, *targets], index.device).split([len(sources), len(targets)])
            for plane in planes.values():
                with current(plane.device):
                    compact(plane, source, target, index)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) blocks of all layers."""
        for store in self.stores.values():
            store.copy_blocks([source for source, _ in copies], [destination for _, destination in copies])

    def read_blocks(self, blocks: list[int]) -> Tensor:
        """Whole blocks, copied to the host: [n, bytes] uint8, K of all layers in their order, on whatever devices they
        are, then V, then any scales.
        """
        num_bytes = sum(plane[0].numel() * plane.element_size() for home in self.planes() for plane in home.values())
        data = torch.empty(len(blocks), num_bytes, dtype=torch.uint8)
        for piece, plane, there in self._pieces(data):
            piece[:, there] = plane[torch.tensor(blocks, device=plane.device)].flatten(2).cpu()
        return data

    def write_blocks(self, blocks: list[int], data: Tensor) -> None:
        """Put back what `read_blocks` gave, into these blocks."""
        for piece, plane, there in self._pieces(data):
            layers = piece[:, there].to(plane.device)
            plane[torch.tensor(blocks, device=plane.device)] = layers.view(-1, *plane.shape[1:])

    def _pieces(self, data: Tensor) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Of whole blocks [n, bytes], for each plane and device: the plane in all layers [n, L, bytes], where it lies
        on that device [num_blocks, layers there, ..] uint8, and which layers these are.
        """
        homes, begin = self.planes(), 0
        for name in homes[0]:
            planes = [home[name].view(torch.uint8) for home in homes]
            end = begin + sum(plane[0].numel() for plane in planes)
            piece = data[:, begin:end].unflatten(1, (len(self._layers), -1))
            for plane, there in zip(planes, self._layers_of, strict=True):
                yield piece, plane, there
            begin = end

    # Figures

    def bytes_per_tier(self) -> dict[str, int]:
        """Bytes that the blocks take, for every tier in use."""
        tiers: dict[str, int] = {}
        for device, store in self.stores.items():
            tiers[device.type] = tiers.get(device.type, 0) + store.num_bytes
        return tiers

    def stats(self) -> dict[str, object]:
        """What has moved between tiers, and what was left out of it."""
        return {"bytes_to_device": 0, "bytes_to_host": 0, **self.tiers.stats()}


class OnDevice(Placement):
    """The null object."""

    def identity(self) -> dict[str, object]:
        return {}


@dataclass
class Policies:
    """The answers that make a strategy. They start as those of a plain block pool; each part of a name changes one."""

    layout: Layout = field(default_factory=Layout)
    sharing: Sharing = field(default_factory=NoSharing)
    retention: Retention = field(default_factory=KeepAll)
    placement: Placement = field(default_factory=OnDevice)
    codec: Codec = field(default_factory=Plain)
    selection: Selection = field(default_factory=KeepAllTokens)
