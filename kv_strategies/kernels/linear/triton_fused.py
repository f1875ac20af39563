"""What stands before and after a product of several rows, each in one pass over memory: norm and gating.

One program a token, or a stretch of it. All arithmetic is float32. See `linear` for what each one means, and
`triton_overlap.py` for how they follow each other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import Plan
from ..triton_launch import Launch, launch
from ..triton_overlap import followed, overlapping, waited
from .plain import Norm


def rms_norm(x: Tensor, norm: Norm, plan: Plan | None = None) -> Tensor:
    """[T, K] -> [T, K]. The plan keeps the launch for other layers."""
    out = x.new_empty(x.shape)
    launch(plan, prepare_norm, (x, norm.weight, out), eps=norm.eps)
    return out


def prepare_norm(plan: Plan | None, x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> Launch:
    """For `launch`."""
    num_tokens, size = x.shape
    return Launch(
        rms_norm_kernel, (num_tokens,), eps, x.stride(0), SIZE=size, SIZE_P2=triton.next_power_of_2(size),
        num_warps=8 if size > 2048 else 4, **overlapping(x.device),
    )  # fmt: skip


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


def silu_mul(y: Tensor, plan: Plan | None = None) -> Tensor:
    """[T, 2 * I], gate beside up -> silu(gate) * up [T, I]. The plan keeps the launch for other layers."""
    out = y.new_empty(y.shape[0], y.shape[1] // 2)
    launch(plan, prepare_gate, (y, out))
    return out


def prepare_gate(plan: Plan | None, y: Tensor, out: Tensor) -> Launch:
    """For `launch`."""
    num_tokens, size = out.shape
    tile = min(2048, triton.next_power_of_2(size))
    grid = (num_tokens, triton.cdiv(size, tile))
    return Launch(silu_mul_kernel, grid, y.stride(0), SIZE=size, TILE=tile, **overlapping(y.device))


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
