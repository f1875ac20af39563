"""What stands before and after a product of several rows, each in one pass over memory: norm and gating.

One program a token, or a stretch of it. All arithmetic is float32. See `linear` for what each one means, and
`triton_overlap.py` for how they follow each other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..triton_overlap import followed, overlapping, waited
from .plain import Norm


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
