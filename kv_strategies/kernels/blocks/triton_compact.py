"""Compaction on the GPU: the survivors of a row move into its first blocks, one read and one write of each.

A program moves what one head of one layer keeps, tile after tile, in place. That is safe since survivors stay in order:
the token that goes to index j comes from an index >= j, so no tile writes where a later one has still to read, and the
barrier keeps a tile from writing before all of it has been read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_BYTES = 16384  # that a program has under way


def compact(plane: Tensor, sources: Tensor, targets: Tensor, kept: Tensor) -> None:
    """See `reference.compact`."""
    if plane.dtype.itemsize == 1:
        plane = plane.view(torch.uint8)
    if plane.dim() == 4:  # a scale a token is a vector of one number
        plane = plane[..., None]
    num_layers, num_heads, num_kept = kept.shape
    size, dim = plane.shape[3:]
    dim_p2 = triton.next_power_of_2(dim)
    tile = min(256, triton.next_power_of_2(max(1, _TILE_BYTES // (dim_p2 * plane.dtype.itemsize))))
    compact_kernel[(num_heads, num_layers)](
        plane, sources, targets, kept, num_kept, *plane.stride()[:4], *kept.stride()[:2],
        BLOCK_SIZE=size, DIM=dim, DIM_P2=dim_p2, TILE=tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_kept", "kept_stride_layer", "kept_stride_head"])
def compact_kernel(
    plane, sources, targets, kept, num_kept, stride_block, stride_layer, stride_head, stride_token,
    kept_stride_layer, kept_stride_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    plane += layer * stride_layer + head * stride_head
    kept += layer * kept_stride_layer + head * kept_stride_head
    dims = tl.arange(0, DIM_P2)[None, :]
    for begin in range(0, num_kept, TILE):
        place = begin + tl.arange(0, TILE)
        is_kept = place < num_kept
        mask = is_kept[:, None] & (dims < DIM)
        index = tl.load(kept + place, mask=is_kept, other=0)
        source = tl.load(sources + index // BLOCK_SIZE, mask=is_kept, other=0)
        target = tl.load(targets + place // BLOCK_SIZE, mask=is_kept, other=0)
        source = source * stride_block + (index % BLOCK_SIZE) * stride_token
        target = target * stride_block + (place % BLOCK_SIZE) * stride_token
        data = tl.load(plane + source[:, None] + dims, mask=mask)
        tl.debug_barrier()
        tl.store(plane + target[:, None] + dims, data, mask=mask)
