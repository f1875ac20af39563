"""Split-KV decode over whatever the blocks hold, for any number of query heads that share a KV head.

Two ways to compute a part, chosen by that number:

  one     (MHA) no tensor core helps. Each lane of the tile keeps a softmax of its own over every TILE-th token, and
          the lanes are merged once at the end: inside the loop no lane waits for another.
  several (GQA) they form the rows of a matrix product on tensor cores, padded to the 16 rows these take.

8-bit codes take the same ways, the second with products of float16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore
from ..triton_launch import Launch
from ..triton_overlap import followed, waited
from .triton_common import LOWEST, V_UNIT, VARYING, load_blocks, load_tokens
from .triton_decode_parts import Tuning, finish_part, load_queries, own_part, token_of


def decode_any(
    grid: tuple[int], numbers: list, sizes: dict, query: Tensor, layer: LayerStore, tuned: Tuning, options: dict
) -> Launch:
    """The kernel, with what `triton_decode.py` has prepared."""
    group, quantised = query.shape[1] // layer.k.shape[1], layer.k_scale is not None
    group_p2 = triton.next_power_of_2(group)
    return Launch(
        decode_kernel, grid, *numbers, GROUP=group, GROUP_P2=group_p2,
        QUANTISED=quantised, HALF=quantised and query.element_size() == 2, FAST=query.is_cuda,
        ROWS=1 if group == 1 else max(group_p2, 16), STAGES=tuned.num_stages, **sizes, **options,
    )  # fmt: skip


@triton.jit
def load_kv(
    k_store, v_store, k_scale, v_scale, block, kv_head, token, seen,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """K and V [TILE, DIM_P2] of these tokens in these blocks, and their scales [TILE]."""
    k, k_scales = load_tokens(
        k_store, k_scale, block, kv_head, token, seen, k_stride_block, k_stride_head, k_stride_token,
        k_scale_stride_block, k_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
    )  # fmt: skip
    v, v_scales = load_tokens(
        v_store, v_scale, block, kv_head, token, seen, v_stride_block, v_stride_head, v_stride_token,
        v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
    )  # fmt: skip
    return k, v, k_scales, v_scales


@triton.jit
def widen(codes, HALF: tl.constexpr, FAST: tl.constexpr, PURE: tl.constexpr):
    """8-bit codes as float16, which holds them exactly, or float32."""
    if not HALF:
        wide = codes.to(tl.float32)
    elif FAST and codes.dtype == tl.int8:
        # A byte b = code + 128 below the exponent of 1024 is the number 1024 + b: four codes, five instructions.
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes, low, high, base;
            mov.b32 base, 0x64806480;
            xor.b32 bytes, $2, 0x80808080;
            prmt.b32 low, bytes, 0x64646464, 0x4140;
            prmt.b32 high, bytes, 0x64646464, 0x4342;
            sub.f16x2 $0, low, base;
            sub.f16x2 $1, high, base;
            }
            """,
            "=r,=r,r", [codes], dtype=tl.float16, is_pure=PURE, pack=4,
        )  # fmt: skip
    else:
        wide = codes.to(tl.float16)
    return wide


@triton.jit(**VARYING)
def decode_kernel(
    query, sink_query, out, k_store, v_store, k_scale, v_scale,
    block_tables, context_lens, parts, part_lses, arrived,
    shared_lens, shared_parts, shared_lses, shared_splits, scaling, num_rows,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head, out_stride_row, out_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, table_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
    GROUP_P2: tl.constexpr, ROWS: tl.constexpr, ROWS_P2: tl.constexpr, TILE_PARTS: tl.constexpr, FAN: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, SINK_PLACES: tl.constexpr, CASCADE: tl.constexpr,
    SHARED_SPLIT: tl.constexpr, WANTED: tl.constexpr, PART: tl.constexpr, MAX_PARTS: tl.constexpr, LEAST: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, QUANTISED: tl.constexpr, HALF: tl.constexpr, FAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """HALF: 8-bit codes are multiplied as float16. FAST: NVIDIA's instructions are there."""
    followed(OVERLAP)
    row, kv_head, part, num_parts, place, end, first, begin, context_len, shared_len, is_there = own_part(
        context_lens, shared_lens, num_rows,
        HEADS, ROWS_P2, WINDOW, SINKS, SINK_PLACES, CASCADE, WANTED, PART, MAX_PARTS, LEAST, TILE, 1,
    )  # fmt: skip
    heads, dims, lanes = tl.arange(0, ROWS), tl.arange(0, DIM_P2), tl.arange(0, TILE)
    table = block_tables + row * table_stride
    token, seen = token_of(place + lanes, end, first, begin, context_len, SINKS, SINK_PLACES, 1)
    block = load_blocks(table, token, seen, BLOCK_SIZE)
    waited(OVERLAP)
    if not is_there:
        return

    q = load_queries(query, row, kv_head, heads, dims, query_stride_row, query_stride_head, GROUP, DIM)
    q_sink = q
    if SINKS > 0:
        q_sink = load_queries(
            sink_query, row, kv_head, heads, dims, sink_query_stride_row, sink_query_stride_head, GROUP, DIM
        )
    if GROUP == 1:
        # Loads run a tile ahead of the arithmetic, and the block table another: a whole tile is always under way.
        k, v, k_scales, v_scales = load_kv(
            k_store, v_store, k_scale, v_scale, block, kv_head, token, seen, k_stride_block, k_stride_head,
            k_stride_token, v_stride_block, v_stride_head, v_stride_token, k_scale_stride_block,
            k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
        )  # fmt: skip
        token, next_seen = token_of(place + TILE + lanes, end, first, begin, context_len, SINKS, SINK_PLACES, 1)
        block = load_blocks(table, token, next_seen, BLOCK_SIZE)
        best = tl.full([TILE], LOWEST, tl.float32)  # one softmax a lane
        total = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, DIM_P2], tl.float32)
        q, q_sink = q.to(tl.float32) * scaling, q_sink.to(tl.float32) * scaling
        for start in tl.range(place, end, TILE, num_stages=1):
            next_k, next_v, next_k_scales, next_v_scales = load_kv(
                k_store, v_store, k_scale, v_scale, block, kv_head, token, next_seen, k_stride_block,
                k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token, k_scale_stride_block,
                k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
            )  # fmt: skip
            _token, seen = token_of(start + lanes, end, first, begin, context_len, SINKS, SINK_PLACES, 1)
            token, next_seen = token_of(start + 2 * TILE + lanes, end, first, begin, context_len, SINKS, SINK_PLACES, 1)
            block = load_blocks(table, token, next_seen, BLOCK_SIZE)
            tile_q = q
            if SINKS > 0:
                tile_q = tl.where(start < SINK_PLACES, q_sink, q)
            score = tl.sum(k.to(tl.float32) * tile_q, 1) * k_scales  # [TILE]
            score = tl.where(seen, score, float("-inf"))
            new_best = tl.maximum(best, score)
            keep = tl.exp2(best - new_best)
            weight = tl.exp2(score - new_best)
            total = total * keep + weight
            acc = acc * keep[:, None] + v.to(tl.float32) * (weight * v_scales)[:, None]
            best = new_best
            k, v, k_scales, v_scales = next_k, next_v, next_k_scales, next_v_scales
        lane_best = best  # merge the lanes
        best = tl.max(lane_best, 0, keep_dims=True)  # [1]
        weight = tl.exp2(lane_best - best)
        total = tl.sum(total * weight, 0, keep_dims=True)
        acc = tl.sum(acc * weight[:, None], 0, keep_dims=True)  # [1, DIM_P2]
    else:
        best = tl.full([ROWS], LOWEST, tl.float32)  # one softmax a query head
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_P2], tl.float32)
        score_scale = tl.full([ROWS], 1.0, tl.float32) * scaling
        if HALF:  # of any size, q fits float16 once its largest number is 1
            largest = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)
            if SINKS > 0:
                largest = tl.maximum(largest, tl.max(tl.abs(q_sink.to(tl.float32)), 1))
            q = (q.to(tl.float32) / largest[:, None]).to(tl.float16)
            q_sink = (q_sink.to(tl.float32) / largest[:, None]).to(tl.float16)
            score_scale *= largest
        for start in tl.range(place, end, TILE, num_stages=STAGES):  # loads run ahead through shared memory
            token, seen = token_of(start + lanes, end, first, begin, context_len, SINKS, SINK_PLACES, 1)
            block = load_blocks(table, token, seen, BLOCK_SIZE)
            k, v, k_scales, v_scales = load_kv(
                k_store, v_store, k_scale, v_scale, block, kv_head, token, seen, k_stride_block, k_stride_head,
                k_stride_token, v_stride_block, v_stride_head, v_stride_token, k_scale_stride_block,
                k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
            )  # fmt: skip
            if QUANTISED:
                # Not pure, so that V is widened where it was loaded: turned for the product as bytes, it costs more.
                k, v = widen(k, HALF, FAST, True), widen(v, HALF, FAST, False)
            tile_q = q
            if SINKS > 0:
                tile_q = tl.where(start < SINK_PLACES, q_sink, q)
            score = tl.dot(tile_q.to(k.dtype), tl.trans(k), input_precision="ieee") * score_scale[:, None]
            if QUANTISED:  # a scale belongs to a token: it can wait until after the product (K) or join the weight (V)
                score *= k_scales[None, :]
            score = tl.where(seen[None, :], score, float("-inf"))  # [ROWS, TILE]
            new_best = tl.maximum(best, tl.max(score, 1))
            keep = tl.exp2(best - new_best)
            weight = tl.exp2(score - new_best[:, None])
            total = total * keep + tl.sum(weight, 1)
            if QUANTISED:
                weight *= (v_scales * V_UNIT)[None, :]
            acc = tl.dot(weight.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
            best = new_best
        if QUANTISED:
            acc /= V_UNIT
    finish_part(
        best, total, acc, out, parts, part_lses, arrived, shared_parts, shared_lses, shared_splits, shared_len,
        row, kv_head, part, num_parts, heads, dims, out_stride_row, out_stride_head,
        GROUP, GROUP_P2, HEADS, DIM, DIM_P2, CASCADE, SHARED_SPLIT, TILE_PARTS, FAN,
    )  # fmt: skip
