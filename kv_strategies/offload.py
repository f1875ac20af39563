"""Offload: which tier holds these bytes?

Keys decide where a query looks, values are what it takes from there. So all keys are needed at every step, and of the
values only those that carry weight: KCache (He and Wu, 2024, arXiv 2404.18057) keeps K on the GPU and V in host memory.
Blocks keep their numbers; half of each lies on the other side of the link:

    block 7    K of all layers: GPU             V of all layers: page-locked host memory

A prompt's V goes out as it is computed, a step's V token by token. Three ways to read it back:

    exact    all V of a layer streams to the GPU while the layer before works (`stream.py`): lossless, at the rate of
             the link
    top_n    every head fetches the V of its N heaviest tokens, from inside the attention kernel
             (`kernels/blocks/topn.py`): N rows in place of a context
    mass     likewise, with N chosen per head and step so that the kept softmax mass reaches the bound, which bounds the
             error; what was dropped is counted

The lossy reads are for decode steps, rows with one new token; longer ones always attend exactly. `resident` says what
stays on the GPU: "k" is KCache, with "none" both K and V stream, with "kv" nothing does. With `host_bytes` idle blocks
move to host memory, and with `disk_path` on to a disk, instead of being evicted for good (`tiers/`).

A model on a CPU reads host memory where it lies: nothing streams, and what a GPU would fetch is counted.

Saves: half of the KV memory of a GPU, or all but a few layers of it. Costs: exact, a step takes bytes / link rate,
80 ms for 4 GB of V; top_n, what the dropped mass is worth, which the benchmark measures.

    python -m kv_strategies.offload      shows the mass that N tokens cover, and where the bytes lie
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .base import Placement, Site
from .kernels import Kernels
from .kernels.blocks.topn import TALLY, new_tally
from .step.plan import LayerStore, Plan
from .step.store import BlockStore, block_bytes, layers_of
from .tiers.disk import Disk
from .tiers.host import Home, Tiers
from .tiers.rates import PrefillClock, Rates
from .tiers.stream import LayersInPlace, LayerStream


class Offload(Placement):
    """K on the GPU and V in host memory, or what else the options say.

    Args:
        top_n: tokens whose V a head reads in a decode step; None for all.
        mass: instead of `top_n`, the softmax mass that they must reach, in (0, 1].
        renormalise: divide by the mass that was kept (see `kernels/blocks/topn.py`).
        resident: what stays on the GPU: "k", "none" or "kv".
        host_bytes: host memory that this may take, for what is not resident first and idle blocks with the rest.
        disk_path, disk_bytes: a folder, and how much of it idle blocks may take that host memory has no room for.

    Raises:
        ValueError: options out of range, or that make no sense together.
    """

    prefill_capturable = False  # prompts are timed (`PrefillClock`), and mostly stream

    def __init__(
        self,
        *,
        top_n: int | None = None,
        mass: float | None = None,
        renormalise: bool = False,
        resident: str = "k",
        host_bytes: int | None = None,
        disk_path: str | Path | None = None,
        disk_bytes: int | None = None,
    ):
        if top_n is not None and mass is not None:
            raise ValueError(f"give top_n or mass, not both: got top_n={top_n} and mass={mass}")
        if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
            raise ValueError(f"top_n must be a whole number of at least 1, got {top_n!r}; leave it out for exact reads")
        if mass is not None and not 0 < mass <= 1:
            raise ValueError(f"mass must be in (0, 1], got {mass}; leave it out for exact reads")
        if resident not in ("k", "none", "kv"):
            raise ValueError(f"resident must be 'k', 'none' or 'kv', got {resident!r}")
        self.reads_some = top_n is not None or mass is not None
        if self.reads_some and resident != "k":
            raise ValueError(
                f"top_n and mass read K on the GPU and V on the host: resident must be 'k', not {resident!r}"
            )
        if renormalise and not self.reads_some:
            raise ValueError("renormalise goes with top_n or mass: an exact read drops nothing")
        for option, num_bytes in (("host_bytes", host_bytes), ("disk_bytes", disk_bytes)):
            if num_bytes is not None and num_bytes < 0:
                raise ValueError(f"{option} must be at least 0, got {num_bytes}")
        if (disk_path is None) != (disk_bytes is None):
            raise ValueError("disk_path and disk_bytes go together: a folder, and how much of it to use")
        if disk_path is not None and host_bytes is None:
            raise ValueError("blocks reach the disk through host memory: give host_bytes as well")
        if resident == "kv" and host_bytes is None:
            raise ValueError("with resident='kv' nothing streams: give host_bytes for idle blocks, or another resident")
        self._resident, self._host_bytes, self._num_ranks = resident, host_bytes, 1
        self._disk_path, self._disk_bytes = disk_path, disk_bytes
        self._lossy = {"top_n": top_n or 0, "mass": mass or 0.0, "renormalise": renormalise}
        # An exact step streams by copies that change with the block tables; a graph would repeat those of its capture.
        self.capturable = self.reads_some or resident == "kv"
        self.prefetches = not self.reads_some

    def bind(self, site: Site) -> None:
        self._num_ranks = site.num_ranks

    def identity(self) -> dict[str, object]:
        return {"reads": self._lossy} if self.reads_some else {}

    # --- memory

    def bytes_per_block(self, planes: dict, layer_devices: list[torch.device]) -> dict[torch.device, int]:
        resident, streamed = self._split(planes)
        needed: dict[torch.device, int] = {}
        for device in dict.fromkeys(layer_devices):
            num_layers = layer_devices.count(device)
            if resident:
                needed[device] = needed.get(device, 0) + block_bytes(num_layers, resident)
            if streamed:
                one = block_bytes(1, streamed)
                if not computes_on_host(device):
                    needed[device] = needed.get(device, 0) + min(self._num_buffers, num_layers) * one
                host = torch.device("cpu")
                needed[host] = needed.get(host, 0) + num_layers * one
        return needed

    def read_bytes(self, num_tokens: int, planes: dict, site: Site, is_decode: bool) -> tuple[int, int | None]:
        resident, streamed = self._split(planes)
        num_layers, num_blocks = len(site.shape.layer_devices), -(-num_tokens // site.block_size)
        read = block_bytes(num_layers, resident) * num_tokens // site.block_size
        if not streamed:
            return read, 0
        if is_decode and self._lossy["mass"]:
            return read, None
        if is_decode and self.reads_some:  # a V of its own for every head
            rows = min(self._lossy["top_n"], num_tokens) * num_layers * site.shape.num_heads
            return read, rows * _vector_bytes(streamed)
        fetched = num_layers * block_bytes(1, streamed) * num_blocks
        if computes_on_host(site.shape.layer_devices[0]):
            return read + fetched, 0
        return read + 2 * fetched, fetched  # into a buffer, and out of it

    def allocate(self, num_blocks: int, planes: dict, layer_devices: list[torch.device]) -> None:
        resident, streamed = self._split(planes)
        self._names = list(planes)
        self._devices = [
            _DeviceLayers(
                device, layer_devices.count(device), num_blocks, resident, streamed, self._num_buffers, self.reads_some
            )
            for device in dict.fromkeys(layer_devices)
        ]
        by_device = {home.device: home for home in self._devices}
        seen = dict.fromkeys(by_device, 0)
        self._layers: list[tuple[_DeviceLayers, int]] = []
        for device in layer_devices:
            self._layers.append((by_device[device], seen[device]))
            seen[device] += 1
        self._layers_of = layers_of(layer_devices)
        rates = Rates(decide=self._num_ranks == 1)
        self._clock = PrefillClock(rates.prefill, layer_devices)
        if self._host_bytes is not None:
            self._add_tiers(num_blocks, next(iter(planes.values()))[0][1], rates)

    @property
    def _num_buffers(self) -> int:
        """Layers on the device at once: one attends while the next arrives. Where only prompts stream one is enough, as
        they have other work to hide a copy behind.
        """
        return 1 if self.reads_some else 2

    def _split(self, planes: dict) -> tuple[dict, dict]:
        """The planes that stay on the device, and those that stream; a scale goes with what it scales."""
        stays = {"k": "k", "none": "", "kv": "kv"}[self._resident]
        resident = {name: plane for name, plane in planes.items() if name[0] in stays}
        return resident, {name: plane for name, plane in planes.items() if name not in resident}

    def _add_tiers(self, num_blocks: int, block_size: int, rates: Rates) -> None:
        homes = [Home(home.memories, home.device, home.settle, home.touched) for home in self._devices]
        one = sum(home.block_bytes for home in homes)
        streamed = sum(home.host_bytes for home in self._devices)
        spare = self._host_bytes - streamed
        wanted = self._resident == "kv" or self._disk_path is not None
        if spare < 0 or (wanted and spare < one):
            pieces = [f"{streamed} for what streams in {num_blocks} blocks"] * bool(streamed)
            pieces += [f"{one} for at least one idle block"] * wanted
            raise ValueError(
                f"host_bytes={self._host_bytes} is too small: {streamed + one * wanted} bytes are needed "
                f"({' and '.join(pieces)})"
            )
        if spare >= one:
            disk = None if self._disk_path is None else Disk(self._disk_path, self._disk_bytes, one)
            self.tiers = Tiers(homes, block_size, spare // one, rates, disk)

    # --- the data plane

    def open(self, layer_idx: int, plan: Plan) -> LayerStore:
        home, layer = self._layers[layer_idx]
        self._clock.open(layer_idx, plan)
        if home.stream is None or self._reads_on_host(plan):
            return home.layers[layer]
        return LayerStore(**home.resident[layer], **home.stream.open(layer, plan))

    def read(self, layer_idx: int, query: Tensor, layer: LayerStore, plan: Plan, kernels: Kernels, **options) -> Tensor:
        num_decodes = plan.num_decodes
        if not self.reads_some or not num_decodes:
            return kernels.attention(query, layer, plan, **options)
        home, index = self._layers[layer_idx]
        is_mixed = not self._reads_on_host(plan)
        if is_mixed:  # the decoding rows read their newest V on the host as well
            home.stream.append(plan)
            home.stream.settle()
        home.num_heads = query.shape[1]
        own = {name: options[name] for name in options if name not in ("key", "value")}  # of prompts, which come later
        decoding = {name: _rows(option, slice(0, num_decodes)) for name, option in own.items()}
        out = kernels.topn_attention(
            query[:num_decodes], home.layers[index], plan, home.tally, **decoding, **self._lossy
        )
        if not is_mixed:
            return out
        rest = plan.once("without the decoding rows", lambda: _without_decodes(plan))
        behind = {name: _rows(option, slice(num_decodes, None)) for name, option in options.items()}
        return torch.cat((out, kernels.attention(query[num_decodes:], layer, rest, **behind)))

    def close(self, layer_idx: int, plan: Plan) -> None:
        home, _ = self._layers[layer_idx]
        if home.stream is not None and not self._reads_on_host(plan):
            home.stream.close(plan)
        self._clock.close(layer_idx, plan)

    def _reads_on_host(self, plan: Plan) -> bool:
        """Whether this forward reads and writes V in host memory, where it is, and nothing streams."""
        return self.reads_some and plan.num_decodes == len(plan.query_lens)

    # --- whole blocks

    def layers(self) -> list[LayerStore]:
        for home in self._devices:
            home.synchronize()
        return [home.layers[layer] for home, layer in self._layers]

    def planes(self) -> list[dict[str, Tensor]]:
        for home in self._devices:
            home.synchronize()
        return [{name: home.planes[name] for name in self._names} for home in self._devices]

    def compact(self, sources: Sequence[int], targets: Sequence[int], kept: Sequence[Tensor]) -> None:
        try:
            super().compact(sources, targets, kept)
        finally:
            for home in self._devices:
                home.touched()

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        for home in self._devices:
            home.copy_blocks(list(copies))

    def write_blocks(self, blocks: list[int], data: Tensor) -> None:
        try:
            super().write_blocks(blocks, data)
        finally:
            for home in self._devices:
                home.touched()

    # --- figures

    def bytes_per_tier(self) -> dict[str, int]:
        tiers: dict[str, int] = {}
        for home in self._devices:
            tiers[home.device.type] = tiers.get(home.device.type, 0) + home.device_bytes
            tiers["host"] = tiers.get("host", 0) + home.host_bytes
        if isinstance(self.tiers, Tiers):
            tiers[self._devices[0].device.type] += self.tiers.device_bytes
            tiers["host"] += self.tiers.host_bytes
        return {name: size for name, size in tiers.items() if size}

    def stats(self) -> dict[str, object]:
        streams = [home.stream for home in self._devices if home.stream is not None]
        found = {
            "bytes_to_device": sum(stream.bytes_fetched for stream in streams),
            "bytes_to_host": sum(stream.bytes_appended for stream in streams),
            **self.tiers.stats(),
        }
        if self.reads_some:
            reads, kept, dropped, _ = sum(home.tally.cpu() for home in self._devices).tolist()
            worst = max(float(home.tally[TALLY.index("worst")]) for home in self._devices)
            home = self._devices[0]
            found["bytes_to_device"] += int(kept) * home.vector_bytes
            found["bytes_to_host"] += int(reads) // home.num_heads * home.layers[0].v.shape[1] * home.vector_bytes
            found |= {
                "kept_tokens_mean": kept / reads if reads else None,
                "dropped_mass_mean": dropped / reads if reads else None,
                "dropped_mass_worst": worst if reads else None,
            }
        return found


class _DeviceLayers:
    """The layers of one device: what is resident, and what streams."""

    def __init__(
        self,
        device: torch.device,
        num_layers: int,
        num_blocks: int,
        resident: dict,
        streamed: dict,
        num_buffers: int,
        in_order: bool,
    ):
        self.device, self.stream = device, None
        self._store = BlockStore(num_blocks, num_layers, resident, device)
        self.planes, self.memories = dict(self._store.planes), list(self._store.memories)
        self.resident = [{name: plane[:, layer] for name, plane in self.planes.items()} for layer in range(num_layers)]
        self.tally, self.num_heads, self.vector_bytes = new_tally(device), 1, 0
        self.device_bytes, self.host_bytes = self._store.num_bytes, 0
        if streamed:
            given = num_blocks, num_layers, streamed, device
            if computes_on_host(device):
                self.stream = LayersInPlace(*given)
            else:
                self.stream = LayerStream(*given, num_buffers=num_buffers, in_order=in_order)
            self.planes |= self.stream.planes
            self.memories += self.stream.memories
            self.device_bytes += self.stream.device_bytes
            self.host_bytes = self.stream.host_bytes
            self.vector_bytes = _vector_bytes(streamed)
        names = ("k", "v", "k_scale", "v_scale")
        self.layers = [
            LayerStore(*(self.planes[name][:, layer] if name in self.planes else None for name in names))
            for layer in range(num_layers)
        ]

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        self._store.copy_blocks([source for source, _ in copies], [destination for _, destination in copies])
        if self.stream:
            self.stream.copy_blocks(copies)

    def settle(self) -> None:
        if self.stream:
            self.stream.settle()

    def touched(self) -> None:
        if self.stream:
            self.stream.touched()

    def synchronize(self) -> None:
        """Wait, on the host, for all that is under way."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def computes_on_host(device: torch.device) -> bool:
    """Whether the model of this device reads host memory where it lies, and nothing has to stream."""
    return device.type == "cpu"


def _vector_bytes(planes: dict) -> int:
    """Bytes of the V of one token and head, its scale included."""
    return sum(math.prod(shape[2:]) * dtype.itemsize for name, (shape, dtype) in planes.items() if name[0] == "v")


def _rows(option: object, tokens: slice) -> object:
    """An option of a read for some of the packed tokens: tensors [T, ..] are cut, all else holds for every token."""
    return option[tokens] if torch.is_tensor(option) else option


def _without_decodes(plan: Plan) -> Plan:
    """The rows behind the first num_decodes, as a plan of their own."""
    first = plan.num_decodes
    return replace(
        plan,
        cu_seqlens_q=plan.cu_seqlens_q[first:] - first,
        context_lens=plan.context_lens[first:],
        positions=plan.positions[first:],
        slot_mapping=plan.slot_mapping[first:],
        block_tables=plan.block_tables[first:],
        query_lens=plan.query_lens[first:],
        row_lens=plan.row_lens[first:],
        host_tables=plan.host_tables[first:],
        num_decodes=0,
        row_groups=[],  # theirs are counted from the first row, and nobody has to use them
        groups=None,
        shared_lens=None,
        scratch={},
    )


def main() -> None:
    torch.manual_seed(0)
    context, head_dim = 4096, 64
    print(f"Softmax weights of one query over {context} random keys, by how sharp attention is.\n")
    counts = (16, 32, 64, 128, 256)
    print(f"{'scores spread over':<20}" + "".join(f"{f'top {n}':>9}" for n in counts) + f"{'N for 0.99':>12}")
    query, keys = torch.randn(head_dim), torch.randn(context, head_dim)
    for sharpness in (1, 2, 4):
        weights = (sharpness * (keys @ query) * head_dim**-0.5).softmax(0).sort(descending=True).values
        mass = weights.cumsum(0)
        row = "".join(f"{mass[n - 1]:>9.3f}" for n in counts)
        print(f"{f'{sharpness} standard deviations':<20.20}{row}{int((mass < 0.99).sum()) + 1:>12}")

    print("\nLlama-2-7B, 16384 tokens, bfloat16: GB on the GPU, on the host, and over the link a step")
    layers, heads, dim, size = 32, 32, 128, 2
    plane = layers * heads * dim * size * 16384 / 1e9
    rows = {
        "all on the GPU": (2 * plane, 0, 0),
        "resident='k', exact": (plane + 2 * plane / layers, plane, plane),
        "resident='k', top_n=128": (plane + plane / layers, plane, plane * 128 / 16384),
        "resident='none'": (2 * 2 * plane / layers, 2 * plane, 2 * plane),
    }
    for name, figures in rows.items():
        print(f"{name:<26}" + "".join(f"{figure:>9.3f}" for figure in figures))


if __name__ == "__main__":
    main()
