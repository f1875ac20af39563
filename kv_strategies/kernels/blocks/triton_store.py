"""Scatter the K and V of this step's tokens into their slots, encoding them in 8 or 4 bits where the store asks for it.

One program a token: it moves all heads of K and V, contiguous on one side at least. Rotary embedding, where no product
has it inside, costs least here: keys pass by anyhow.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore, Plan
from ..linear import Rotary
from ..reference import CODE_MAX, HALF_BYTES
from ..triton_launch import Launch, launch
from ..triton_overlap import followed, overlapping, waited
from .triton_common import VARYING, planes
from .triton_turn import half_p2, turn_halves


def store_kv(
    key: Tensor,
    value: Tensor,
    layer: LayerStore,
    slot_mapping: Tensor,
    query: Tensor | None = None,
    rotary: Rotary | None = None,
    plan: Plan | None = None,
) -> None:
    """See `reference.store_kv`. With `rotary`, queries [T, Hq, D] and keys are rotated in place first."""
    if not key.shape[0]:
        return
    cos, sin, _ = (key, key, 0) if rotary is None else rotary  # key stands for what is not read
    query = key if query is None else query
    tensors = (query, key, value, *planes(layer), slot_mapping, cos, sin)
    launch(plan, prepare, tensors, rotates=rotary is not None)


def prepare(
    plan: Plan | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotates: bool,
) -> Launch:
    """For `launch`."""
    num_tokens, num_heads, dim = key.shape
    quantised, is_turned = k_scale is not k, HALF_BYTES in (k.dtype, v.dtype)
    heads_p2 = triton.next_power_of_2(num_heads)
    return Launch(
        store_kernel, (num_tokens,),
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        *k_scale.stride()[:2], *v_scale.stride()[:2], cos.stride(0), sin.stride(0),
        ROTATE=rotates, BLOCK_SIZE=k.shape[2],
        QUERY_HEADS=query.shape[1], QUERY_HEADS_P2=triton.next_power_of_2(query.shape[1]),
        HEADS=num_heads, HEADS_P2=max(heads_p2, 16) if is_turned else heads_p2,  # a product takes 16 and more
        DIM=dim, DIM_P2=triton.next_power_of_2(dim),
        HALF=dim // 2, HALF_P2=half_p2(dim) if is_turned else triton.next_power_of_2(max(dim // 2, 1)),
        K_MAX=CODE_MAX[k.dtype] if quantised else 0.0, V_MAX=CODE_MAX[v.dtype] if quantised else 0.0,
        **overlapping(key.device),
    )  # fmt: skip


@triton.jit(**VARYING)
def store_kernel(
    query, key, value, k_store, v_store, k_scale, v_scale, slot_mapping, cos, sin,
    query_stride_token, query_stride_head, key_stride_token, key_stride_head, value_stride_token, value_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, cos_stride, sin_stride,
    ROTATE: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUERY_HEADS: tl.constexpr, QUERY_HEADS_P2: tl.constexpr,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
    HALF: tl.constexpr, HALF_P2: tl.constexpr, K_MAX: tl.constexpr, V_MAX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    followed(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    waited(OVERLAP)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    key += token * key_stride_token
    k_store += block * k_stride_block + offset * k_stride_token
    k_scale += block * k_scale_stride_block + offset
    if ROTATE:
        cos, sin = cos + token * cos_stride, sin + token * sin_stride
        rotate_token(
            query + token * query_stride_token, query_stride_head, cos, sin, QUERY_HEADS, QUERY_HEADS_P2, HALF, HALF_P2
        )
        first, second = rotate_token(key, key_stride_head, cos, sin, HEADS, HEADS_P2, HALF, HALF_P2)
        if slot >= 0:
            # As two halves: they are in registers.
            store_heads(
                first, second, k_store, k_stride_head, k_scale, k_scale_stride_head,
                HEADS, HEADS_P2, HALF, HALF_P2, K_MAX,
            )  # fmt: skip
    elif slot >= 0:
        copy_token(
            key, key_stride_head, k_store, k_stride_head, k_scale, k_scale_stride_head,
            HEADS, HEADS_P2, DIM, DIM_P2, HALF, HALF_P2, K_MAX,
        )  # fmt: skip
    if slot >= 0:
        copy_token(
            value + token * value_stride_token, value_stride_head,
            v_store + block * v_stride_block + offset * v_stride_token, v_stride_head,
            v_scale + block * v_scale_stride_block + offset, v_scale_stride_head,
            HEADS, HEADS_P2, DIM, DIM_P2, HALF, HALF_P2, V_MAX,
        )  # fmt: skip


@triton.jit
def rotate_token(
    heads_of, stride, cos, sin, HEADS: tl.constexpr, HEADS_P2: tl.constexpr, HALF: tl.constexpr, HALF_P2: tl.constexpr,
):  # fmt: skip
    """As `linear.rotate_heads`, the heads of one token in place. Returns their halves [HEADS_P2, HALF_P2]."""
    heads, dims = tl.arange(0, HEADS_P2), tl.arange(0, HALF_P2)
    mask = (heads < HEADS)[:, None] & (dims < HALF)[None, :]
    at = heads_of + heads.to(tl.int64)[:, None] * stride + dims[None, :]
    first = tl.load(at, mask=mask, other=0.0)
    second = tl.load(at + HALF, mask=mask, other=0.0)
    own = dims < HALF
    cos_first = tl.load(cos + dims, mask=own, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + dims, mask=own, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + HALF + dims, mask=own, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + HALF + dims, mask=own, other=0.0).to(tl.float32)[None, :]
    turned = (first.to(tl.float32) * cos_first - second.to(tl.float32) * sin_first).to(first.dtype)
    second = (second.to(tl.float32) * cos_second + first.to(tl.float32) * sin_second).to(first.dtype)
    tl.store(at, turned, mask=mask)
    tl.store(at + HALF, second, mask=mask)
    return turned, second


@triton.jit
def copy_token(
    source, source_stride, target, target_stride, scales, scale_stride,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
    HALF: tl.constexpr, HALF_P2: tl.constexpr, CODE_MAX: tl.constexpr,
):  # fmt: skip
    """All heads of one token, [HEADS, DIM]; CODE_MAX > 0 encodes them (see `reference.quantise`)."""
    heads = tl.arange(0, HEADS_P2).to(tl.int64)
    is_there = (heads < HEADS)[:, None]
    if target.dtype.element_ty == tl.uint8:
        dims = tl.arange(0, HALF_P2)
        mask = is_there & (dims < HALF)[None, :]
        at = source + heads[:, None] * source_stride + dims[None, :]
        first, second = tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)
        store_heads(
            first, second, target, target_stride, scales, scale_stride, HEADS, HEADS_P2, HALF, HALF_P2, CODE_MAX
        )
    else:
        dims = tl.arange(0, DIM_P2)
        mask = is_there & (dims < DIM)[None, :]
        data = tl.load(source + heads[:, None] * source_stride + dims[None, :], mask=mask, other=0.0)
        at = target + heads[:, None] * target_stride + dims[None, :]
        if CODE_MAX > 0:
            scale = store_scale(tl.max(tl.abs(data.to(tl.float32)), 1), scales, scale_stride, HEADS, HEADS_P2, CODE_MAX)
            tl.store(at, encode(data, scale, target.dtype.element_ty, CODE_MAX), mask=mask)
        else:
            tl.store(at, data.to(target.dtype.element_ty), mask=mask)


@triton.jit
def store_heads(
    first, second, target, target_stride, scales, scale_stride,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, HALF: tl.constexpr, HALF_P2: tl.constexpr, CODE_MAX: tl.constexpr,
):  # fmt: skip
    """As `copy_token`, of the halves of heads."""
    heads = tl.arange(0, HEADS_P2).to(tl.int64)
    dims = tl.arange(0, HALF_P2)
    mask = (heads < HEADS)[:, None] & (dims < HALF)[None, :]
    at = target + heads[:, None] * target_stride + dims[None, :]
    dtype: tl.constexpr = target.dtype.element_ty
    if dtype == tl.uint8:
        first, second = turn_halves(first, second, 2 * HALF, HALF_P2)
    if CODE_MAX > 0:
        largest = tl.maximum(tl.max(tl.abs(first.to(tl.float32)), 1), tl.max(tl.abs(second.to(tl.float32)), 1))
        scale = store_scale(largest, scales, scale_stride, HEADS, HEADS_P2, CODE_MAX)
        first, second = encode(first, scale, dtype, CODE_MAX), encode(second, scale, dtype, CODE_MAX)
        if dtype == tl.uint8:
            tl.store(at, first | (second << 4), mask=mask)
        else:
            tl.store(at, first, mask=mask)
            tl.store(at + HALF, second, mask=mask)
    else:
        tl.store(at, first.to(dtype), mask=mask)
        tl.store(at + HALF, second.to(dtype), mask=mask)


@triton.jit
def store_scale(largest, scales, stride, HEADS: tl.constexpr, HEADS_P2: tl.constexpr, CODE_MAX: tl.constexpr):
    """The scale [HEADS_P2] of vectors whose largest numbers are these, as it is kept."""
    heads = tl.arange(0, HEADS_P2).to(tl.int64)
    scale = tl.math.div_rn(largest, tl.full([HEADS_P2], CODE_MAX, tl.float32)).to(scales.dtype.element_ty)
    tl.store(scales + heads * stride, scale, mask=heads < HEADS)
    scale = scale.to(tl.float32)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def encode(data, scale, dtype: tl.constexpr, CODE_MAX: tl.constexpr):
    """Codes of vectors [HEADS_P2, ..]."""
    data = tl.math.div_rn(data.to(tl.float32), tl.broadcast_to(scale[:, None], data.shape))
    data = tl.minimum(tl.maximum(data, -CODE_MAX), CODE_MAX)
    if dtype == tl.uint8:
        data = (data + CODE_MAX) * 0.5  # half a byte
    if (dtype == tl.int8) | (dtype == tl.uint8):
        data = (data + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is left is the nearest integer, ties to even
    return data.to(dtype)
