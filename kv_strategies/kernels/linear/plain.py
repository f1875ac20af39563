"""The specification: what a linear layer and its neighbours mean, in plain torch. See the package for the pictures."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """RMSNorm (Zhang and Sennrich, 2019): x / rms(x) * weight."""

    weight: Tensor  # [K]
    eps: float


class Rotary(NamedTuple):
    """Which part of the output is rotated, and how far: the first `num_heads` heads of D columns each (q and k)."""

    cos: Tensor  # [T, D], as sin: those of all dimensions of a head, the second half like the first
    sin: Tensor
    num_heads: int


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    rotary: Rotary | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """See `linear.linear`. What is between two tensors of the model's own dtype is computed in float32."""
    if norm is not None:
        x = rms_norm(x, norm)
    y = F.linear(x, weight, bias)
    if rotary is not None:
        rotate(y, rotary)
    if gated:
        gate, up = y.float().chunk(2, dim=-1)
        y = (F.silu(gate) * up).to(y.dtype)
    return y if residual is None else residual.add_(y)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """[T, K] -> [T, K]"""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def rotate(y: Tensor, rotary: Rotary) -> None:
    """Turn the first heads of y [T, N] in place."""
    rotate_heads(y[:, : rotary.num_heads * rotary.cos.shape[-1]].view(len(y), rotary.num_heads, -1), rotary)


def rotate_heads(heads: Tensor, rotary: Rotary) -> None:
    """Turn heads [T, H, D] in place: dimension d of a head is a pair with dimension d + D / 2."""
    cos, sin = rotary.cos[:, None].float(), rotary.sin[:, None].float()  # [T, 1, D]
    wide = heads.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    heads.copy_(wide * cos + turned * sin)  # three roundings, wherever in memory; `addcmul` has two or three
