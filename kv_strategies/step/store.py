"""The memory of the blocks: one contiguous slab a block on a GPU, one strided view a layer for the kernels.

GPU   [num_blocks][ K of all layers | V of all layers ]     a block moves between tiers, or to disk, in one copy
CPU   [K, V][layer][head][num_blocks]                        consecutive blocks are consecutive tokens of a head,
                                                             so that torch's attention reads them in place
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .plan import LayerStore
from .shards import local

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

#: Name -> (shape of one layer of one block, dtype). See `BlockStore`.
Planes = dict[str, tuple[tuple[int, ...], torch.dtype]]

_ALIGNMENT = 128  # bytes; keeps the vector loads of the kernels aligned


@dataclass(frozen=True)
class KVShape:
    """What a model's K and V look like, read from its weights: tensor parallelism leaves them fewer heads than the
    config says.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    layer_devices: list[torch.device]

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> KVShape:
        attentions = [layer.self_attn for layer in model.model.layers]
        head_dim = attentions[0].head_dim
        rows = [len(local(module.weight)) for module in (attentions[0].q_proj, attentions[0].k_proj)]
        return cls(
            num_heads=rows[0] // head_dim,
            num_kv_heads=rows[1] // head_dim,
            head_dim=head_dim,
            dtype=model.dtype,
            layer_devices=[attention.k_proj.weight.device for attention in attentions],
        )

    def block_bytes(self, planes: Planes) -> int:
        """Bytes of one block: the planes of all layers, on whatever devices they are."""
        devices = self.layer_devices
        return sum(block_bytes(devices.count(device), planes) for device in dict.fromkeys(devices))


class BlockStore:
    """`num_blocks` blocks of `num_layers` layers on one device.

    Args:
        planes: name -> (shape of one layer of one block, dtype); "k" and "v" [Hkv, block_size, D], and for a codec
            with scales "k_scale" and "v_scale" [Hkv, block_size].
    """

    def __init__(
        self,
        num_blocks: int,
        num_layers: int,
        planes: Planes,
        device: torch.device,
    ):
        self.device = device
        self.num_layers = num_layers
        self.planes: dict[str, Tensor] = {}  # name -> [num_blocks, num_layers, *shape]
        self.memories: list[Tensor] = []  # [n, num_blocks, bytes] uint8: block b is [:, b] of all of them
        if device.type == "cpu":
            for name, (shape, dtype) in planes.items():
                head, *rest = shape
                memory = torch.empty(num_layers, head, num_blocks, *rest, dtype=dtype)
                self.planes[name] = memory.permute(2, 0, 1, *range(3, memory.dim()))
                self.memories.append(memory.view(torch.uint8).view(num_layers * head, num_blocks, -1))
        else:
            slab = torch.empty(num_blocks, block_bytes(num_layers, planes), dtype=torch.uint8, device=device)
            self.planes = views_of(slab, num_layers, planes)
            self.memories = [slab[None]] if planes else []
        self.num_bytes = sum(memory.numel() for memory in self.memories)

    def layer(self, index: int) -> LayerStore:
        return LayerStore(**{name: plane[:, index] for name, plane in self.planes.items()})

    def copy_blocks(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole blocks inside the store, all layers, K and V."""
        sources = torch.tensor(sources, device=self.device)
        destinations = torch.tensor(destinations, device=self.device)
        for memory in self.memories:
            memory[:, destinations] = memory[:, sources]


def layers_of(layer_devices: list[torch.device]) -> list[list[int]]:
    """The layers of each device, in the order in which the devices come."""
    return [
        [layer for layer, there in enumerate(layer_devices) if there == device]
        for device in dict.fromkeys(layer_devices)
    ]


def views_of(slab: Tensor, num_layers: int, planes: Planes) -> dict[str, Tensor]:
    """The planes in a slab [num_blocks, bytes] uint8, one contiguous piece a block: name -> [num_blocks, L, *shape]."""
    views, offset = {}, 0
    for name, (shape, dtype) in planes.items():
        size = num_layers * math.prod(shape) * dtype.itemsize
        views[name] = slab[:, offset : offset + size].view(dtype).unflatten(1, (num_layers, *shape))
        offset += _aligned(size)
    return views


def block_bytes(num_layers: int, planes: Planes) -> int:
    """Bytes that one block of `num_layers` layers takes."""
    return sum(_aligned(num_layers * math.prod(shape) * dtype.itemsize) for shape, dtype in planes.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
