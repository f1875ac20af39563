"""What stands before and after a product by cuBLAS, each in one pass over memory: norm, rotary embedding, gating.

One program a token, or a stretch of it. All arithmetic is float32. See `linear.py` for what each one means, and
`triton_overlap.py` for how they follow each other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .linear import Norm, Rotary
from .triton_overlap import followed, overlapping, waited


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """[T, K] -> [T, K]"""
    out = x.new_empty(x.shape)
    num_tokens, size = x.shape
    rms_norm_kernel[(num_tokens,)](
        x, norm.weight, out, norm.eps, x.stride(0), SIZE=size, SIZE_P2=triton.next_power_of_2(size),
        num_warps=8 if size > 2048 else 4, **overlapping(x.device),
    )  # fmt: skip
    return out


@triton.jit
def rms_norm_kernel(
    x, weight, out, eps, x_stride, SIZE: tl.constexpr, SIZE_P2: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    followed(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SIZE_P2)
    mask = columns < SIZE
    factor = tl.load(weight + columns, mask=mask, other=0.0)
    waited(OVERLAP)
    data = tl.load(x + token * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(data * data, 0) / SIZE + eps)
    data = data * scale * factor.to(tl.float32)
    tl.store(out + token * SIZE + columns, data.to(out.dtype.element_ty), mask=mask)


def rotate(y: Tensor, rotary: Rotary) -> None:
    """Turn the first heads of y [T, N] in place."""
    half = rotary.cos.shape[-1] // 2
    rotate_kernel[(len(y),)](
        y, rotary.cos, rotary.sin, y.stride(0), rotary.cos.stride(0), rotary.sin.stride(0),
        HEADS=rotary.num_heads, HEADS_P2=triton.next_power_of_2(rotary.num_heads),
        HALF=half, HALF_P2=triton.next_power_of_2(half), **overlapping(y.device),
    )  # fmt: skip


@triton.jit
def rotate_kernel(
    y, cos, sin, y_stride, cos_stride, sin_stride,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, HALF: tl.constexpr, HALF_P2: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    followed(OVERLAP)
    waited(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    heads, dims = tl.arange(0, HEADS_P2), tl.arange(0, HALF_P2)
    mask = (heads < HEADS)[:, None] & (dims < HALF)[None, :]
    at = y + token * y_stride + heads[:, None] * (2 * HALF) + dims[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [HEADS_P2, HALF_P2]
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    cos += token * cos_stride + dims
    sin += token * sin_stride + dims
    own = dims < HALF
    cos_first = tl.load(cos, mask=own, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin, mask=own, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + HALF, mask=own, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + HALF, mask=own, other=0.0).to(tl.float32)[None, :]
    tl.store(at, (first * cos_first - second * sin_first).to(y.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (second * cos_second + first * sin_second).to(y.dtype.element_ty), mask=mask)


def silu_mul(y: Tensor) -> Tensor:
    """[T, 2 * I], gate beside up -> silu(gate) * up [T, I]"""
    size = y.shape[1] // 2
    out = y.new_empty(len(y), size)
    tile = min(2048, triton.next_power_of_2(size))
    silu_mul_kernel[(len(y), triton.cdiv(size, tile))](
        y, out, y.stride(0), SIZE=size, TILE=tile, **overlapping(y.device)
    )
    return out


@triton.jit
def silu_mul_kernel(y, out, y_stride, SIZE: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr):
    followed(OVERLAP)
    waited(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < SIZE
    gate = tl.load(y + token * y_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(y + token * y_stride + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * SIZE + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)
