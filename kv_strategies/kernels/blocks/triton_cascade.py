"""Cascade attention: what rows share is read once for all of them (Hydragen, Juravsky et al. 2024, arXiv 2402.05099).

Many short candidates on one history: every row would read the history by itself, a product of a vector and a matrix
each. Their queries together are a matrix, and K and V of the history pass by once:

    tile row m  ->  query m // GROUP of the step, of whichever row;  query head kv_head * GROUP + m % GROUP

    shared tokens   |-- split 0 --|-- split 1 --| ...      this kernel: one program for a tile, KV head and split
    private tokens                 row 0 |--|              decode and prefill start where the shared part ends and
                                   row 1 |-----|           fold its splits into their own softmax

Nothing is merged here: a (out, lse) a query and split is left to the kernels of the private parts, whose many small
programs read them in parallel. The step may hold several groups, and none for some rows: a tile goes over the groups
that its queries are in, with the queries of others masked. All of that is read from the device, so that a captured
graph serves whatever groups a later step has.

Bytes for R rows on S shared tokens: (S + R * private) * 2 * Hkv * D * itemsize, instead of R * (S + private) * ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore, Plan
from ..triton_launch import Launch, launch
from .triton_common import LOG2_E, LOWEST, VARYING, attend, fold_parts, planes

#: Queries for which parts are kept (16 KiB each and split for 32 heads of 128 numbers). Beyond it, rows read what they
#: share by themselves: so many queries are bound by arithmetic, which sharing does not spare.
MAX_QUERIES = 4096


@dataclass(frozen=True)
class Tuning:
    """Sizes to tune, here and in `triton_prefill.py`; results agree to rounding whatever they are."""

    rows: int  # query tokens * GROUP of a tile
    tile: int  # tokens an iteration
    num_warps: int
    num_stages: int
    programs: int = 264  # tokens are split for no more than these: two for each multiprocessor of a large GPU
    split: int = 256  # fewest tokens worth a program


def tuning(rows: int, dim: int, itemsize: int) -> Tuning:
    """The sizes for the number of (query, head) pairs of a KV head in the step."""
    if itemsize == 4:  # float32 products run without tensor cores: small tiles, that registers may hold them
        return Tuning(rows=16 if rows <= 16 else 32, tile=32 if rows <= 16 else 16, num_warps=8, num_stages=2)
    if rows <= 16:
        return Tuning(rows=16, tile=64, num_warps=4, num_stages=3)
    if rows <= 64:
        return Tuning(rows=64, tile=64, num_warps=4, num_stages=3)
    # One program fills a multiprocessor: one wave of them, which also halves what is kept of the parts.
    return Tuning(rows=128, tile=64 if dim > 64 else 128, num_warps=8, num_stages=3, programs=132)


class SharedParts(NamedTuple):
    """What the shared tokens give to each query: what is to be folded into the softmax over its private ones."""

    parts: Tensor  # [num_queries, Hkv, num_splits, GROUP, DIM_P2] float32
    lses: Tensor  # [num_queries, Hkv, num_splits, GROUP] float32, base 2
    split: int  # fewest tokens a split, see `split_size`


def read_shared(
    query: Tensor, layer: LayerStore, plan: Plan, *, scaling: float, tuned: Tuning | None = None
) -> SharedParts | None:
    """Attention of the queries [T, Hq, D] over the tokens that the rows of plan.groups share, without a window.

    None where nothing is worth sharing. Nothing here depends on host values but shapes and bounds, as in `decode`.
    """
    if not plan.row_groups:
        return None
    num_queries = sum(plan.query_lens[: plan.row_groups[-1].last_row])
    if num_queries > MAX_QUERIES:
        return None
    _, num_heads, dim = query.shape
    num_kv_heads = layer.k.shape[1]
    tuned = tuned or tuning(num_queries * (num_heads // num_kv_heads), dim, query.element_size())
    shape = (num_queries, num_kv_heads, num_heads // num_kv_heads, dim)
    shared = plan.once(("cascade", shape, tuned), lambda: shared_parts(plan, *shape, tuned))
    launch(plan, prepare, (query, *planes(layer)), scaling=scaling, shared=shared, tuned=tuned)
    return shared


def shared_parts(plan: Plan, num_queries: int, num_kv_heads: int, group: int, dim: int, tuned: Tuning) -> SharedParts:
    """Memory for the parts, one for all layers: they follow one another."""
    num_tiles = triton.cdiv(num_queries, max(tuned.rows // group, 1))
    num_splits = min(tuned.programs // (num_tiles * num_kv_heads), triton.cdiv(max(plan.row_lens), tuned.split))
    shape = (num_queries, num_kv_heads, max(num_splits, 1), group)
    dim_p2 = max(triton.next_power_of_2(dim), 16)
    parts = torch.empty(*shape, dim_p2, dtype=torch.float32, device=plan.device)
    return SharedParts(parts, torch.empty(*shape, dtype=torch.float32, device=plan.device), tuned.split)


def prepare(
    plan: Plan,
    query: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    scaling: float,
    shared: SharedParts,
    tuned: Tuning,
) -> Launch:
    """For `launch`."""
    num_queries, num_kv_heads, num_splits, group, dim_p2 = shared.parts.shape
    num_groups, tile_queries = plan.groups.shape[0], max(tuned.rows // group, 1)
    return Launch(
        cascade_kernel, (num_kv_heads, triton.cdiv(num_queries, tile_queries), num_splits),
        plan.block_tables, plan.cu_seqlens_q, plan.groups, *shared[:2], scaling * LOG2_E, num_queries, num_groups,
        *query.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        *k_scale.stride()[:2], *v_scale.stride()[:2], plan.block_tables.stride(0),
        BLOCK_SIZE=k.shape[2], GROUP=group, DIM=query.shape[2], DIM_P2=dim_p2, QUANTISED=k_scale is not k,
        GROUPS_P2=max(64, triton.next_power_of_2(num_groups)), TILE_QUERIES=tile_queries,
        ROWS=max(tuned.rows, triton.next_power_of_2(group)),
        TILE=tuned.tile, STAGES=tuned.num_stages, SPLIT=tuned.split, num_warps=tuned.num_warps,
    )  # fmt: skip


@triton.jit
def split_size(num_tokens, num_splits, SPLIT: tl.constexpr):
    """Tokens of a split: all splits are used where that leaves each at least SPLIT tokens."""
    return SPLIT * tl.cdiv(tl.maximum(num_tokens, 1), SPLIT * num_splits)


@triton.jit(**VARYING)
def cascade_kernel(
    query, k_store, v_store, k_scale, v_scale,
    block_tables, cu_seqlens_q, groups, parts, part_lses, scaling, num_queries, num_groups,
    query_stride_row, query_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
    GROUPS_P2: tl.constexpr, TILE_QUERIES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    kv_head, tile_id, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)

    # The groups with queries in this tile and tokens in this split: neighbours, as groups come in the order of rows.
    first_query = tile_id * TILE_QUERIES
    last_query = tl.minimum(first_query + TILE_QUERIES, num_queries)
    ids = tl.arange(0, GROUPS_P2)
    listed = ids < num_groups
    first_rows = tl.load(groups + ids * 3, mask=listed, other=0)
    last_rows = tl.load(groups + ids * 3 + 1, mask=listed, other=0)
    begins = tl.load(cu_seqlens_q + first_rows, mask=listed, other=0)
    ends = tl.load(cu_seqlens_q + last_rows, mask=listed, other=0)
    here = (begins < last_query) & (ends > first_query) & (begins < ends)
    low = tl.min(tl.where(here, ids, GROUPS_P2), 0)
    high = tl.max(tl.where(here, ids + 1, 0), 0)
    if low >= high:
        return

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_P2)
    token = first_query + rows // GROUP
    rows_mask = (rows < TILE_QUERIES * GROUP) & (token < last_query)
    head = kv_head * GROUP + rows % GROUP
    q = tl.load(
        query + token.to(tl.int64)[:, None] * query_stride_row + head[:, None] * query_stride_head + dims[None, :],
        mask=rows_mask[:, None] & (dims < DIM)[None, :], other=0.0,
    )  # fmt: skip
    best = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_P2], tl.float32)
    for index in range(low, high):
        first_row = tl.load(groups + index * 3)
        begin_query = tl.load(cu_seqlens_q + first_row)
        end_query = tl.load(cu_seqlens_q + tl.load(groups + index * 3 + 1))
        num_tokens = tl.load(groups + index * 3 + 2)
        size = split_size(num_tokens, num_splits, SPLIT)
        begin = split * size
        end = tl.minimum(begin + size, num_tokens)
        # Queries of the group see all tokens, those of others none.
        position = tl.where((token >= begin_query) & (token < end_query), num_tokens, -1)
        best, total, acc = attend(
            best, total, acc, q, scaling, begin, end, position,
            k_store, v_store, k_scale, v_scale, block_tables + first_row.to(tl.int64) * table_stride, kv_head,
            k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
            k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
            BLOCK_SIZE, DIM, DIM_P2, QUANTISED, 0, TILE, STAGES, True,
        )  # fmt: skip

    done = rows_mask & (total > 0)  # the others have nothing here, and their part is not read
    total = tl.where(total > 0, total, 1.0)
    at = part_index(token, kv_head, rows % GROUP, tl.num_programs(0), num_splits, GROUP) + split * GROUP
    tl.store(part_lses + at, best + tl.log2(total), mask=done)
    tl.store(parts + at[:, None] * DIM_P2 + dims[None, :], acc / total[:, None], mask=done[:, None])


@triton.jit
def part_index(token, kv_head, head, num_kv_heads, num_splits, GROUP: tl.constexpr):
    """Where the first part of a query head lies; that of the next split is GROUP further."""
    return (token.to(tl.int64) * num_kv_heads + kv_head) * num_splits * GROUP + head


@triton.jit
def fold_shared(
    best, total, acc, token, head, rows_mask, dims, kv_head, split, shared_len, parts, part_lses,
    num_splits, num_kv_heads, GROUP: tl.constexpr, DIM_P2: tl.constexpr, SPLIT: tl.constexpr, TILE_PARTS: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax of queries of one row over what it shares: in the first of its programs, once."""
    num_parts = tl.cdiv(shared_len, split_size(shared_len, num_splits, SPLIT))
    num_parts = tl.where(split == 0, num_parts, 0)
    at = part_index(token, kv_head, head, num_kv_heads, num_splits, GROUP)
    return fold_parts(best, total, acc, parts, part_lses, num_parts, at, rows_mask, dims, GROUP, DIM_P2, TILE_PARTS)
