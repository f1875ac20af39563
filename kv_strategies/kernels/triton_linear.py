"""A linear layer for one row: stream the weights once at the speed of the memory, and do the rest on the way.

With one row a product costs what reading W [N, K] costs, so everything else has to hide behind that:

    program (tile, split): TILE_N rows of W, one stretch of K          all of them in flight at the same time
        acc += W * x                     a sum a lane, reduced at the end
        squares += x^2                   RMSNorm is a factor of the row, known only at the end: W (x w) * 1 / rms(x)
        last of its tile to arrive:      adds the splits in their order, so that a result is the same every time,
                                         then bias, and rotary embedding, silu(gate) * up or residual

Rotary embedding and gating join two rows of W, half a head or half of N apart. A tile takes both: its lanes 2 i and
2 i + 1 are the pair i, so that the epilogue finds them next to each other.

Consecutive kernels overlap (programmatic dependent launch): one starts while the one before it drains, and asks for its
first weights, which depend on nobody, before it waits for the activations.

Bytes that have to move: N * K * itemsize.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .linear import Norm, Rotary

#: The most tiles that a product with splits may have: one counter each.
MAX_TILES = 16384
LINE = 128  # bytes that a prefetch brings


@dataclass(frozen=True)
class Tuning:
    """Sizes to tune; results agree to rounding whatever they are. `bench/linear_bandwidth.py` sweeps them."""

    tile_n: int  # rows of W a program
    tile_k: int  # columns an iteration
    splits: int  # of K
    num_warps: int
    num_stages: int
    overlap: bool = True  # with the kernel before


def tuning(n: int, k: int) -> Tuning:
    """The sizes for W [n, k]: a warp alone takes four rows of it, without barriers and with few registers, so that
    many are in flight."""
    tile_n, tile_k, programs = 4, 256, 4096
    tiles, steps = triton.cdiv(n, tile_n), triton.cdiv(k, tile_k)
    splits = max(1, min(programs // tiles, steps // 4))
    splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none of them empty
    return Tuning(tile_n, tile_k, splits, num_warps=1, num_stages=1)


def counters(device: torch.device) -> Tensor:
    """What a program tells by that it is the last of its tile. Zero between two products; one for all of a forward."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    rotary: Rotary | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    arrived: Tensor,
    tuned: Tuning | None = None,
) -> Tensor:
    """See `linear.linear`. x is [1, K]; W has to be contiguous."""
    n, k = weight.shape
    tuned = tuned or tuning(n, k)
    half = n // 2 if gated else rotary.cos.shape[-1] // 2 if rotary is not None else 0
    num_tiles = triton.cdiv(n, tuned.tile_n)
    assert tuned.splits == 1 or num_tiles <= MAX_TILES
    assert len(x) == 1 and x.stride(1) == 1 and weight.is_contiguous()
    out = residual if residual is not None else x.new_empty(1, half if gated else n)
    parts = square_parts = arrived
    if tuned.splits > 1:
        parts = torch.empty(num_tiles, tuned.splits, tuned.tile_n, dtype=torch.float32, device=x.device)
        square_parts = torch.empty(num_tiles, tuned.splits, dtype=torch.float32, device=x.device)
    norm_weight, eps = (x, 0.0) if norm is None else norm  # x stands for what is not read
    cos, sin, num_rotated = (x, x, 0) if rotary is None else rotary
    overlap = tuned.overlap and x.is_cuda and _can_overlap(x.device)
    linear_kernel[(num_tiles, tuned.splits)](
        x, weight, x if bias is None else bias, norm_weight, cos, sin, out, parts, square_parts, arrived,
        n, eps, K=k, NORM=norm is not None, BIAS=bias is not None, GATED=gated, ADD=residual is not None,
        HALF=half, ROTATED=num_rotated * 2 * half,
        TILE_N=tuned.tile_n, TILE_K=tuned.tile_k, SPLITS=tuned.splits, STAGES=tuned.num_stages,
        OVERLAP=overlap, LINE=LINE // weight.element_size(), num_warps=tuned.num_warps,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


@cache
def _can_overlap(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def linear_kernel(
    x, weight, bias, norm_weight, cos, sin, out, parts, square_parts, arrived, n, eps,
    K: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    HALF: tl.constexpr, ROTATED: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, TILE_N)
    column = tile * TILE_N + lanes  # of the result: a row of W
    if HALF > 0:
        pair = column // 2
        column = pair // HALF * (2 * HALF) + pair % HALF + lanes % 2 * HALF
    own = tl.minimum(column, n - 1)  # what is beyond the end is computed as well, and not stored
    ks = tl.arange(0, TILE_K)
    CHUNK: tl.constexpr = (K + TILE_K * SPLITS - 1) // (TILE_K * SPLITS) * TILE_K
    begin = split * CHUNK
    end = tl.minimum(begin + CHUNK, K)
    w_rows = weight + own.to(tl.int64) * K

    if OVERLAP:
        gdc_launch_dependents()
        lines = tl.arange(0, TILE_K // LINE) * LINE
        for ahead in tl.static_range(STAGES):
            at = tl.minimum(begin + ahead * TILE_K + lines, K - 1)
            prefetch(w_rows[:, None] + at[None, :])
        gdc_wait()  # all that was written before this kernel is there from here on

    sums = tl.zeros([TILE_N, TILE_K], tl.float32)
    lane_squares = tl.zeros([TILE_K], tl.float32)
    for start in tl.range(begin, end, TILE_K, num_stages=STAGES):
        k = start + ks
        if K % TILE_K == 0:
            w = tl.load(w_rows[:, None] + k[None, :], eviction_policy="evict_first")  # [TILE_N, TILE_K]
        else:
            w = tl.load(w_rows[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
        data = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            lane_squares += data * data
            data *= tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * data[None, :]
    acc = tl.sum(sums, 1)  # [TILE_N]
    squares = tl.sum(lane_squares, 0)

    if SPLITS > 1:
        first_part = tile * SPLITS
        tl.store(parts + (first_part + split) * TILE_N + lanes, acc)
        if NORM:
            tl.store(square_parts + first_part + split, squares)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrived + tile, 1) < SPLITS - 1:
            return
        tl.store(arrived + tile, 0)
        acc = tl.zeros([TILE_N], tl.float32)
        squares = 0.0
        for part in tl.static_range(SPLITS):  # .cg: other programs wrote these, so they are read from L2
            acc += tl.load(parts + (first_part + part) * TILE_N + lanes, cache_modifier=".cg")
            if NORM:
                squares += tl.load(square_parts + first_part + part, cache_modifier=".cg")

    if NORM:
        acc *= tl.rsqrt(squares / K + eps)
    if BIAS:
        acc += tl.load(bias + own).to(tl.float32)
    if HALF == 0:
        mask = column < n
        if ADD:
            acc += tl.load(out + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + column, acc.to(out.dtype.element_ty), mask=mask)
    else:
        first, second = tl.split(tl.reshape(acc, [TILE_N // 2, 2]))
        pair = tile * (TILE_N // 2) + tl.arange(0, TILE_N // 2)
        mask = pair < n // 2
        if GATED:
            tl.store(out + pair, (first * tl.sigmoid(first) * second).to(out.dtype.element_ty), mask=mask)
        else:
            column_first, dim = pair // HALF * (2 * HALF) + pair % HALF, pair % HALF
            rotated = mask & (column_first < ROTATED)  # the others turn by nothing
            cos_first = tl.load(cos + dim, mask=rotated, other=1.0).to(tl.float32)
            sin_first = tl.load(sin + dim, mask=rotated, other=0.0).to(tl.float32)
            cos_second = tl.load(cos + HALF + dim, mask=rotated, other=1.0).to(tl.float32)
            sin_second = tl.load(sin + HALF + dim, mask=rotated, other=0.0).to(tl.float32)
            at = out + column_first
            tl.store(at, (first * cos_first - second * sin_first).to(out.dtype.element_ty), mask=mask)
            tl.store(at + HALF, (second * cos_second + first * sin_second).to(out.dtype.element_ty), mask=mask)


@triton.jit
def prefetch(address):
    """Ask for the lines at these addresses to be brought into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
