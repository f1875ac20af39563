"""Copies that no copy engine does in one go: scattered pieces between device and page-locked host memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 2048  # int64 words a program


def copy_row(source: Tensor, row: int, target: Tensor, target_row: int) -> None:
    """target[:, target_row] = source[:, row], uint8 [L, N, bytes] both, bytes a multiple of 8."""
    layers, _, size = source.shape
    source, target = source.view(torch.int64), target.view(torch.int64)
    copy_row_kernel[(layers, triton.cdiv(size // 8, _WORDS))](
        source, target, row, target_row, size // 8, *source.stride()[:2], *target.stride()[:2], WORDS=_WORDS
    )


@triton.jit(do_not_specialize=["row", "target_row"])
def copy_row_kernel(
    source, target, row, target_row, size, source_stride_layer, source_stride_row, target_stride_layer,
    target_stride_row, WORDS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    data = tl.load(
        source + layer * source_stride_layer + row.to(tl.int64) * source_stride_row + word, mask=word < size, other=0
    )
    tl.store(
        target + layer * target_stride_layer + target_row.to(tl.int64) * target_stride_row + word, data, word < size
    )


def copy_slots(source: dict[str, Tensor], target: dict[str, Tensor], slot_mapping: Tensor) -> None:
    """Copy the tokens in these slots [T] from one layer's planes to another's; slot -1 copies nothing."""
    for name, data in source.items():
        copy = target[name]
        dim = data.shape[3] if data.dim() == 4 else 1  # a scale a token is a vector of one number
        copy_slots_kernel[(len(slot_mapping),)](
            data, copy, slot_mapping, *data.stride()[:2], *copy.stride()[:2], data.stride(2), copy.stride(2),
            BLOCK_SIZE=data.shape[2], HEADS=data.shape[1], HEADS_P2=triton.next_power_of_2(data.shape[1]),
            DIM=dim, DIM_P2=triton.next_power_of_2(dim),
        )  # fmt: skip


@triton.jit
def copy_slots_kernel(
    source, target, slot_mapping, source_stride_block, source_stride_head, target_stride_block, target_stride_head,
    source_stride_token, target_stride_token,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, HEADS_P2: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
):  # fmt: skip
    slot = tl.load(slot_mapping + tl.program_id(0).to(tl.int64))
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    head, dims = tl.arange(0, HEADS_P2)[:, None], tl.arange(0, DIM_P2)[None, :]
    mask = (head < HEADS) & (dims < DIM)
    source += block * source_stride_block + offset * source_stride_token
    target += block * target_stride_block + offset * target_stride_token
    data = tl.load(source + head * source_stride_head + dims, mask=mask)
    tl.store(target + head * target_stride_head + dims, data, mask=mask)
