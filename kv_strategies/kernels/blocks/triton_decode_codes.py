"""Split-KV decode over int8 K and V where each query head has its own: few instructions a byte.

As `triton_decode_any.py`, but half the bytes take half the time only if what is done to each of them halves as well. An
int8 costs a conversion and a product, addresses cost more, and an online softmax rescales its sum at every tile:
together more than a multiprocessor can do while the memory delivers. So a program passes over its tokens twice:

    K    scores of all its tokens, kept in a workspace that stays in the cache, and their maximum
    V    the sum of 2^(score - maximum) v, that never has to be rescaled

Tokens come in runs that lie one after the other in a block, so that one address serves a run. And q . k of int8 runs on
bytes, four products an instruction (dp4a), with q as the sum of two int8 vectors: 15 bits, where bfloat16 has 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore, Plan
from ..triton_launch import Launch
from ..triton_overlap import followed, waited
from .triton_common import LOWEST, VARYING
from .triton_decode_parts import Tuning, finish_part, load_queries, own_part, token_of


def decode_codes(
    grid: tuple[int],
    numbers: list,
    sizes: dict,
    query: Tensor,
    layer: LayerStore,
    plan: Plan,
    tuned: Tuning,
    longest: int,
    options: dict,
) -> Launch:
    """The kernel, with what `triton_decode.py` has prepared.

    Args:
        longest: most places of a row.
    """
    block_size, dim, tile = layer.block_size, query.shape[2], tuned.tile
    run = min(tile, block_size)  # whole blocks or a tile of one, where both are powers of two; else single tokens
    if run & (run - 1) or max(tile, block_size) % run:
        run = 1
    longest = tile * triton.cdiv(longest + run, tile)
    if tuned.part:
        most = max(tuned.part, tile * triton.cdiv(longest, tile * sizes["MAX_PARTS"]))
    else:
        most = max(triton.cdiv(plan.num_decodes * sizes["HEADS"] * longest, sizes["WANTED"]), tuned.least)
        most = 2 * tile * triton.cdiv(most, tile)  # a part is less than twice the target
    most = min(most, longest)  # places of a part
    scores = plan.once(
        ("scores", *grid, most), lambda: torch.empty(*grid, most, dtype=torch.float32, device=query.device)
    )
    return Launch(
        decode_codes_kernel, grid, *numbers, scores, most, RUN=run, **sizes, **options,
        WORDS=query.is_cuda and query.element_size() == 2 and dim % 4 == 0,
    )  # fmt: skip


@triton.jit(**VARYING)
def decode_codes_kernel(
    query, sink_query, out, k_store, v_store, k_scale, v_scale,
    block_tables, context_lens, parts, part_lses, arrived,
    shared_lens, shared_parts, shared_lses, shared_splits, scaling, num_rows,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head, out_stride_row, out_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, table_stride,
    scores, scores_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, ROWS_P2: tl.constexpr,
    TILE_PARTS: tl.constexpr, FAN: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, SINK_PLACES: tl.constexpr,
    CASCADE: tl.constexpr, SHARED_SPLIT: tl.constexpr, WANTED: tl.constexpr, PART: tl.constexpr,
    MAX_PARTS: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, WORDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The arguments of `decode_kernel`, then

    scores: [programs, scores_stride] float32, workspace.
    WORDS: K is read as words of four int8.
    """
    followed(OVERLAP)
    row, kv_head, part, num_parts, place, end, first, begin, context_len, shared_len, is_there = own_part(
        context_lens, shared_lens, num_rows,
        HEADS, ROWS_P2, WINDOW, SINKS, SINK_PLACES, CASCADE, WANTED, PART, MAX_PARTS, LEAST, TILE, RUN,
    )  # fmt: skip
    heads, dims, lanes = tl.arange(0, 1), tl.arange(0, DIM_P2), tl.arange(0, TILE)
    runs = place + tl.arange(0, TILE // RUN) * RUN
    table = block_tables + row * table_stride
    first_block = load_run_blocks(table, runs, end, begin, context_len, BLOCK_SIZE, SINKS, SINK_PLACES)
    second_block = load_run_blocks(table, runs + TILE, end, begin, context_len, BLOCK_SIZE, SINKS, SINK_PLACES)
    scores += tl.program_id(0).to(tl.int64) * scores_stride - place
    waited(OVERLAP)
    if not is_there:
        return

    q = load_queries(query, row, kv_head, heads, dims, query_stride_row, query_stride_head, 1, DIM).to(tl.float32)
    high, low, score_scale = as_codes(q, scaling, WORDS, DIM_P2)
    if SINKS > 0:
        q_sink = load_queries(
            sink_query, row, kv_head, heads, dims, sink_query_stride_row, sink_query_stride_head, 1, DIM
        ).to(tl.float32)
        sink_high, sink_low, sink_scale = as_codes(q_sink, scaling, WORDS, DIM_P2)

    # K. Loads run a tile ahead of the arithmetic, and the block table another.
    CODES: tl.constexpr = 4 if WORDS else 1  # in what is loaded at a time
    k_codes = k_store
    if WORDS:
        k_codes = k_store.to(tl.pointer_type(tl.int32))
    best = LOWEST
    k, scale, seen = load_codes(
        k_codes, k_scale, first_block, runs, end, first, begin, context_len, kv_head, k_stride_block // CODES,
        k_stride_head // CODES, k_stride_token // CODES, k_scale_stride_block, k_scale_stride_head,
        BLOCK_SIZE, RUN, DIM // CODES, DIM_P2 // CODES, SINKS, SINK_PLACES,
    )  # fmt: skip
    block = second_block
    for start in tl.range(place, end, TILE, num_stages=1):
        ahead = runs + (start - place + TILE)
        next_k, next_scale, next_seen = load_codes(
            k_codes, k_scale, block, ahead, end, first, begin, context_len, kv_head, k_stride_block // CODES,
            k_stride_head // CODES, k_stride_token // CODES, k_scale_stride_block, k_scale_stride_head,
            BLOCK_SIZE, RUN, DIM // CODES, DIM_P2 // CODES, SINKS, SINK_PLACES,
        )  # fmt: skip
        block = load_run_blocks(table, ahead + TILE, end, begin, context_len, BLOCK_SIZE, SINKS, SINK_PLACES)
        tile_high, tile_low, tile_scale = high, low, score_scale
        if SINKS > 0:
            is_sink = start < SINK_PLACES
            tile_high, tile_low = tl.where(is_sink, sink_high, high), tl.where(is_sink, sink_low, low)
            tile_scale = tl.where(is_sink, sink_scale, score_scale)
        if WORDS:
            product = dot_bytes(k, tile_high[None, :], 0) * 128
            score = tl.sum(dot_bytes(k, tile_low[None, :], product), 1).to(tl.float32)
        else:
            score = tl.sum(k.to(tl.float32) * tile_high[None, :], 1)
        score = tl.where(seen, score * (scale * tile_scale), float("-inf"))  # [TILE]
        best = tl.maximum(best, tl.max(score, 0))
        tl.store(scores + start + lanes, score)
        k, scale, seen = next_k, next_scale, next_seen
    tl.debug_barrier()  # what one thread has stored, another reads

    # V
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DIM_P2], tl.float32)
    v, scale, seen = load_codes(
        v_store, v_scale, first_block, runs, end, first, begin, context_len, kv_head, v_stride_block,
        v_stride_head, v_stride_token, v_scale_stride_block, v_scale_stride_head,
        BLOCK_SIZE, RUN, DIM, DIM_P2, SINKS, SINK_PLACES,
    )  # fmt: skip
    block = second_block
    for start in tl.range(place, end, TILE, num_stages=1):
        ahead = runs + (start - place + TILE)
        next_v, next_scale, next_seen = load_codes(
            v_store, v_scale, block, ahead, end, first, begin, context_len, kv_head, v_stride_block,
            v_stride_head, v_stride_token, v_scale_stride_block, v_scale_stride_head,
            BLOCK_SIZE, RUN, DIM, DIM_P2, SINKS, SINK_PLACES,
        )  # fmt: skip
        block = load_run_blocks(table, ahead + TILE, end, begin, context_len, BLOCK_SIZE, SINKS, SINK_PLACES)
        weight = tl.exp2(tl.load(scores + start + lanes) - best)
        total += weight
        acc += v.to(tl.float32) * (weight * scale)[:, None]
        v, scale = next_v, next_scale
    finish_part(
        tl.full([1], 0.0, tl.float32) + best, tl.sum(total, 0, keep_dims=True), tl.sum(acc, 0, keep_dims=True),
        out, parts, part_lses, arrived, shared_parts, shared_lses, shared_splits, shared_len,
        row, kv_head, part, num_parts, heads, dims, out_stride_row, out_stride_head,
        1, 1, HEADS, DIM, DIM_P2, CASCADE, SHARED_SPLIT, TILE_PARTS, FAN,
    )  # fmt: skip


@triton.jit
def as_codes(q, scaling, WORDS: tl.constexpr, DIM_P2: tl.constexpr):
    """The query [1, DIM_P2] as two vectors of words, or as it is; and the scale of its products with codes."""
    if WORDS:
        largest = tl.maximum(tl.max(tl.abs(q)), 1e-30)
        high, low = two_codes(tl.reshape(q / largest, [DIM_P2]), DIM_P2)
        scaling = scaling * largest / 16256
    else:
        high = tl.reshape(q, [DIM_P2])
        low = high
    return high, low, scaling


@triton.jit
def load_run_blocks(
    table, place, end, begin, context_len, BLOCK_SIZE: tl.constexpr, SINKS: tl.constexpr, SINK_PLACES: tl.constexpr,
):  # fmt: skip
    """The blocks of the runs that begin at these places."""
    token, seen = token_of(place, end, 0, begin, context_len, SINKS, SINK_PLACES, 1)
    return tl.load(table + token // BLOCK_SIZE, mask=seen, other=0)


@triton.jit
def load_codes(
    store, scales, block, runs, end, first, begin, context_len, kv_head, stride_block, stride_head, stride_token,
    scale_stride_block, scale_stride_head, BLOCK_SIZE: tl.constexpr, RUN: tl.constexpr, DIM: tl.constexpr,
    DIM_P2: tl.constexpr, SINKS: tl.constexpr, SINK_PLACES: tl.constexpr,
):  # fmt: skip
    """Codes [TILE, DIM_P2] of the runs that begin at the places `runs`, their scales, and which are seen, [TILE]."""
    place = runs[:, None] + tl.arange(0, RUN)[None, :]  # [TILE / RUN, RUN]
    _, seen = token_of(place, end, first, begin, context_len, SINKS, SINK_PLACES, RUN)
    runs, _ = token_of(runs, end, first, begin, context_len, SINKS, SINK_PLACES, RUN)
    codes = load_runs(
        store, block, runs, seen, kv_head, stride_block, stride_head, stride_token, BLOCK_SIZE, RUN, DIM, DIM_P2
    )
    scale = load_runs(
        scales, block, runs, seen, kv_head, scale_stride_block, scale_stride_head, 1, BLOCK_SIZE, RUN, 1, 1
    )
    tile: tl.constexpr = runs.shape[0] * RUN
    return codes, tl.reshape(scale, [tile]).to(tl.float32), tl.reshape(seen, [tile])


@triton.jit
def load_runs(
    store, block, first, seen, kv_head, stride_block, stride_head, stride_token,
    BLOCK_SIZE: tl.constexpr, RUN: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
):  # fmt: skip
    """Tokens in runs of RUN -> their K or V [RUNS * RUN, DIM_P2] as stored, zeros where not seen.

    The tokens of a run lie in one block, one after the other, so that addresses cost little: one a run is computed.

    Args:
        block, first: [RUNS] the block of each run, and its first token, a multiple of RUN.
        seen: [RUNS, RUN].
    """
    start = block.to(tl.int64) * stride_block + kv_head.to(tl.int64) * stride_head
    if RUN != BLOCK_SIZE:
        start += first % BLOCK_SIZE * stride_token
    dims = tl.arange(0, DIM_P2)
    inside = tl.arange(0, RUN)[:, None] * stride_token + dims[None, :]  # [RUN, DIM_P2]
    mask = seen[:, :, None]
    if DIM != DIM_P2:
        mask = mask & (dims < DIM)[None, None, :]
    tile = tl.load(store + start[:, None, None] + inside[None, :, :], mask=mask, other=0.0)
    return tl.reshape(tile, [seen.shape[0] * RUN, DIM_P2])


@triton.jit
def two_codes(x, DIM_P2: tl.constexpr):
    """x [DIM_P2] of -1 to 1 -> two vectors [DIM_P2 / 4] of four int8 a word, high * 128 + low = x * 16256 rounded."""
    x = x * 16256
    high = ((x / 128 + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2^23: what is left is the nearest integer
    low = ((x - high * 128 + 12582912.0) - 12582912.0).to(tl.int32)
    shifts = tl.arange(0, 4)[None, :] * 8
    high = tl.sum((tl.reshape(high, [DIM_P2 // 4, 4]) & 0xFF) << shifts, 1)
    low = tl.sum((tl.reshape(low, [DIM_P2 // 4, 4]) & 0xFF) << shifts, 1)
    return high, low


@triton.jit
def dot_bytes(a, b, c):
    """The products of the four int8 in each word of a and b, summed, and c."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )
