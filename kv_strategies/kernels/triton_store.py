"""Scatter the K and V of this step's tokens into their slots, encoding them in 8 bits where the store asks for it.

One program a token: it moves all heads of K and V, contiguous on one side at least.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..plan import LayerStore
from .reference import CODE_MAX
from .triton_overlap import followed, overlapping, waited


def store_kv(key: Tensor, value: Tensor, layer: LayerStore, slot_mapping: Tensor) -> None:
    """See `reference.store_kv`."""
    num_tokens, num_heads, dim = key.shape
    if not num_tokens:
        return
    quantised = layer.k_scale is not None
    k_scale, v_scale = (layer.k_scale, layer.v_scale) if quantised else (layer.k, layer.v)  # not read unless quantised
    store_kernel[(num_tokens,)](
        key, value, layer.k, layer.v, k_scale, v_scale, slot_mapping,
        *key.stride()[:2], *value.stride()[:2], *layer.k.stride()[:3], *layer.v.stride()[:3],
        *k_scale.stride()[:2], *v_scale.stride()[:2],
        BLOCK_SIZE=layer.block_size, HEADS=num_heads, HEADS_P2=triton.next_power_of_2(num_heads),
        DIM=dim, DIM_P2=triton.next_power_of_2(dim),
        CODE_MAX=CODE_MAX[layer.k.dtype] if quantised else 0.0, **overlapping(key.device),
    )  # fmt: skip


@triton.jit
def store_kernel(
    key, value, k_store, v_store, k_scale, v_scale, slot_mapping,
    key_stride_token, key_stride_head, value_stride_token, value_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, HEADS_P2: tl.constexpr,
    DIM: tl.constexpr, DIM_P2: tl.constexpr, CODE_MAX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    followed(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    waited(OVERLAP)
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    copy_token(
        key + token * key_stride_token, key_stride_head,
        k_store + block * k_stride_block + offset * k_stride_token, k_stride_head,
        k_scale + block * k_scale_stride_block + offset, k_scale_stride_head,
        HEADS, HEADS_P2, DIM, DIM_P2, CODE_MAX,
    )  # fmt: skip
    copy_token(
        value + token * value_stride_token, value_stride_head,
        v_store + block * v_stride_block + offset * v_stride_token, v_stride_head,
        v_scale + block * v_scale_stride_block + offset, v_scale_stride_head,
        HEADS, HEADS_P2, DIM, DIM_P2, CODE_MAX,
    )  # fmt: skip


@triton.jit
def copy_token(
    source, source_stride, target, target_stride, scales, scale_stride,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, CODE_MAX: tl.constexpr,
):  # fmt: skip
    """All heads of one token, [HEADS, DIM]; CODE_MAX > 0 encodes them (see `reference.quantise`)."""
    heads = tl.arange(0, HEADS_P2).to(tl.int64)
    dims = tl.arange(0, DIM_P2)
    mask = (heads < HEADS)[:, None] & (dims < DIM)[None, :]
    data = tl.load(source + heads[:, None] * source_stride + dims[None, :], mask=mask, other=0.0)
    if CODE_MAX > 0:
        data = data.to(tl.float32)
        scale = tl.math.div_rn(tl.max(tl.abs(data), 1), tl.full([HEADS_P2], CODE_MAX, tl.float32))
        scale = scale.to(scales.dtype.element_ty)
        tl.store(scales + heads * scale_stride, scale, mask=heads < HEADS)
        scale = scale.to(tl.float32)
        scale = tl.where(scale == 0.0, 1.0, scale)[:, None]
        data = tl.math.div_rn(data, tl.broadcast_to(scale, data.shape))
        data = tl.minimum(tl.maximum(data, -CODE_MAX), CODE_MAX)
        if target.dtype.element_ty == tl.int8:
            data = (data + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is left is the nearest integer, ties to even
    tl.store(target + heads[:, None] * target_stride + dims[None, :], data.to(target.dtype.element_ty), mask=mask)
