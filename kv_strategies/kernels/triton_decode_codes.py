"""Split-KV decode over int8 K and V where each query head has its own: few instructions a byte.

As in `triton_decode.py`, but half the bytes take half the time only if what is done to each of them halves as well. An
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

from ..plan import LayerStore, Plan
from .triton_common import LOWEST
from .triton_decode import Tuning, finish_part, load_queries, own_part
from .triton_overlap import followed, waited


def decode_codes(
    grid: tuple[int, int, int],
    arguments: list,
    sizes: dict,
    query: Tensor,
    layer: LayerStore,
    plan: Plan,
    tuned: Tuning,
    longest: int,
    overlap: dict[str, bool],
) -> None:
    """Launch the kernel with what `decode` has prepared for its own.

    Args:
        longest: most tokens that a row reads.
    """
    block_size, dim = layer.block_size, query.shape[2]
    run = min(tuned.tile, block_size)  # whole blocks or a tile of one, where both are powers of two; else single tokens
    if run & (run - 1) or max(tuned.tile, block_size) % run:
        run = 1
    size = max(tuned.split, triton.cdiv(longest, tuned.max_splits), sizes["SINKS"])
    size = tuned.tile * triton.cdiv(size, tuned.tile)
    num_kv_heads, num_splits, rows = grid
    scores = plan.once(
        ("scores", *grid, size),
        lambda: torch.empty(rows, num_kv_heads, num_splits, size, dtype=torch.float32, device=query.device),
    )
    decode_codes_kernel[grid](
        *arguments, scores, size, RUN=run, **sizes, **overlap,
        WORDS=query.is_cuda and query.element_size() == 2 and dim % 4 == 0,
        **({"maxnreg": 128} if query.is_cuda else {}),  # else the compiler takes more, and fewer programs fit
    )  # fmt: skip


@triton.jit
def decode_codes_kernel(
    query, sink_query, out, k_store, v_store, block_tables, context_lens, parts, part_lses, arrived,
    shared_lens, shared_parts, shared_lses, shared_splits, scaling,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head, out_stride_row, out_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token, table_stride,
    k_scale, v_scale, k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
    scores, scores_stride,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
    TILE_PARTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    CASCADE: tl.constexpr, SHARED_SPLIT: tl.constexpr, PROGRAMS: tl.constexpr,
    SPLIT: tl.constexpr, LEAST: tl.constexpr, MAX_SPLITS: tl.constexpr, TILE: tl.constexpr,
    RUN: tl.constexpr, WORDS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The arguments of `decode_kernel`, then

    scores: [rows, Hkv, splits, scores_stride] float32, workspace.
    WORDS: K is read as words of four int8.
    """
    followed(OVERLAP)
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, begin, end, num_parts, shared_len = own_part(
        context_lens, shared_lens, row, split, WINDOW, SINKS, CASCADE, PROGRAMS, SPLIT, LEAST, MAX_SPLITS, TILE, RUN
    )
    table = block_tables + row * table_stride
    lanes = tl.arange(0, TILE)
    first_runs = begin + tl.arange(0, TILE // RUN) * RUN
    first_block = tl.load(table + first_runs // BLOCK_SIZE, mask=first_runs < end, other=0)
    second_block = tl.load(table + (first_runs + TILE) // BLOCK_SIZE, mask=first_runs + TILE < end, other=0)
    waited(OVERLAP)
    if split >= tl.maximum(num_parts, 1):
        return

    heads = tl.arange(0, 1)
    dims = tl.arange(0, DIM_P2)
    q = load_queries(
        query, sink_query, row, kv_head, split, heads, dims, query_stride_row, query_stride_head,
        sink_query_stride_row, sink_query_stride_head, 1, DIM, SINKS,
    ).to(tl.float32)  # fmt: skip
    scores += ((row * tl.num_programs(0) + kv_head) * tl.num_programs(1) + split) * scores_stride - begin

    # K. Loads run a tile ahead of the arithmetic, and the block table another.
    CODES: tl.constexpr = 4 if WORDS else 1  # in what is loaded at a time
    k_codes = k_store
    if WORDS:
        k_codes = k_store.to(tl.pointer_type(tl.int32))
        largest = tl.maximum(tl.max(tl.abs(q)), 1e-30)
        high, low = two_codes(tl.reshape(q / largest, [DIM_P2]), DIM_P2)
        scaling = scaling * largest / 16256
    best = LOWEST
    runs, block = first_runs, second_block
    k, scale, seen = load_codes(
        k_codes, k_scale, first_block, runs, first, end, kv_head, k_stride_block // CODES, k_stride_head // CODES,
        k_stride_token // CODES, k_scale_stride_block, k_scale_stride_head,
        BLOCK_SIZE, RUN, DIM // CODES, DIM_P2 // CODES, WINDOW + SINKS > 0,
    )  # fmt: skip
    for start in tl.range(begin, end, TILE, num_stages=1):
        runs += TILE
        next_k, next_scale, next_seen = load_codes(
            k_codes, k_scale, block, runs, first, end, kv_head, k_stride_block // CODES, k_stride_head // CODES,
            k_stride_token // CODES, k_scale_stride_block, k_scale_stride_head,
            BLOCK_SIZE, RUN, DIM // CODES, DIM_P2 // CODES, WINDOW + SINKS > 0,
        )  # fmt: skip
        block = tl.load(table + (runs + TILE) // BLOCK_SIZE, mask=runs + TILE < end, other=0)
        if WORDS:
            product = dot_bytes(k, high[None, :], 0) * 128
            score = tl.sum(dot_bytes(k, low[None, :], product), 1).to(tl.float32)
        else:
            score = tl.sum(k.to(tl.float32) * q, 1)
        score = tl.where(seen, score * (scale * scaling), float("-inf"))  # [TILE]
        best = tl.maximum(best, tl.max(score, 0))
        tl.store(scores + start + lanes, score)
        k, scale, seen = next_k, next_scale, next_seen
    tl.debug_barrier()  # what one thread has stored, another reads

    # V
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DIM_P2], tl.float32)
    runs, block = first_runs, second_block
    v, scale, _ = load_codes(
        v_store, v_scale, first_block, runs, first, end, kv_head, v_stride_block, v_stride_head, v_stride_token,
        v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, RUN, DIM, DIM_P2, WINDOW + SINKS > 0,
    )  # fmt: skip
    for start in tl.range(begin, end, TILE, num_stages=1):
        runs += TILE
        next_v, next_scale, _ = load_codes(
            v_store, v_scale, block, runs, first, end, kv_head, v_stride_block, v_stride_head, v_stride_token,
            v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, RUN, DIM, DIM_P2, WINDOW + SINKS > 0,
        )  # fmt: skip
        block = tl.load(table + (runs + TILE) // BLOCK_SIZE, mask=runs + TILE < end, other=0)
        weight = tl.exp2(tl.load(scores + start + lanes) - best)
        total += weight
        acc += v.to(tl.float32) * (weight * scale)[:, None]
        v, scale = next_v, next_scale
    finish_part(
        tl.full([1], 0.0, tl.float32) + best, tl.sum(total, 0, keep_dims=True), tl.sum(acc, 0, keep_dims=True),
        out, parts, part_lses, arrived, shared_parts, shared_lses, shared_splits, shared_len,
        row, kv_head, split, num_parts, heads, dims, out_stride_row, out_stride_head,
        1, 1, DIM, DIM_P2, CASCADE, SHARED_SPLIT, TILE_PARTS,
    )  # fmt: skip


@triton.jit
def load_codes(
    store, scales, block, runs, first, end, kv_head, stride_block, stride_head, stride_token,
    scale_stride_block, scale_stride_head,
    BLOCK_SIZE: tl.constexpr, RUN: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, FROM_FIRST: tl.constexpr,
):  # fmt: skip
    """Codes [TILE, DIM_P2] of the runs of tokens that begin at `runs`, their scales, and which are seen, [TILE].

    FROM_FIRST: `first` need not begin a run.
    """
    index = runs[:, None] + tl.arange(0, RUN)[None, :]  # [TILE / RUN, RUN]
    seen = index < end
    if FROM_FIRST:
        seen = seen & (index >= first)
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
