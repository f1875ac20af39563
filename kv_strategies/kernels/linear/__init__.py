"""A linear layer together with what stands around it, so that its neighbours cost no pass over memory of their own.

    norm ->  y = x W^T + b  -> rotary embedding           q, k and v
    norm ->                 -> silu(gate) * up            the MLP's first half
                            -> + residual                 the output of attention, the MLP's second half

`reference` says what is meant, in plain torch (plain.py). Four ways to get there:

    a CPU       the library's products in their fast forms (cpu.py)
    one row     one Triton kernel that streams W once and does the rest on the way (triton_one_row.py)
    up to 64    on Hopper, in CUDA graphs, one kernel that streams W through tensor cores (triton_few_rows.py)
    more rows   cuBLAS; the residual is its accumulator, and gating a kernel of its own

With more than one row, norms are kernels of their own (triton_fused.py), and rotary embedding is left to what stores K
and V (triton_store.py), by which keys pass anyhow.

The ways add in different orders: a row computed alone, among 64 or among 65, in a graph or out of it, may differ in its
last bits.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from ...step.plan import Plan
from . import cpu
from .plain import Norm, Rotary, reference, rms_norm, rotate_heads

__all__ = ["Norm", "Rotary", "linear", "reference", "rms_norm", "rotate_heads", "rotates_later"]


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
    """x [T, K], weight [N, K] -> [T, N], or [T, N / 2] if gated. At most one of rotary, gated and residual.

    Args:
        norm: applied to x first.
        rotary: applied to the result, unless `rotates_later`.
        gated: the first half of the result is the gate, the second what it gates: silu(gate) * up.
        residual: [T, N], what the result is added to, in place; it is what is returned.
        plan: of the step, which keeps what its layers have in common (`triton_launch.py`). Where a CUDA graph holds the
            step, `triton_few_rows.py` serves: its launch takes a host 70 us, five times that of cuBLAS, and so longer
            than what it saves.
    """
    if not x.is_cuda:
        return cpu.linear(x, weight, bias, norm=norm, rotary=rotary, gated=gated, residual=residual)
    if rotates_later(x):
        if rotary is not None:
            raise ValueError(f"with {len(x)} rows on a GPU, `kernels.store_kv` rotates: give it the rotary embedding")
        return many_rows(x, weight, bias, norm=norm, gated=gated, residual=residual, plan=plan)
    from . import triton_one_row  # Triton is there only where a GPU is

    return triton_one_row.linear(x, weight, bias, norm=norm, rotary=rotary, gated=gated, residual=residual)


def rotates_later(x: Tensor) -> bool:
    """Whether rotary embedding is not for `linear`, with so many rows, but for `kernels.store_kv`."""
    return x.is_cuda and len(x) != 1


def many_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """See `linear`: the norm by itself, then the product by cuBLAS, or by our own kernel where that pays."""
    from . import triton_fused

    if norm is not None:
        x = triton_fused.rms_norm(x, norm, plan)
    if plan is not None and plan.is_replayed and suits_few_rows(x, weight):
        return _rows_module().linear(x, weight, bias, gated=gated, residual=residual)
    if residual is not None and bias is None:
        return residual.addmm_(x, weight.mT)
    y = F.linear(x, weight, bias)
    if gated:
        y = triton_fused.silu_mul(y, plan)
    return y if residual is None else residual.add_(y)


def suits_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether `triton_few_rows.py` can do this, on this GPU and with this Triton."""
    module = _rows_module()
    return module is not None and module.suits(x, weight)


@cache
def _rows_module() -> ModuleType | None:
    """None, told once, where Triton's Gluon, which is experimental, is not as the kernel needs it."""
    try:
        from . import triton_few_rows
    except (ImportError, AttributeError) as error:
        warnings.warn(f"products of 2 to 64 rows go by cuBLAS: this Triton has another Gluon ({error})", stacklevel=2)
        return None
    return triton_few_rows
