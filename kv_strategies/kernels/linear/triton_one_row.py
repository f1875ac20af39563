"""A linear layer for one row: stream the weights once at the speed of the memory, and do the rest on the way.

With one row a product costs what reading W [N, K] costs, so the memory must never have nothing to do:

    program p     tile p, then tile p + P, ...     as many programs as fit the chip at once, P, go through all tiles
      a tile      TILE_N rows of W, piece by piece of TILE_K columns:
        load      the next piece into registers, of this tile or the next
        sums     += this piece * x
        squares  += x^2                   RMSNorm is a factor of the row, known only at the end: W (x w) * 1 / rms(x)
      its end     bias, and rotary embedding, silu(gate) * up or residual

A program's first piece depends on nobody, so it loads it before it waits for the kernel ahead of it, and lets the next
kernel follow when it starts on its last tile (see `triton_overlap.py`): the memory is busy from kernel to kernel.

Rotary embedding and gating join two rows of W, half a head or half of N apart. A tile takes both: its lanes 2 i and
2 i + 1 are the pair i, so that its end finds them next to each other.

Bytes that have to move: N * K * itemsize.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..triton_device import num_multiprocessors
from ..triton_overlap import followed, overlapping, waited
from .plain import Norm, Rotary


class Tuning(NamedTuple):
    """Sizes to tune; results agree to rounding whatever they are. `bench/linear_bandwidth.py` sweeps them."""

    tile_n: int  # rows of W at once
    tile_k: int  # columns of a piece
    num_warps: int
    programs: int  # a multiprocessor


def tuning(k: int) -> Tuning:
    """The sizes for W [N, k]. All lanes together take a piece in loads of 16 bytes, one from each row: few rows, so
    that tiles are many and programs end together; and as many programs as the registers hold of the largest kernel.
    """
    tile_k = min(1024, max(triton.next_power_of_2(k), 64))
    return Tuning(4, tile_k, num_warps=max(tile_k // 256, 1), programs=6)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    rotary: Rotary | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    tuned: Tuning | None = None,
) -> Tensor:
    """See `linear.linear`. x is [1, K]; W has to be contiguous."""
    n, k = weight.shape
    tuned = tuned or tuning(k)
    half = n // 2 if gated else rotary.cos.shape[-1] // 2 if rotary is not None else 0
    assert len(x) == 1 and x.stride(1) == 1 and weight.is_contiguous()
    out = residual if residual is not None else x.new_empty(1, half if gated else n)
    norm_weight, eps = (x, 0.0) if norm is None else norm  # x stands for what is not read
    cos, sin, num_rotated = (x, x, 0) if rotary is None else rotary
    num_programs = min(tuned.programs * num_multiprocessors(x.device), triton.cdiv(n, tuned.tile_n))
    linear_kernel[(num_programs,)](
        x, weight, x if bias is None else bias, norm_weight, cos, sin, out, n, eps,
        K=k, NORM=norm is not None, BIAS=bias is not None, GATED=gated, ADD=residual is not None,
        HALF=half, ROTATED=num_rotated * 2 * half, TILE_N=tuned.tile_n, TILE_K=tuned.tile_k,
        num_warps=tuned.num_warps, **overlapping(x.device),
    )  # fmt: skip
    return out


@triton.jit
def linear_kernel(
    x, weight, bias, norm_weight, cos, sin, out, n, eps,
    K: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    HALF: tl.constexpr, ROTATED: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = (K + TILE_K - 1) // TILE_K
    # columns of a row that a lane takes at once, 16 bytes, and adds up by itself
    PACK: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    num_tiles = tl.cdiv(n, TILE_N)
    first = tl.program_id(0)
    lanes, ks = tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    w = load_piece(weight, row_of(first, lanes, n, TILE_N, HALF), ks, K, K)
    waited(OVERLAP)

    for tile in tl.range(first, num_tiles, tl.num_programs(0), num_stages=1):
        next_tile = tile + tl.num_programs(0)
        has_next = next_tile < num_tiles
        if not has_next:
            followed(OVERLAP)
        row, next_row = row_of(tile, lanes, n, TILE_N, HALF), row_of(next_tile, lanes, n, TILE_N, HALF)
        extra = tl.zeros([TILE_N], tl.float32)  # what the end adds, here before it is wanted
        if BIAS:
            extra += tl.load(bias + row).to(tl.float32)
        if ADD:
            extra += tl.load(out + row).to(tl.float32)

        sums = tl.zeros([TILE_N, TILE_K // PACK], tl.float32)
        lane_squares = tl.zeros([TILE_K // PACK], tl.float32)
        for index in tl.range(PIECES, num_stages=1):
            is_own = index + 1 < PIECES
            begin = tl.where(is_own, index + 1, 0) * TILE_K
            end = tl.where(is_own | has_next, K, 0)
            next_w = load_piece(weight, tl.where(is_own, row, next_row), begin + ks, end, K)
            k = index * TILE_K + ks
            data = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            if NORM:
                lane_squares += tl.sum(tl.reshape(data * data, [TILE_K // PACK, PACK]), 1)
                data *= tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
            sums += tl.sum(tl.reshape(w.to(tl.float32) * data[None, :], [TILE_N, TILE_K // PACK, PACK]), 2)
            w = next_w
        acc = tl.sum(sums, 1)  # [TILE_N]
        if NORM:
            acc *= tl.rsqrt(tl.sum(lane_squares, 0) / K + eps)
        acc += extra

        if HALF == 0:
            tl.store(out + row, acc.to(out.dtype.element_ty), mask=tile * TILE_N + lanes < n)
        else:
            first_part, second_part = tl.split(tl.reshape(acc, [TILE_N // 2, 2]))
            pair = tile * (TILE_N // 2) + tl.arange(0, TILE_N // 2)
            mask = pair < n // 2
            if GATED:
                gated = first_part * tl.sigmoid(first_part) * second_part
                tl.store(out + pair, gated.to(out.dtype.element_ty), mask=mask)
            else:
                column, dim = pair // HALF * (2 * HALF) + pair % HALF, pair % HALF
                rotated = mask & (column < ROTATED)  # the others turn by nothing
                cos_first = tl.load(cos + dim, mask=rotated, other=1.0).to(tl.float32)
                sin_first = tl.load(sin + dim, mask=rotated, other=0.0).to(tl.float32)
                cos_second = tl.load(cos + HALF + dim, mask=rotated, other=1.0).to(tl.float32)
                sin_second = tl.load(sin + HALF + dim, mask=rotated, other=0.0).to(tl.float32)
                turned = first_part * cos_first - second_part * sin_first
                tl.store(out + column, turned.to(out.dtype.element_ty), mask=mask)
                turned = second_part * cos_second + first_part * sin_second
                tl.store(out + column + HALF, turned.to(out.dtype.element_ty), mask=mask)


@triton.jit
def row_of(tile, lane, n, TILE_N: tl.constexpr, HALF: tl.constexpr):
    """The row of W that a lane of a tile takes. Beyond the end the last one, which is computed again."""
    row = tile * TILE_N + lane
    if HALF > 0:
        pair = row // 2
        row = pair // HALF * (2 * HALF) + pair % HALF + row % 2 * HALF
    return tl.minimum(row, n - 1)


@triton.jit
def load_piece(weight, row, k, end, K: tl.constexpr):
    """Columns k of these rows, [TILE_N, TILE_K]; zeros from `end` on."""
    address = weight + (row.to(tl.int64) * K)[:, None] + k[None, :]
    return tl.load(address, mask=(k < end)[None, :], other=0.0, eviction_policy="evict_first")
