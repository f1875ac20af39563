"""A linear layer for a few rows on Hopper: W streams through a ring in shared memory, from one tile to the next.

With 2 to 64 rows a product still costs what reading W [N, K] costs, so the memory must never have nothing to do. W
comes in tiles of TILE_N rows and these in pieces of TILE_K columns; the pieces of all tiles are laid end to end and cut
into equal shares, one for each multiprocessor (stream-K, Osama et al. 2023, arXiv 2301.03598):

    tile 0                     tile 1                     tile 2               ...
    |--------------------------|--------------------------|--------------------
    |     program 0      |     program 1      |     program 2      |
     <-------------------  <-------------------  <-----------------               each goes through its share backwards

    ring     STAGES pieces of W and x are on their way, brought by the copy engine (TMA), whatever tile they are of
    a piece  acc [TILE_N, T] += W piece * (x piece)^T        on tensor cores, out of shared memory
    the end  of a tile: bias, silu(gate) * up or residual, while the ring fills

The end of a tile belongs to the program that has its last piece. It adds what the programs before it have left of the
tile, which they did first of all. (Nor can programs wait for each other: one waits only for such as were started before
it, and all of them run at once.) How pieces are cut depends on N, K and the card, and parts are added in their order,
so a row's result does not depend on its neighbours here.

The first pieces of W depend on nobody, so they are asked for before the kernel ahead has ended (`triton_overlap.py`).

Gating joins two rows of W half of N apart: a tile takes TILE_N / 2 of either.

Written in Gluon, Triton's language below Triton, for the ring: there loads run ahead within a loop, here across tiles.
Bytes that have to move: N * K * itemsize.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..triton_device import can_overlap, num_multiprocessors

# Their names in Triton 3.9, and in 3.6.
bring = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


class Tuning(NamedTuple):
    """Sizes to tune; results agree to rounding whatever they are. `bench/linear_bandwidth.py` sweeps them.

    Tiles are as small as tensor cores take them, so that most have two programs at most (see EARLY). With what a ring
    takes of the shared memory, one program fits a multiprocessor: with two, the next kernel's may gather on some.
    """

    tile_n: int = 64  # rows of W at once: 64 or a multiple
    tile_k: int = 256  # columns of a piece: 64 or a multiple
    stages: int = 3


MAX_ROWS = 64


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` can do this: on Hopper, two bytes a number, and what the copy engine takes."""
    return (
        can_overlap(x.device)
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and len(x) <= MAX_ROWS
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 for matrix in (x, weight))
        and all(matrix.data_ptr() % 16 == 0 for matrix in (x, weight))
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
    tuned: Tuning = Tuning(),  # noqa: B008
) -> Tensor:
    """See `linear.linear`. x is [T, K], T at most MAX_ROWS, and as `suits` says."""
    num_rows, k = x.shape
    n = len(weight)
    assert residual is None or residual.stride(1) == 1
    out = residual if residual is not None else x.new_empty(num_rows, n // 2 if gated else n)
    rows = max(triton.next_power_of_2(num_rows), 16)
    pieces = triton.cdiv(k, tuned.tile_k)
    width = tuned.tile_n // 2 if gated else tuned.tile_n  # rows of W that lie together
    num_tiles = triton.cdiv(n // 2 if gated else n, width)
    num_programs = min(num_multiprocessors(x.device), num_tiles * pieces)
    share = triton.cdiv(num_tiles * pieces, num_programs)
    parts, arrived = _workspace(x.device, num_programs * tuned.tile_n * MAX_ROWS, num_tiles)
    rows_kernel[(num_programs,)](
        _pieces(weight, width, tuned.tile_k), _pieces(x, rows, tuned.tile_k), x if bias is None else bias,
        out, parts, arrived, num_rows, out.stride(0),
        N=n, PIECES=pieces, SHARE=share, BIAS=bias is not None, GATED=gated, ADD=residual is not None,
        STAGES=tuned.stages, EARLY=share >= pieces, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out


def _pieces(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For the copy engine: a matrix in pieces, zeros beyond its edges."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)


#: (device, stream, sizes) -> what `_workspace` has made.
_WORKSPACES: dict[tuple, tuple[Tensor, Tensor]] = {}


def _workspace(device: torch.device, size: int, num_tiles: int) -> tuple[Tensor, Tensor]:
    """Memory for parts, and arrival counters, which every launch leaves at zero.

    Products of a stream follow each other, so they share it, 2 MB for each number of tiles, to the end of the process.
    Graphs captured in one stream must therefore not run at the same time: counters would go astray and programs wait
    for ever. (torch hands out 32 streams, then the first again: more runners than that are for one thread.)

    What is first asked for within a capture serves that launch alone: its memory is the graph's, and others that share
    the graph's pool may have written to it when it is replayed.
    """
    key = device, torch.cuda.current_stream(device).cuda_stream, size, num_tiles
    if key in _WORKSPACES:
        return _WORKSPACES[key]
    with torch.inference_mode(False):
        made = (
            torch.empty(size, dtype=torch.float32, device=device),
            torch.zeros(num_tiles, dtype=torch.int32, device=device),
        )
    if not torch.cuda.is_current_stream_capturing():
        _WORKSPACES[key] = made
    return made


@gluon.jit(do_not_specialize=["num_rows"])
def rows_kernel(
    weight, x, bias, out, parts, arrived, num_rows, out_stride,
    N: gl.constexpr, PIECES: gl.constexpr, SHARE: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr,
    ADD: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """EARLY: a tile has two programs at most, so what the first has left is there long before the other is done."""
    gdc_launch_dependents()
    WIDTH: gl.constexpr = weight.block_shape[0]
    TILE_N: gl.constexpr = 2 * WIDTH if GATED else WIDTH
    ROWS: gl.constexpr = x.block_shape[0]
    NUM_OUT: gl.constexpr = N // 2 if GATED else N
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    total = (NUM_OUT + WIDTH - 1) // WIDTH * PIECES
    program = gl.program_id(0)
    begin = program * SHARE
    stop = gl.minimum(begin + SHARE, total)
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, TILE_N, weight.block_shape[1]], weight.layout)
    x_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, ROWS, weight.block_shape[1]], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for ahead in gl.static_range(STAGES):
        mbarrier.init(ready.index(ahead), count=1)
    for ahead in gl.static_range(STAGES):
        ask_w(weight, w_ring, ready, ahead, stop - 1 - ahead, begin, N, PIECES, GATED, ROWS, STAGES)
    gdc_wait()
    for ahead in gl.static_range(STAGES):
        ask_x(x, x_ring, ready, ahead, stop - 1 - ahead, begin, PIECES, STAGES)

    inside = gl.arange(0, TILE_N, gl.SliceLayout(1, layout))[:, None] * ROWS
    inside += gl.arange(0, ROWS, gl.SliceLayout(0, layout))[None, :]
    place = 0  # in the program's share
    num_tiles = gl.where(stop > begin, (stop - 1) // PIECES - begin // PIECES + 1, 0)
    for index in range(num_tiles):
        tile = (stop - 1) // PIECES - index
        first = gl.maximum(begin - tile * PIECES, 0)
        last = gl.minimum(stop - tile * PIECES, PIECES)
        acc = gl.zeros([TILE_N, ROWS], gl.float32, layout)
        if EARLY and (last == PIECES) & (first > 0):
            acc = add_parts(acc, parts, arrived, tile, program, inside, PIECES, SHARE)
        for _ in range(last - first):
            stage = place % STAGES
            mbarrier.wait(ready.index(stage), place // STAGES & 1)
            acc = warpgroup_mma(w_ring.index(stage), x_ring.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            barrier()  # all warps have read the stage
            piece = stop - 1 - place - STAGES
            ask_w(weight, w_ring, ready, place + STAGES, piece, begin, N, PIECES, GATED, ROWS, STAGES)
            ask_x(x, x_ring, ready, place + STAGES, piece, begin, PIECES, STAGES)
            place += 1
        if last < PIECES:
            gl.store(parts + program * (TILE_N * ROWS) + inside, acc)
            barrier()  # all threads have stored before one of them says so
            gl.atomic_add(arrived + tile, 1)
        else:
            finish(
                acc, bias, out, parts, arrived, tile, program, first, inside, num_rows, out_stride,
                NUM_OUT, PIECES, SHARE, BIAS, GATED, ADD, EARLY,
            )  # fmt: skip
    for ahead in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(ahead))


@gluon.jit
def ask_w(
    weight, ring, ready, place, piece, begin,
    N: gl.constexpr, PIECES: gl.constexpr, GATED: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Have a piece of W brought into the ring, if it is of the program's share; and say what will come with it."""
    WIDTH: gl.constexpr = weight.block_shape[0]
    TILE_K: gl.constexpr = weight.block_shape[1]
    TILE_N: gl.constexpr = 2 * WIDTH if GATED else WIDTH
    stage, wanted = place % STAGES, piece >= begin
    row, column = piece // PIECES * WIDTH, piece % PIECES * TILE_K
    mbarrier.expect(ready.index(stage), (TILE_N + ROWS) * TILE_K * 2, pred=wanted)
    target = ring.index(stage)
    bring(weight, [row, column], ready.index(stage), target.slice(0, WIDTH), pred=wanted)
    if GATED:
        up = [N // 2 + row, column]
        bring(weight, up, ready.index(stage), target.slice(WIDTH, WIDTH), pred=wanted)


@gluon.jit
def ask_x(x, ring, ready, place, piece, begin, PIECES: gl.constexpr, STAGES: gl.constexpr):
    """As `ask_w`, of the columns of x that meet this piece."""
    stage = place % STAGES
    at = [0, piece % PIECES * x.block_shape[1]]
    bring(x, at, ready.index(stage), ring.index(stage), pred=piece >= begin)


@gluon.jit
def add_parts(acc, parts, arrived, tile, program, inside, PIECES: gl.constexpr, SHARE: gl.constexpr):
    """acc, and what the programs before this one have left of a tile, in their order; as soon as it is there."""
    SIZE: gl.constexpr = acc.numel
    AT_ONCE: gl.constexpr = max(64 * 128 // SIZE, 1)
    first = tile * PIECES // SHARE
    while gl.atomic_add(arrived + tile, 0) < program - first:
        pass
    barrier()  # all threads go on only after one has seen it
    for part in range(first, program, AT_ONCE):
        for more in gl.static_range(AT_ONCE):
            # .cg: other programs wrote these, so they are read from L2, past this core's own cache.
            there = (inside >= 0) & (part + more < program)
            acc += gl.load(parts + (part + more) * SIZE + inside, mask=there, other=0.0, cache_modifier=".cg")
    gl.store(arrived + tile, 0)
    return acc


@gluon.jit
def finish(
    acc, bias, out, parts, arrived, tile, program, first, inside, num_rows, out_stride,
    NUM_OUT: gl.constexpr, PIECES: gl.constexpr, SHARE: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr,
    ADD: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The results of a tile, of which this program has had the pieces from `first` on."""
    TILE_N: gl.constexpr = acc.shape[0]
    ROWS: gl.constexpr = acc.shape[1]
    WIDTH: gl.constexpr = TILE_N // 2 if GATED else TILE_N
    # Columns of the result lie together, in memory and in a thread; so do a gate and what it gates.
    LANES: gl.constexpr = min(WIDTH // 8, 8)
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, 4], [0, 1])
    column = tile * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(1, layout))[:, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, layout))[None, :]
    target, mask = out + row * out_stride + column, (column < NUM_OUT) & (row < num_rows)
    if ADD:
        added = gl.load(target, mask=mask, other=0.0)
    if not EARLY and first > 0:
        acc = add_parts(acc, parts, arrived, tile, program, inside, PIECES, SHARE)
    y = gl.convert_layout(acc, layout)
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(y, [2, WIDTH, ROWS]), [1, 2, 0]))
        gate, up = gl.convert_layout(gate, layout), gl.convert_layout(up, layout)
        if BIAS:
            gate += gl.load(bias + column, mask=column < NUM_OUT, other=0.0).to(gl.float32)
            up += gl.load(bias + NUM_OUT + column, mask=column < NUM_OUT, other=0.0).to(gl.float32)
        y = gate / (1.0 + gl.exp(-gate)) * up
    elif BIAS:
        y += gl.load(bias + column, mask=column < NUM_OUT, other=0.0).to(gl.float32)
    if ADD:
        y += added.to(gl.float32)
    gl.store(target, y.to(out.dtype.element_ty), mask=mask)
