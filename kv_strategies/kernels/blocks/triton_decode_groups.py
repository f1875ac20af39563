"""Split-KV decode over codes of K and V that a group of query heads shares: from memory to tensor cores in registers.

As `triton_decode_any.py`, but a tile that passes through shared memory costs more instructions than its products, and
half the bytes leave half the time. It need not go there: the order of the tokens in a tile, and of the dims in q . k,
is free, so that a load can be chosen whose registers are those that the tensor core wants. One warp a program, all is
within its 32 lanes, lane = 4 g + t (g 0..7, t 0..3), D / 8 bytes a load:

    score [16, 8 RUN] = q . K^T    lane (g, t) reads of run g // 2 the t-th quarter of a half, g % 2, of each token
    acc^T [D, 8]     += V^T . w^T  lane (g, t) reads of run t the g-th eighth of each token

    tile: 4 runs of RUN tokens, each run inside one block; place n in the tile = (token // 2, run, token % 2)

A product takes 16 rows of q, twice as many as heads: they are the halves of q, which meet all halves of K, and the
products of first with first and second with second are added.

Where lanes lie in the first product's result (heads by g, runs by t) is where they lie in the second's operand, so that
weights do not move either. K and V travel as words of four codes, which become float16 in front of a product; or of
eight (`triton_half_bytes.py`), of half as many bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore
from ..triton_launch import Launch
from ..triton_overlap import followed, waited
from . import triton_half_bytes as half_bytes
from .triton_common import LOWEST, VARYING, opaque
from .triton_decode_parts import finish_part, own_part

#: All weights are 2^UNIT times as large, for the reason of V_UNIT.
UNIT = tl.constexpr(8.0)


def suits(query: Tensor, layer: LayerStore, tile: int = 16) -> bool:
    """Whether the kernel can do this, without a window or sinks: its sizes and dtypes, and how the store lies."""
    dim, run = query.shape[2], tile // 4
    return (
        layer.k_scale is not None
        and layer.k_scale.dtype == layer.v_scale.dtype == torch.bfloat16
        and query.element_size() == 2
        and query.shape[1] // layer.k.shape[1] <= 8
        and dim in (64, 128)  # twice as many take more registers than leave room for 16 programs
        and run % 2 == 0
        and layer.block_size % run == 0
        and all(codes.stride(2) == codes.shape[3] and is_aligned(codes, codes.shape[3] // 8) for codes in layer[:2])
        and all(is_aligned(scales, 2 * run) for scales in layer[2:])
    )


def is_aligned(plane: Tensor, size: int) -> bool:
    """Whether what the plane holds of a block and head begins at a multiple of `size` bytes, for all of them."""
    return not any(n % size for n in (plane.data_ptr(), *(n * plane.element_size() for n in plane.stride()[:2])))


def decode_groups(grid: tuple[int], numbers: list, sizes: dict, query: Tensor, group: int, options: dict) -> Launch:
    """The kernel, with what `triton_decode.py` has prepared."""
    sizes = sizes | {"TILE_PARTS": 1}  # more at a time, merged by one warp, do not fit its registers
    return Launch(
        decode_groups_kernel, grid, *numbers,
        GROUP=group, GROUP_P2=triton.next_power_of_2(group), FAST=query.is_cuda, **sizes, **options,
    )  # fmt: skip


@triton.jit(**VARYING)
def decode_groups_kernel(
    query, sink_query, out, k_store, v_store, k_scale, v_scale,
    block_tables, context_lens, parts, part_lses, arrived,
    shared_lens, shared_parts, shared_lses, shared_splits, scaling, num_rows,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head, out_stride_row, out_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, table_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P2: tl.constexpr, DIM: tl.constexpr,
    DIM_P2: tl.constexpr, ROWS_P2: tl.constexpr, TILE_PARTS: tl.constexpr, FAN: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, SINK_PLACES: tl.constexpr, CASCADE: tl.constexpr,
    SHARED_SPLIT: tl.constexpr, WANTED: tl.constexpr, PART: tl.constexpr, MAX_PARTS: tl.constexpr, LEAST: tl.constexpr,
    TILE: tl.constexpr, FAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The arguments of `decode_kernel`, as far as `suits` lets them pass."""
    followed(OVERLAP)
    row, kv_head, part, num_parts, place, end, first, _begin, _context_len, shared_len, is_there = own_part(
        context_lens, shared_lens, num_rows,
        HEADS, ROWS_P2, WINDOW, SINKS, SINK_PLACES, CASCADE, WANTED, PART, MAX_PARTS, LEAST, TILE, 1,
    )  # fmt: skip
    RUN: tl.constexpr = TILE // 4
    k_dtype: tl.constexpr = k_store.dtype.element_ty
    v_dtype: tl.constexpr = v_store.dtype.element_ty
    K_BYTES: tl.constexpr = DIM // 2 if k_dtype == tl.uint8 else DIM
    V_BYTES: tl.constexpr = DIM // 2 if v_dtype == tl.uint8 else DIM
    head = kv_head.to(tl.int64)
    table = block_tables + row * table_stride
    k_store += head * k_stride_head
    v_store += head * v_stride_head
    k_scale += head * k_scale_stride_head
    v_scale += head * v_scale_stride_head
    begin, end = first + place, first + end  # tokens; what a row shares with others are whole blocks
    k_runs = find_runs(k_store, table, begin, end, k_stride_block, K_BYTES, BLOCK_SIZE, RUN)
    v_runs = find_runs(v_store, table, begin, end, v_stride_block, V_BYTES, BLOCK_SIZE, RUN)
    k_scale_runs = find_runs(k_scale, table, begin, end, k_scale_stride_block, 1, BLOCK_SIZE, RUN)
    v_scale_runs = find_runs(v_scale, table, begin, end, v_scale_stride_block, 1, BLOCK_SIZE, RUN)
    # All but the token of this step lies in the cache already, so that codes can be read ahead. Scales can not: that of
    # the new token shares a sector with those of others, which would stay in this core's own cache as it was.
    k, v = load_k(k_runs, K_BYTES, RUN), load_v(v_runs, V_BYTES, RUN)
    waited(OVERLAP)
    if not is_there:
        return

    if (part == num_parts - 1) & (end - begin <= TILE):
        k, v = load_k(k_runs, K_BYTES, RUN), load_v(v_runs, V_BYTES, RUN)
    query += row * query_stride_row + head * GROUP * query_stride_head
    if k_dtype == tl.uint8:
        q, q_scale, start_k = half_bytes.load_q(query, query_stride_head, scaling, GROUP, DIM)
    else:
        q, q_scale = load_q(query, query_stride_head, scaling, GROUP, DIM)
        start_k = 0.0
    best = tl.full([8], LOWEST, tl.float32)  # of q . k, without its scale
    total = tl.zeros([8], tl.float32)
    acc = tl.zeros([DIM, 8], tl.float32)
    sums = tl.zeros([8, TILE], tl.float32)  # of the weights of V times its scales, where anybody asks
    k_scales, v_scales = load_scales(k_scale_runs, RUN), load_scales(v_scale_runs, RUN)
    whole = begin + (end - begin) // TILE * TILE
    for start in tl.range(begin, whole, TILE, num_stages=1):  # K and V of a tile are read during the one before
        ahead = start + TILE
        score = product_k(q, start_k, k, k_scales, k_dtype, DIM, RUN, FAST)
        k = load_k(find_runs(k_store, table, ahead, end, k_stride_block, K_BYTES, BLOCK_SIZE, RUN), K_BYTES, RUN)
        k_scales = load_scales(find_runs(k_scale, table, ahead, end, k_scale_stride_block, 1, BLOCK_SIZE, RUN), RUN)
        best, total, keep, weight = weigh(score, q_scale, best, total)
        weight *= in_order(v_scales, RUN)[None, :]
        sums = sums * keep[:, None] + weight
        acc = product_v(acc * keep[None, :], weight, v, 0, v_dtype, DIM, RUN, FAST, False)
        v = load_v(find_runs(v_store, table, ahead, end, v_stride_block, V_BYTES, BLOCK_SIZE, RUN), V_BYTES, RUN)
        v_scales = load_scales(find_runs(v_scale, table, ahead, end, v_scale_stride_block, 1, BLOCK_SIZE, RUN), RUN)
    if whole < end:  # some tokens of a tile; what lies beyond the end may be anything
        k_scales = load_scales(find_runs(k_scale, table, whole, end, k_scale_stride_block, 1, BLOCK_SIZE, RUN), RUN)
        v_scales = load_scales(find_runs(v_scale, table, whole, end, v_scale_stride_block, 1, BLOCK_SIZE, RUN), RUN)
        places = tl.arange(0, TILE)  # (token // 2, run, token % 2)
        seen = whole + places // 2 % 4 * RUN + places // 8 * 2 + places % 2 < end
        score = tl.where(seen[None, :], product_k(q, start_k, k, k_scales, k_dtype, DIM, RUN, FAST), float("-inf"))
        best, total, keep, weight = weigh(score, q_scale, best, total)
        weight = tl.where(seen[None, :], weight * in_order(v_scales, RUN)[None, :], 0.0)  # unseen ones may be NaN
        sums = sums * keep[:, None] + weight
        acc = product_v(acc * keep[None, :], weight, v, seen, v_dtype, DIM, RUN, FAST, True)
    if v_dtype == tl.uint8:
        acc = half_bytes.in_dims(acc, tl.sum(sums, 1), DIM)
    else:
        acc = tl.reshape(tl.permute(tl.reshape(acc, [DIM // 8, 8, 8]), [2, 1, 0]), [8, DIM])  # as `product_v` has them
    finish_part(
        best * q_scale - UNIT, total, acc, out, parts, part_lses, arrived, shared_parts, shared_lses, shared_splits,
        shared_len, row, kv_head, part, num_parts, tl.arange(0, 8), tl.arange(0, DIM), out_stride_row, out_stride_head,
        GROUP, GROUP_P2, HEADS, DIM, DIM_P2, CASCADE, SHARED_SPLIT, TILE_PARTS, FAN,
    )  # fmt: skip


# --- what is read


@triton.jit
def load_q(query, stride_head, scaling, GROUP: tl.constexpr, DIM: tl.constexpr):
    """The queries of a KV head [(half, 8 heads), DIM / 2] in the order in which lanes hold K, and their scale [8]."""
    N: tl.constexpr = DIM // 8  # numbers that a lane holds together
    halves, heads, place = tl.arange(0, 2), tl.arange(0, 8), tl.arange(0, DIM // 2)  # (pair of numbers, lane, number)
    dims = place // 2 % 4 * N + place // 8 * 2 + place % 2
    address = query + (halves * (DIM // 2))[:, None, None] + (heads * stride_head)[None, :, None] + dims[None, None, :]
    q = tl.load(address, mask=(heads < GROUP)[None, :, None], other=0.0).to(tl.float32)
    # Of any size, q fits float16 once its largest number is 1.
    largest = tl.maximum(tl.max(tl.max(tl.abs(q), 2), 0), 1e-30)
    q = tl.reshape(q / largest[None, :, None], [16, DIM // 2]).to(tl.float16)
    return q, largest * scaling


@triton.jit
def find_runs(
    store, table, start, end, stride_block, STRIDE_TOKEN: tl.constexpr, BLOCK_SIZE: tl.constexpr, RUN: tl.constexpr
):
    """Where the 4 runs of a tile begin, as pointers to words; past the end, in block 0."""
    token = start + tl.arange(0, 4) * RUN
    seen = token < end
    token = token.to(tl.uint32)  # which takes fewer instructions to divide
    block = tl.load(table + token // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
    return (store + (block * stride_block + token % BLOCK_SIZE * STRIDE_TOKEN)).to(tl.pointer_type(tl.int32))


@triton.jit
def load_k(runs, BYTES: tl.constexpr, RUN: tl.constexpr):
    """K of a tile as words [RUN, 4 runs, 8 pieces of a token, W], flat."""
    W: tl.constexpr = BYTES // 32
    inside = (tl.arange(0, RUN) * (8 * W))[:, None, None, None] + (tl.arange(0, 8) * W)[None, None, :, None]
    return tl.load(flat(runs[None, :, None, None] + (inside + tl.arange(0, W)[None, None, None, :]), W))


@triton.jit
def load_v(runs, BYTES: tl.constexpr, RUN: tl.constexpr):
    """V of a tile as words [even and odd tokens, RUN / 2, 8 pieces of a token, 4 runs, W], flat."""
    W: tl.constexpr = BYTES // 32
    token = tl.arange(0, 2)[:, None] + tl.arange(0, RUN // 2)[None, :] * 2
    inside = (token * (8 * W))[:, :, None, None, None] + (tl.arange(0, 8) * W)[None, None, :, None, None]
    return tl.load(flat(runs[None, None, None, :, None] + (inside + tl.arange(0, W)[None, None, None, None, :]), W))


@triton.jit
def load_scales(runs, RUN: tl.constexpr):
    """Scales of a tile [4 runs, RUN / 2], words of two bfloat16."""
    return tl.load(tl.multiple_of(runs, 2 * RUN)[:, None] + tl.arange(0, RUN // 2)[None, :])


@triton.jit
def flat(words, W: tl.constexpr):
    """[.., W] -> [-1, W]: of two dimensions, there is but one order that the compiler may give the lanes of a load."""
    return tl.multiple_of(tl.max_contiguous(tl.reshape(words, [words.numel // W, W]), [1, W]), [1, 4 * W])


# --- what is computed


@triton.jit
def product_k(q, start, k, scale, dtype: tl.constexpr, DIM: tl.constexpr, RUN: tl.constexpr, FAST: tl.constexpr):
    """Scores of a tile [8, 4 RUN], without the scale of q; `start` [(half, 8 heads), 1] is added to each product."""
    if dtype == tl.uint8:
        k = half_bytes.unpack(k, FAST)
    else:
        k = unpack(k, dtype, FAST)
    k = tl.reshape(k, [RUN, 4, 2, 4, DIM // 16, 2])  # token, run, half, quarter, pair, number
    k = tl.reshape(tl.permute(k, [4, 3, 5, 0, 1, 2]), [DIM // 2, 8 * RUN])
    score = tl.dot(q, k, tl.zeros([16, 8 * RUN], tl.float32) + start)
    score = tl.reshape(score, [2, 8, RUN // 2, 2, 4, 2])  # half of q, head, token, run, half of K
    with_first, with_second = tl.split(tl.permute(score, [1, 2, 4, 3, 0, 5]))
    first, _ = tl.split(with_first)
    _, second = tl.split(with_second)
    return tl.reshape(first + second, [8, 4 * RUN]) * in_order(scale, RUN)[None, :]


@triton.jit
def weigh(score, q_scale, best, total):
    """The online softmax goes on: the largest score, the sum of weights, what to keep of earlier ones, the weights."""
    new_best = tl.maximum(best, tl.max(score, 1))
    keep = tl.exp2((best - new_best) * q_scale)
    weight = tl.exp2(score * q_scale[:, None] - (new_best * q_scale - UNIT)[:, None])
    return new_best, total * keep + tl.sum(weight, 1), keep, weight


@triton.jit
def product_v(
    acc, weight, v, seen, dtype: tl.constexpr, DIM: tl.constexpr, RUN: tl.constexpr, FAST: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """acc [(number, 8 pieces of a token), 8 heads] and V of a tile, weighted."""
    W: tl.constexpr = v.numel // (RUN * 32)
    even, odd = tl.split(tl.permute(tl.reshape(v, [2, RUN * 16, W]), [1, 2, 0]))
    if dtype == tl.uint8:
        v = half_bytes.unpack_pairs(even, odd, FAST)
    else:
        v = unpack_pairs(even, odd, dtype, FAST)
    v = tl.reshape(v, [RUN // 2, 8, 4, DIM // 8, 2])  # token, piece, run, number
    v = tl.reshape(tl.permute(v, [3, 1, 0, 2, 4]), [DIM, 4 * RUN])
    if MASKED and dtype != tl.uint8:  # what is not seen may be NaN
        v = tl.where(seen[None, :], v, 0.0)
    return tl.dot(v, opaque(tl.trans(weight).to(tl.float16), FAST), acc)


@triton.jit
def in_order(scale, RUN: tl.constexpr):
    """[4 runs, RUN / 2] words of two bfloat16 -> [4 RUN] float32 in the order of a tile."""
    even = (scale << 16).to(tl.float32, bitcast=True)
    odd = (scale & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.permute(tl.join(even, odd), [1, 0, 2]), [4 * RUN])


@triton.jit
def unpack(words, dtype: tl.constexpr, FAST: tl.constexpr):
    """Words [A, W] -> the four codes of each as float16, which holds them exactly, [A, W, 4]."""
    if not FAST:
        a = words.to(tl.int8).to(dtype, bitcast=True).to(tl.float16)
        b = (words >> 8).to(tl.int8).to(dtype, bitcast=True).to(tl.float16)
        c = (words >> 16).to(tl.int8).to(dtype, bitcast=True).to(tl.float16)
        d = (words >> 24).to(tl.int8).to(dtype, bitcast=True).to(tl.float16)
    elif dtype == tl.int8:
        # A byte b = code + 128 below the exponent of 1024 is the number 1024 + b: four codes, five instructions.
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes, low, high, base;
            mov.b32 base, 0x64806480;
            xor.b32 bytes, $4, 0x80808080;
            prmt.b32 low, bytes, 0x64646464, 0x4140;
            prmt.b32 high, bytes, 0x64646464, 0x4342;
            sub.f16x2 low, low, base;
            sub.f16x2 high, high, base;
            mov.b32 {$0, $1}, low;
            mov.b32 {$2, $3}, high;
            }
            """,
            "=h,=h,=h,=h,r", [words], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high;
            .reg .b32 first, second;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {$0, $1}, first;
            mov.b32 {$2, $3}, second;
            }
            """,
            "=h,=h,=h,=h,r", [words], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    return opaque(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [words.shape[0], words.shape[1], 4]), FAST)


@triton.jit
def unpack_pairs(even, odd, dtype: tl.constexpr, FAST: tl.constexpr):
    """Words [A, W] of two tokens -> as of `unpack` [A, W, 4, 2], each number of one beside that of the other."""
    if FAST:
        low, high = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5140; prmt.b32 $1, $2, $3, 0x7362;", "=&r,=r,r,r", [even, odd],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        words = tl.reshape(tl.join(low, high), [even.shape[0], 2 * even.shape[1]])
        wide = tl.reshape(unpack(words, dtype, FAST), [even.shape[0], even.shape[1], 4, 2])
    else:
        wide = tl.join(unpack(even, dtype, FAST), unpack(odd, dtype, FAST))
    return wide
