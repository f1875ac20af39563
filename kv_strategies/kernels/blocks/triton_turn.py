"""The Hadamard transform of vectors, `reference.turn`: as a product with a matrix of signs, which tensor cores do.

The signs are computed, not read. Two halves of a vector suffice, since the transform of both is that of their halves:

    turn(first, second) = (turn(first) + turn(second), turn(first) - turn(second)) / sqrt(2)

Numbers times 1 or -1 are exact in any type, and sums are float32, in one order whatever lies beside a vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import Plan
from ..triton_launch import Launch, launch
from ..triton_overlap import followed, overlapping, waited
from .triton_common import VARYING

#: Vectors a program turns, few of them and many: each computes the signs again.
ROWS, MANY_ROWS = 16, 64
MANY = 16384


def turn(states: Tensor, plan: Plan | None = None) -> Tensor:
    """[T, H, D], any strides but the last -> the same, contiguous, in their type. The plan keeps the launch."""
    out = torch.empty_like(states, memory_format=torch.contiguous_format)
    launch(plan, prepare, (states, out))
    return out


def prepare(plan: Plan | None, states: Tensor, out: Tensor) -> Launch:
    """For `launch`."""
    num_tokens, num_heads, dim = states.shape
    num_rows = num_tokens * num_heads
    rows = ROWS if num_rows < MANY else MANY_ROWS
    return Launch(
        turn_kernel, (triton.cdiv(num_rows, rows),), num_rows, *states.stride()[:2],
        HEADS=num_heads, DIM=dim, HALF_P2=half_p2(dim), ROWS=rows, **overlapping(states.device),
    )  # fmt: skip


def half_p2(dim: int) -> int:
    """Columns of half a vector, as a product takes them."""
    return max(triton.next_power_of_2(dim // 2), 16)


@triton.jit(**VARYING)
def turn_kernel(
    states, out, num_rows, stride_token, stride_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF_P2: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    followed(OVERLAP)
    HALF: tl.constexpr = DIM // 2
    row, dims = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF_P2)
    mask = (row < num_rows)[:, None] & (dims < HALF)[None, :]
    row = row.to(tl.int64)
    source = states + (row // HEADS * stride_token + row % HEADS * stride_head)[:, None] + dims[None, :]
    waited(OVERLAP)
    first, second = tl.load(source, mask=mask, other=0.0), tl.load(source + HALF, mask=mask, other=0.0)
    first, second = turn_halves(first, second, DIM, HALF_P2)
    target = out + row[:, None] * DIM + dims[None, :]
    tl.store(target, first.to(out.dtype.element_ty), mask=mask)
    tl.store(target + HALF, second.to(out.dtype.element_ty), mask=mask)


@triton.jit
def turn_halves(first, second, DIM: tl.constexpr, HALF_P2: tl.constexpr):
    """The halves of vectors [ROWS, HALF_P2], zeros beyond DIM / 2 -> their transform, float32."""
    SIZE: tl.constexpr = DIM & -DIM  # numbers that are transformed together, each APART from the next
    APART: tl.constexpr = DIM // SIZE
    place = tl.arange(0, HALF_P2)
    common = (place // APART)[:, None] & (place // APART)[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1  # the lowest bit says whether an odd number of them are common
    together = (place % APART)[:, None] == (place % APART)[None, :]
    signs = tl.where(together, 1 - 2 * (common & 1), 0).to(first.dtype)
    first = tl.dot(first, signs, input_precision="ieee")
    second = tl.dot(second, signs, input_precision="ieee")
    scale: tl.constexpr = SIZE**-0.5
    return (first + second) * scale, (first - second) * scale
