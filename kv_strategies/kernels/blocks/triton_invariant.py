"""Attention whose result for a query does not depend, to the bit, on what is computed beside it.

The tokens of a row are cut where their own indices say, whatever the length of the row and whoever asks:

    segment 0 (SEGMENT tokens)   segment 1                  ...         its last one
    tile, tile, tile, tile       tile, tile, tile, tile     tile, ti    each an online softmax of its own from nothing
            \\___________________________|________________________/
                     folded, the first to the last

So a query of a decode step, the same one in a chunk of a prompt, behind a prefix hit, or computed again after
preemption adds the same numbers in the same order. Tokens it does not see weigh exactly 0, and a segment of nothing
folds to what was there. A row's segments are for a program each, whose parts the last to arrive folds, or all for one
program, as the launch asks; and so is how many queries a program has: the arithmetic is the same code.

Costs: long prompts run at the rate of this kernel, half that of the library's (docs/reliability.md has the figures).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore, Plan
from ..triton_device import num_multiprocessors
from .triton_common import LOG2_E, LOWEST, V_UNIT, VARYING, load_tile, workspace
from .triton_prefill import own_queries


class Sizes(NamedTuple):
    """How a launch computes. With another tile or segment results have other bits; with other rows they do not."""

    rows: int  # (query, head) pairs of a KV head at once
    tile: int  # tokens at once
    segment: int  # tokens, a multiple of the tile
    num_warps: int
    num_stages: int


#: Bytes of parts that are worth having a program for each segment of a row, and where programs are few otherwise.
FEW_PARTS, MANY_PARTS = 16 << 20, 128 << 20


def sizes_for(dtype: torch.dtype, num_pairs: int, group: int, quantised: bool) -> Sizes:
    """Those for queries of this type and the most (query, head) pairs a KV head has in one row, swept on an H100.

    Tensor cores add sixteen columns at a time, in few rows and in many; but for few rows Triton deals out 8-bit columns
    in another order, so that these are other sixteen. Hence 64 rows at least, which Hopper multiplies by another
    instruction.
    """
    if dtype.itemsize == 4:  # without tensor cores: one for all, small tiles, that registers may hold them
        return Sizes(max(triton.next_power_of_2(group), 16), tile=32, segment=256, num_warps=4, num_stages=2)
    tile = 64 if quantised else 128
    if num_pairs > 64:
        return Sizes(max(triton.next_power_of_2(group), 128), tile, segment=512, num_warps=8, num_stages=3)
    if num_pairs > 16 or quantised:
        return Sizes(64, tile, segment=512, num_warps=4, num_stages=3)
    return Sizes(16, tile, segment=512, num_warps=4, num_stages=3)


def attend(
    query: Tensor,
    layer: LayerStore,
    plan: Plan,
    out: Tensor,
    first_row: int,
    last_row: int,
    *,
    scaling: float,
    sizes: Sizes | None = None,
    is_split: bool | None = None,
) -> None:
    """Write out for the queries of the plan's rows first_row:last_row. See `reference.attention`; without a window.

    Args:
        is_split: whether each segment of a row is for a program of its own; unless told, where that pays.
    """
    _, num_heads, dim = query.shape
    num_kv_heads = layer.k.shape[1]
    group = num_heads // num_kv_heads
    query_lens = plan.query_lens[first_row:last_row]
    quantised = layer.k_scale is not None
    sizes = sizes or sizes_for(query.dtype, max(query_lens) * group, group, quantised)
    tile_queries = max(sizes.rows // group, 1)
    num_tiles = triton.cdiv(sum(query_lens), tile_queries) + len(query_lens) - 1  # see `own_queries`
    max_parts = max(triton.cdiv(max(plan.row_lens[first_row:last_row]), sizes.segment), 1)
    part_rows = min(tile_queries, max(query_lens)) * group
    dim_p2 = max(triton.next_power_of_2(dim), 16)  # a product on tensor cores takes 16 and more
    num_programs = num_tiles * num_kv_heads
    if is_split is None:
        num_bytes = num_programs * max_parts * part_rows * dim_p2 * 4
        has_few = num_programs < num_multiprocessors(query.device)
        is_split = num_bytes <= (MANY_PARTS if has_few else FEW_PARTS)
    num_splits = max_parts if is_split else 1
    parts, numbers, arrived = workspace(
        plan, "invariant", num_programs, num_splits if num_splits > 1 else 0, part_rows, dim_p2, numbers=2
    )
    k_scale, v_scale = (layer.k_scale, layer.v_scale) if quantised else (layer.k, layer.v)  # not read unless quantised
    invariant_kernel[(num_kv_heads, num_tiles, num_splits)](
        query, out, layer.k, layer.v, k_scale, v_scale,
        plan.block_tables, plan.cu_seqlens_q, plan.context_lens, parts, numbers[0], numbers[1], arrived,
        scaling * LOG2_E, first_row, last_row, part_rows,
        *query.stride()[:2], *out.stride()[:2],
        *layer.k.stride()[:3], *layer.v.stride()[:3], *k_scale.stride()[:2], *v_scale.stride()[:2],
        plan.block_tables.stride(0),
        BLOCK_SIZE=layer.block_size, GROUP=group, DIM=dim, DIM_P2=dim_p2, QUANTISED=quantised,
        TILE_QUERIES=tile_queries, ROWS=sizes.rows, TILE=sizes.tile, STAGES=sizes.num_stages, SEGMENT=sizes.segment,
        num_warps=sizes.num_warps,
        enable_fp_fusion=False,  # a product and a sum are two roundings, wherever the compiler meets them
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[*VARYING["do_not_specialize"], "part_rows"],
    do_not_specialize_on_alignment=VARYING["do_not_specialize_on_alignment"],
)
def invariant_kernel(
    query, out, k_store, v_store, k_scale, v_scale,
    block_tables, cu_seqlens_q, context_lens, parts, part_bests, part_totals, arrived,
    scaling, first_row, last_row, part_rows,
    query_stride_row, query_stride_head, out_stride_row, out_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
    TILE_QUERIES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    kv_head, split, num_splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    tile_id = tl.num_programs(1) - 1 - tl.program_id(1)  # the end of a prompt takes longest: first
    row, row_begin, query_len, first_query = own_queries(cu_seqlens_q, first_row, last_row, tile_id, TILE_QUERIES)
    if first_query >= query_len:
        return
    context_len = tl.load(context_lens + row)

    first_position = context_len - query_len + first_query
    end = tl.minimum(first_position + TILE_QUERIES, context_len)  # of the tokens that a query of the tile sees
    num_parts = tl.maximum(tl.cdiv(end, SEGMENT), 1)
    first_part, last_part = 0, num_parts
    if num_splits > 1:
        first_part, last_part = split, split + 1
        if split >= num_parts:
            return

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM_P2)
    row_query = first_query + rows // GROUP
    rows_mask = (rows < TILE_QUERIES * GROUP) & (row_query < query_len)
    mask = rows_mask[:, None] & (dims < DIM)[None, :]
    position = context_len - query_len + row_query  # [ROWS]
    token = (row_begin + row_query).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    table = block_tables + row * table_stride
    q = tl.load(
        query + token[:, None] * query_stride_row + head[:, None] * query_stride_head + dims[None, :],
        mask=mask, other=0.0,
    )  # fmt: skip

    best = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_P2], tl.float32)
    for part in tl.range(first_part, last_part, num_stages=1):
        begin, stop = part * SEGMENT, tl.minimum((part + 1) * SEGMENT, end)
        # Whole tiles that every query sees need no mask.
        clear = begin + tl.maximum(tl.minimum(stop, first_position + 1) - begin, 0) // TILE * TILE
        part_best = tl.full([ROWS], LOWEST, tl.float32)
        part_total = tl.zeros([ROWS, 16], tl.float32)  # sixteen times the same
        part_acc = tl.zeros([ROWS, DIM_P2], tl.float32)
        part_best, part_total, part_acc = accumulate(
            part_best, part_total, part_acc, q, scaling, begin, clear, position, stop,
            k_store, v_store, k_scale, v_scale, table, kv_head,
            k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
            k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
            BLOCK_SIZE, DIM, DIM_P2, QUANTISED, TILE, STAGES, False,
        )  # fmt: skip
        part_best, part_total, part_acc = accumulate(
            part_best, part_total, part_acc, q, scaling, clear, stop, position, stop,
            k_store, v_store, k_scale, v_scale, table, kv_head,
            k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
            k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
            BLOCK_SIZE, DIM, DIM_P2, QUANTISED, TILE, STAGES, True,
        )  # fmt: skip
        if QUANTISED:
            part_acc /= V_UNIT
        best, total, acc = fold(best, total, acc, part_best, tl.max(part_total, 1), part_acc, scaling)

    target = out + token[:, None] * out_stride_row + head[:, None] * out_stride_head + dims[None, :]
    if num_splits == 1 or num_parts == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # a row of context 0: zeros
        tl.store(target, acc.to(out.dtype.element_ty), mask=mask)
    else:
        pair = tile_id.to(tl.int64) * tl.num_programs(0) + kv_head
        parts += pair * num_splits * part_rows * DIM_P2  # [splits, part_rows, DIM_P2]
        part_bests += pair * num_splits * part_rows
        part_totals += pair * num_splits * part_rows
        at, kept = split * part_rows + rows, rows < part_rows
        tl.store(part_bests + at, best, mask=kept)
        tl.store(part_totals + at, total, mask=kept)
        tl.store(parts + at[:, None] * DIM_P2 + dims[None, :], acc, mask=kept[:, None])
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrived + pair, 1) == num_parts - 1:
            tl.store(arrived + pair, 0)
            best = tl.full([ROWS], LOWEST, tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, DIM_P2], tl.float32)
            for part in tl.range(0, num_parts, num_stages=1):
                at = part * part_rows + rows
                # .cg: other programs wrote these, so they are read from L2, past this core's own cache.
                part_best = tl.load(part_bests + at, mask=kept, other=LOWEST, cache_modifier=".cg")
                part_total = tl.load(part_totals + at, mask=kept, other=0.0, cache_modifier=".cg")
                address = parts + at[:, None] * DIM_P2 + dims[None, :]
                part_acc = tl.load(address, mask=kept[:, None], other=0.0, cache_modifier=".cg")
                best, total, acc = fold(best, total, acc, part_best, part_total, part_acc, scaling)
            acc = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def fold(best, total, acc, part_best, part_total, part_acc, scaling):
    """Two softmaxes over different tokens, not divided by their totals yet, as one. A part of no token changes nothing,
    and a part folded into nothing is itself, to the bit."""
    new_best = tl.maximum(best, part_best)
    keep, add = tl.exp2((best - new_best) * scaling), tl.exp2((part_best - new_best) * scaling)
    return new_best, total * keep + part_total * add, acc * keep[:, None] + part_acc * add[:, None]


@triton.jit
def accumulate(
    best, total, acc, q, scaling, begin, end, position, stop,
    k_store, v_store, k_scale, v_scale, table, kv_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on with the online softmax of q [ROWS, DIM_P2] over the tokens begin:end of a part that ends at `stop`.

    Unlike `triton_common.attend`, `best` is of scores not scaled yet: whether a tile is masked must not decide whether
    a product and a difference are rounded once or twice. And the total is a product, with ones, since the order of a
    sum over a tile follows how many warps there are.
    """
    ones = tl.full([TILE, 16], 1.0, q.dtype)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        index = start + tl.arange(0, TILE)
        seen = index < stop
        k, k_scales = load_tile(
            k_store, k_scale, table, kv_head, index, seen, k_stride_block, k_stride_head, k_stride_token,
            k_scale_stride_block, k_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
        )  # fmt: skip
        v, v_scales = load_tile(
            v_store, v_scale, table, kv_head, index, seen, v_stride_block, v_stride_head, v_stride_token,
            v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
        )  # fmt: skip
        score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if QUANTISED:
            score *= k_scales[None, :]
        if MASKED:
            score = tl.where(seen[None, :] & (index[None, :] <= position[:, None]), score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        keep = tl.exp2((best - new_best) * scaling)
        weight = tl.exp2((score - new_best[:, None]) * scaling)
        total = tl.dot(weight.to(q.dtype), ones, total * keep[:, None], input_precision="ieee")
        if QUANTISED:
            weight *= (v_scales * V_UNIT)[None, :]
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * keep[:, None], input_precision="ieee")
        best = new_best
    return best, total, acc
