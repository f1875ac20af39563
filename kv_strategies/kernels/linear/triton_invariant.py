"""A linear layer whose rows do not depend on each other: any number of rows, one order of addition.

Libraries choose how a product adds up by its shape, so a row's last bits change with the rows beside it. Here

    acc[m, n]  =  x[m, 0] w[n, 0]  +  x[m, 1] w[n, 1]  +  ...     in pieces of K, from the first on, one accumulator

whatever the tile: K is never split, and tensor cores add sixteen columns (eight in TF32) the same way in every tile
shape. So tiles may follow the number of rows: flat ones stream W for a few rows, large ones keep tensor cores busy.

Nobody promises that tensor cores do not look at the shape of a tile. On an H100 all tiles of `tuning` give the same
bits (tests/test_invariant.py asks for it); in float32 there is one tile, and nothing to promise.

Bytes that have to move for a few rows: N * K * itemsize.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_overlap import followed, overlapping, waited


class Tile(NamedTuple):
    """Sizes to tune."""

    rows: int
    columns: int  # of the result; of either half, if gated
    piece: int  # columns of x and W at a time
    num_stages: int
    num_warps: int
    copied: bool = False  # whether the copy engine (TMA) brings pieces


#: Tiles of neighbouring columns that go through the same rows one after the other, so that both stay in L2.
NEIGHBOURS = 8


def tuning(num_rows: int, num_columns: int, dtype: torch.dtype, gated: bool, copies: bool) -> Tile:
    """The tile for so many rows and columns of the result, swept on an H100 over the layers of Llama-2-7B and
    Llama-3.1-8B.

    Args:
        copies: whether the copy engine can bring x and W.
    """
    if dtype.itemsize == 4:  # without tensor cores: one tile for all
        return Tile(16, 64, 32, num_stages=3, num_warps=4)
    is_narrow = num_columns <= 4096
    if num_rows <= 64:
        if num_rows > 16 and num_columns > 8192 and not gated:
            return Tile(64, 64, 64, num_stages=5, num_warps=4)
        rows = 16 if num_rows <= 16 and not is_narrow else 64
        if rows == 16 and gated:
            return Tile(16, 32, 256, num_stages=4, num_warps=4)
        return Tile(rows, 32, 128, num_stages=6 if is_narrow or gated or rows == 16 else 4, num_warps=4)
    if not copies:
        return Tile(64, 64, 64, num_stages=4, num_warps=4)
    if num_rows <= 512 and gated:
        return Tile(128, 64, 64, num_stages=4, num_warps=4, copied=True)
    if num_rows <= 512 and num_columns <= 8192:
        return Tile(64, 128, 64, num_stages=4, num_warps=4, copied=True)
    return Tile(128, 128 if gated else 256, 64, num_stages=3, num_warps=8, copied=True)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """See `linear.linear`."""
    num_rows, k = x.shape
    n = len(weight)
    columns = n // 2 if gated else n
    out = residual if residual is not None else x.new_empty(num_rows, columns)
    tile = tile or tuning(num_rows, columns, x.dtype, gated, copies=can_copy(x, weight))
    matrices = (x, weight)
    if tile.copied:
        matrices = tuple(
            TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [size, tile.piece])
            for matrix, size in ((x, tile.rows), (weight, tile.columns))
        )
    grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(columns, tile.columns),)
    invariant_kernel[grid](
        *matrices, x if bias is None else bias, out, num_rows, n, k, x.stride(0), weight.stride(0), out.stride(0),
        K=k, BIAS=bias is not None, GATED=gated, ADD=residual is not None,
        ROWS=tile.rows, COLUMNS=tile.columns, PIECE=tile.piece, STAGES=tile.num_stages, NEIGHBOURS=NEIGHBOURS,
        COPIED=tile.copied, num_warps=tile.num_warps, enable_fp_fusion=False, **overlapping(x.device),
    )  # fmt: skip
    return out


def can_copy(*matrices: Tensor) -> bool:
    """Whether the copy engine takes them: from Hopper on, rows that begin at multiples of 16 bytes."""
    return all(
        matrix.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(matrix.device)[0] >= 9
        and matrix.stride(1) == 1
        and matrix.stride(0) * matrix.itemsize % 16 == 0
        and matrix.data_ptr() % 16 == 0
        for matrix in matrices
    )


@triton.jit(do_not_specialize=["num_rows", "k"])
def invariant_kernel(
    x, weight, bias, out, num_rows, n, k, x_stride, weight_stride, out_stride,
    K: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, NEIGHBOURS: tl.constexpr,
    COPIED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    followed(OVERLAP)
    num_columns = n // 2 if GATED else n
    num_down, num_across = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    band = tl.program_id(0) // (NEIGHBOURS * num_across)
    height = tl.minimum(num_down - band * NEIGHBOURS, NEIGHBOURS)
    at = tl.program_id(0) % (NEIGHBOURS * num_across)
    first_row = (band * NEIGHBOURS + at % height) * ROWS
    first_column = at // height * COLUMNS
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    is_row, is_column = row < num_rows, column < num_columns

    # k is K, but the compiler must not know: it would take the residual for the first number of a sum of one piece.
    end = K if K > PIECE else k
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    waited(OVERLAP)
    if COPIED:  # zeros beyond the edges
        for begin in tl.range(0, end, PIECE, num_stages=STAGES):
            data = x.load([first_row, begin])
            acc = tl.dot(data, weight.load([first_column, begin]).T, acc)
            if GATED:
                up = tl.dot(data, weight.load([num_columns + first_column, begin]).T, up)
    else:
        inside = tl.arange(0, PIECE)
        x_at = x + row.to(tl.int64)[:, None] * x_stride + inside[None, :]
        w_at = weight + column.to(tl.int64)[:, None] * weight_stride + inside[None, :]
        up_at = w_at + tl.cast(num_columns, tl.int64) * weight_stride
        for begin in tl.range(0, end, PIECE, num_stages=STAGES):
            there = (begin + inside < K)[None, :]
            data = tl.load(x_at + begin, mask=is_row[:, None] & there, other=0.0)
            w = tl.load(w_at + begin, mask=is_column[:, None] & there, other=0.0)
            acc = tl.dot(data, w.T, acc, input_precision="ieee")
            if GATED:
                w = tl.load(up_at + begin, mask=is_column[:, None] & there, other=0.0)
                up = tl.dot(data, w.T, up, input_precision="ieee")

    if BIAS:
        acc += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if BIAS:
            up += tl.load(bias + num_columns + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        acc = acc * tl.sigmoid(acc) * up
    target, mask = out + row.to(tl.int64)[:, None] * out_stride + column[None, :], is_row[:, None] & is_column[None, :]
    if ADD:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out.dtype.element_ty), mask=mask)
