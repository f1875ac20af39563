"""Attention of any number of queries a row over a block table: prompts, chunks of prompts, prefix hits.

FlashAttention's tiles (arXiv 2205.14135, 2307.08691), packed rows of unequal length in one launch, the tokens found
through the block table. The query heads that share a KV head lie in one tile, so K and V are read once for all of them:

    tile row m  ->  query m // GROUP of the tile,  query head kv_head * GROUP + m % GROUP

Few new queries on a long past (a prefix hit) would leave most of a GPU idle: tokens are split as in `triton_decode`.
Here the split follows the size of the launch in float32, too, which bounds the memory of the parts; so a result may
differ in its last bits with the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore, Plan
from ..triton_launch import Launch, launch
from .triton_cascade import SharedParts, Tuning, fold_shared
from .triton_common import LOG2_E, LOWEST, VARYING, attend, merge_parts, planes, workspace


def tuning(rows: int, dim: int, itemsize: int) -> Tuning:
    """The sizes for the largest number of (query, head) pairs a KV head has in one row of the batch."""
    if itemsize == 4:  # float32 products run without tensor cores: small tiles, that registers may hold them
        return Tuning(rows=16 if rows <= 16 else 32, tile=32, num_warps=8, num_stages=2)
    if rows <= 16:
        return Tuning(rows=16, tile=64, num_warps=4, num_stages=3)
    if rows <= 64:
        return Tuning(rows=64, tile=64, num_warps=4, num_stages=3)
    return Tuning(rows=128, tile=64 if dim > 64 else 128, num_warps=8, num_stages=3)


def prefill(
    query: Tensor,
    layer: LayerStore,
    plan: Plan,
    out: Tensor,
    first_row: int,
    last_row: int,
    *,
    scaling: float,
    window: int = 0,
    sinks: int = 0,
    sink_query: Tensor | None = None,
    shared: SharedParts | None = None,
    tuned: Tuning | None = None,
) -> None:
    """Write out for the queries of the plan's rows first_row:last_row. See `reference.attention`.

    `shared`, only without a window: what the tokens that rows share give, which are not read again.
    """
    launch(
        plan, prepare, (query, query if sink_query is None else sink_query, out, *planes(layer)),
        first_row=first_row, last_row=last_row, scaling=scaling, window=window, sinks=sinks,
        has_sink_query=sink_query is not None, shared=shared, tuned=tuned,
    )  # fmt: skip


def prepare(
    plan: Plan,
    query: Tensor,
    sink_query: Tensor,
    out: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    first_row: int,
    last_row: int,
    scaling: float,
    window: int,
    sinks: int,
    has_sink_query: bool,
    shared: SharedParts | None,
    tuned: Tuning | None,
) -> Launch:
    """For `launch`."""
    _, num_heads, dim = query.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    query_lens = plan.query_lens[first_row:last_row]
    row_lens = (plan.row_lens if shared is None else plan.private_lens)[first_row:last_row]
    tuned = tuned or tuning(max(query_lens) * group, dim, query.element_size())
    tile_queries = max(tuned.rows // group, 1)
    tile_rows = max(tuned.rows, triton.next_power_of_2(group))
    sinks = sinks if window or has_sink_query else 0  # else all is visible anyhow
    # Each row of the batch owns the tiles from (queries before it) // tile_queries + (rows before it) on: enough for
    # its own queries, and a program finds its row by bisection.
    num_tiles = triton.cdiv(sum(query_lens), tile_queries) + len(query_lens) - 1
    longest = max(row_lens) if not window else min(max(row_lens), window + tile_queries)
    num_splits = min(triton.cdiv(longest, tuned.split), tuned.programs // (num_tiles * num_kv_heads))
    num_splits = max(num_splits, 1)
    dim_p2 = max(triton.next_power_of_2(dim), 16)  # a product on tensor cores takes 16 and more
    parts, part_lses, arrived = workspace(
        plan, "prefill", num_tiles * num_kv_heads, num_splits if num_splits > 1 else 0, tile_rows, dim_p2
    )
    shared_lens = plan.context_lens if shared is None else plan.shared_lens  # not read unless shared
    shared_parts, shared_lses, shared_split = shared or (parts, part_lses, 1)
    return Launch(
        prefill_kernel, (num_kv_heads, num_tiles, num_splits),
        plan.block_tables, plan.cu_seqlens_q, plan.context_lens, parts, part_lses, arrived,
        shared_lens, shared_parts, shared_lses, shared_parts.shape[2], scaling * LOG2_E, first_row, last_row,
        *query.stride()[:2], *sink_query.stride()[:2], *out.stride()[:2],
        *k.stride()[:3], *v.stride()[:3], *k_scale.stride()[:2], *v_scale.stride()[:2],
        plan.block_tables.stride(0),
        BLOCK_SIZE=k.shape[2], GROUP=group, DIM=dim, DIM_P2=dim_p2, QUANTISED=k_scale is not k,
        WINDOW=window, SINKS=sinks, SINK_QUERY=has_sink_query,
        CASCADE=shared is not None, SHARED_SPLIT=shared_split,
        TILE_QUERIES=tile_queries, ROWS=tile_rows, TILE=tuned.tile, STAGES=tuned.num_stages,
        SPLIT=tuned.split, num_warps=tuned.num_warps,
    )  # fmt: skip


@triton.jit(**VARYING)
def prefill_kernel(
    query, sink_query, out, k_store, v_store, k_scale, v_scale,
    block_tables, cu_seqlens_q, context_lens, parts, part_lses, arrived,
    shared_lens, shared_parts, shared_lses, shared_splits, scaling, first_row, last_row,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head, out_stride_row, out_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, SINK_QUERY: tl.constexpr,
    CASCADE: tl.constexpr, SHARED_SPLIT: tl.constexpr,
    TILE_QUERIES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    kv_head, split = tl.program_id(0), tl.program_id(2)
    tile_id = tl.num_programs(1) - 1 - tl.program_id(1)  # the end of a prompt takes longest: first

    row, row_begin, query_len, first_query = own_queries(cu_seqlens_q, first_row, last_row, tile_id, TILE_QUERIES)
    context_len = tl.load(context_lens + row)
    if first_query >= query_len:
        return

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_P2)
    row_query = first_query + rows // GROUP
    rows_mask = (rows < TILE_QUERIES * GROUP) & (row_query < query_len)
    mask = rows_mask[:, None] & (dims < DIM)[None, :]
    position = context_len - query_len + row_query  # [ROWS]
    token = (row_begin + row_query).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    table = block_tables + row * table_stride

    # The tokens any query of the tile may see, begin:end, and this program's share of them.
    first_position = context_len - query_len + first_query
    end = tl.minimum(first_position + TILE_QUERIES, context_len)
    begin = SINKS
    if WINDOW > 0:
        begin = tl.maximum(begin, first_position - WINDOW + 1)
    if CASCADE:
        shared_len = tl.load(shared_lens + row)
        begin = shared_len
    sink_end = tl.minimum(SINKS, end)
    if split > 0:
        sink_end = 0  # the first program takes the sinks
    size = tl.maximum(tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), TILE) * TILE, SPLIT)
    num_parts = tl.maximum(tl.cdiv(end - begin, size), 1)
    begin += split * size
    end = tl.minimum(end, begin + size)
    if split >= num_parts:
        return

    best = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_P2], tl.float32)
    if CASCADE:  # what the row shares with others has been read for all of them
        best, total, acc = fold_shared(
            best, total, acc, token, rows % GROUP, rows_mask, dims, kv_head, split, shared_len,
            shared_parts, shared_lses, shared_splits, tl.num_programs(0), GROUP, DIM_P2, SHARED_SPLIT, 1,
        )  # fmt: skip
    q = tl.load(
        query + token[:, None] * query_stride_row + head[:, None] * query_stride_head + dims[None, :],
        mask=mask, other=0.0,
    )  # fmt: skip
    if SINKS > 0:
        q_sink = q
        if SINK_QUERY:
            q_sink = tl.load(
                sink_query
                + token[:, None] * sink_query_stride_row + head[:, None] * sink_query_stride_head + dims[None, :],
                mask=mask, other=0.0,
            )  # fmt: skip
        best, total, acc = attend(
            best, total, acc, q_sink, scaling, 0, sink_end, position,
            k_store, v_store, k_scale, v_scale, table, kv_head,
            k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
            k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
            BLOCK_SIZE, DIM, DIM_P2, QUANTISED, 0, TILE, 1, True,
        )  # fmt: skip
    # Whole tiles that every query sees need no mask; with a window, all tiles are masked.
    clear = begin
    if WINDOW == 0:
        clear = begin + tl.maximum(tl.minimum(end, first_position + 1) - begin, 0) // TILE * TILE
        best, total, acc = attend(
            best, total, acc, q, scaling, begin, clear, position,
            k_store, v_store, k_scale, v_scale, table, kv_head,
            k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
            k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
            BLOCK_SIZE, DIM, DIM_P2, QUANTISED, 0, TILE, STAGES, False,
        )  # fmt: skip
    best, total, acc = attend(
        best, total, acc, q, scaling, clear, end, position,
        k_store, v_store, k_scale, v_scale, table, kv_head,
        k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
        k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
        BLOCK_SIZE, DIM, DIM_P2, QUANTISED, WINDOW, TILE, STAGES, True,
    )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)
    acc = acc / total[:, None]
    target = out + token[:, None] * out_stride_row + head[:, None] * out_stride_head + dims[None, :]
    if num_parts == 1:
        tl.store(target, acc.to(out.dtype.element_ty), mask=mask)
    else:
        pair = tile_id.to(tl.int64) * tl.num_programs(0) + kv_head
        parts += pair * tl.num_programs(2) * ROWS * DIM_P2  # [splits, ROWS, DIM_P2]
        part_lses += pair * tl.num_programs(2) * ROWS
        at = split * ROWS + rows
        tl.store(part_lses + at, best + tl.log2(total))
        tl.store(parts + at[:, None] * DIM_P2 + dims[None, :], acc)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrived + pair, 1) == num_parts - 1:
            tl.store(arrived + pair, 0)
            merged, _lse = merge_parts(parts, part_lses, num_parts, rows, rows_mask, dims, ROWS, DIM_P2, 1)
            tl.store(target, merged.to(out.dtype.element_ty), mask=mask)


@triton.jit
def own_queries(cu_seqlens_q, first_row, last_row, tile_id, TILE_QUERIES: tl.constexpr):
    """The row that a tile of queries belongs to, where its queries begin and how many they are; the tile's first one.

    Rows have tiles of their own, so there are some more than queries need: those begin beyond their row's last query.
    """
    before = tl.load(cu_seqlens_q + first_row)
    low, high = first_row, last_row
    while high - low > 1:  # the last row whose first tile is not beyond this one
        middle = (low + high) // 2
        if (tl.load(cu_seqlens_q + middle) - before) // TILE_QUERIES + (middle - first_row) <= tile_id:
            low = middle
        else:
            high = middle
    row = low.to(tl.int64)
    row_begin = tl.load(cu_seqlens_q + row)
    query_len = tl.load(cu_seqlens_q + row + 1) - row_begin
    first_query = (tile_id - (row_begin - before) // TILE_QUERIES - (low - first_row)) * TILE_QUERIES
    return row, row_begin, query_len, first_query
