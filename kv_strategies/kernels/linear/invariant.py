"""Linear layers whose rows do not depend on each other to the bit: what `deterministic=True` computes with.

    a GPU    one order of addition, in tiles of any size (triton_invariant.py)
    a CPU    the library's product, always of the same shape: TILE rows, the missing ones zeros

A product of one shape takes one way through a CPU's library, in which a row's sum does not depend on which of the rows
it is (tests/test_deterministic.py asks for it). Nor may anything else look at where a number lies: sums, products and
exp do not, while torch's silu is another function for the last numbers of a thread's share than for whole vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...step.plan import Plan
from .plain import Norm, Rotary, rms_norm, rotate

#: Rows of a product on a CPU: of few, those of a decode step cost least; of many, those of a prompt.
TILE = 8
#: Numbers of a 16-bit weight widened at a time: 4 MiB.
WIDENED = 1 << 20


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    rotary: Rotary | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """See `linear.linear`. On a GPU rotary embedding is always for `kernels.store_kv`."""
    if x.is_cuda:
        from . import triton_fused, triton_invariant  # Triton is there only where a GPU is

        assert rotary is None
        x = x if norm is None else triton_fused.rms_norm(x, norm, plan)
        return triton_invariant.linear(x, weight, bias, gated=gated, residual=residual)
    dtype = x.dtype
    y = product(x if norm is None else rms_norm(x, norm), weight)
    if bias is not None:
        y += bias
    if rotary is not None:
        rotate(y, rotary)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = gate / (1 + (-gate).exp()) * up
    return y.to(dtype) if residual is None else residual.add_(y)


def rotates_later(x: Tensor) -> bool:
    """See `linear.rotates_later`."""
    return x.is_cuda


def product(x: Tensor, weight: Tensor) -> Tensor:
    """On a CPU: x [T, K], weight [N, K] -> [T, N] float32."""
    num_rows = len(x)
    x = F.pad(x.float(), (0, 0, 0, -num_rows % TILE))
    y = x.new_empty(len(x), len(weight))
    step = len(weight) if weight.dtype == torch.float32 else max(1, WIDENED // weight.shape[1])
    for part, columns in zip(weight.split(step), y.split(step, dim=1), strict=True):
        part = part.float()
        for rows, out in zip(x.split(TILE), columns.split(TILE), strict=True):
            out.copy_(torch.mm(part, rows.mT).mT)
    return y[:num_rows]
