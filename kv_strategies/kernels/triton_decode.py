"""Split-KV decode (Flash-Decoding, FlashDecoding blog post 2023-10, over a block table as in PagedAttention).

One query a row leaves a GPU idle if a row is one program, so the tokens of a row are split and the parts merged:

    row b, KV head h      |-- split 0 --|-- split 1 --|-- ... --|    one program each, all query heads of the KV head
                              (out, lse)    (out, lse)             the last to arrive merges them

The split depends on the row's own length alone, so neither do its results on its neighbours. Two ways to compute a
part, chosen by the number of query heads that share a KV head:

  one     (MHA) no tensor core helps. Each lane of the tile keeps a softmax of its own over every TILE-th token, and
          the lanes are merged once at the end: inside the loop no lane waits for another.
  several (GQA) they form the rows of a matrix product on tensor cores, padded to the 16 rows these take.

Reading K and V once is the floor: bytes = 2 * context * Hkv * D * itemsize a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..plan import LayerStore, Plan
from .triton_cascade import SharedParts, fold_shared
from .triton_common import LOG2_E, LOWEST, load_tile, merge_parts, workspace


@dataclass(frozen=True)
class Tuning:
    """Sizes to tune; results agree to rounding whatever they are. `bench/kernel_bandwidth.py` sweeps them."""

    split: int  # tokens a split, as long as a row has no more than max_splits
    max_splits: int
    tile: int  # tokens an iteration
    num_warps: int
    num_stages: int


def tuning(group: int, dim: int, itemsize: int) -> Tuning:
    """The sizes for a shape."""
    if itemsize == 4:
        return Tuning(split=256, max_splits=64, tile=32, num_warps=4, num_stages=1 if group == 1 else 2)
    if group == 1:  # swept on an H200: more programs an SM beat longer tiles and deeper pipelines
        return Tuning(split=512, max_splits=64, tile=32, num_warps=4, num_stages=1)
    return Tuning(split=512, max_splits=64, tile=128, num_warps=4, num_stages=3)


def decode(
    query: Tensor,
    layer: LayerStore,
    plan: Plan,
    out: Tensor,
    *,
    scaling: float,
    window: int = 0,
    sinks: int = 0,
    sink_query: Tensor | None = None,
    shared: SharedParts | None = None,
    tuned: Tuning | None = None,
) -> None:
    """Write out[b] for the first plan.num_decodes rows, which have one query each. See `reference.attention`.

    `shared`, only without a window: what the tokens that rows share give, which are not read again.

    Nothing here depends on host values but shapes and the bounds in plan.row_lens, so that a CUDA graph can hold it.
    """
    _, num_heads, dim = query.shape
    num_kv_heads = layer.k.shape[1]
    group, rows = num_heads // num_kv_heads, plan.num_decodes
    tuned = tuned or tuning(group, dim, layer.k.element_size())
    sinks = sinks if window or sink_query is not None else 0  # else all is visible anyhow
    longest = max((plan.row_lens if shared is None else plan.private_lens)[:rows])
    num_splits = min(tuned.max_splits, triton.cdiv(min(longest, window or longest), tuned.split)) + (sinks > 0)
    num_splits = max(num_splits, 1)
    dim_p2, group_p2 = max(triton.next_power_of_2(dim), 16), triton.next_power_of_2(group)
    parts, part_lses, arrived = workspace(plan, "decode", rows * num_kv_heads, num_splits, group, dim_p2)
    quantised = layer.k_scale is not None
    k_scale, v_scale = (layer.k_scale, layer.v_scale) if quantised else (layer.k, layer.v)  # not read unless quantised
    shared_lens = plan.context_lens if shared is None else plan.shared_lens  # not read unless shared
    shared_parts, shared_lses, shared_split = shared or (parts, part_lses, 1)
    sink_query = query if sink_query is None else sink_query
    decode_kernel[(num_kv_heads, num_splits, rows)](
        query, sink_query, out, layer.k, layer.v, k_scale, v_scale,
        plan.block_tables, plan.context_lens, parts, part_lses, arrived,
        shared_lens, shared_parts, shared_lses, shared_parts.shape[2], scaling * LOG2_E,
        *query.stride()[:2], *sink_query.stride()[:2], *out.stride()[:2],
        *layer.k.stride()[:3], *layer.v.stride()[:3], *k_scale.stride()[:2], *v_scale.stride()[:2],
        plan.block_tables.stride(0),
        BLOCK_SIZE=layer.block_size, GROUP=group, DIM=dim, DIM_P2=dim_p2, QUANTISED=quantised,
        GROUP_P2=group_p2, ROWS=1 if group == 1 else max(group_p2, 16), TILE_PARTS=max(64 // group_p2, 1),
        WINDOW=window, SINKS=sinks, CASCADE=shared is not None, SHARED_SPLIT=shared_split,
        SPLIT=tuned.split, MAX_SPLITS=tuned.max_splits, TILE=tuned.tile, STAGES=tuned.num_stages,
        num_warps=tuned.num_warps,
    )  # fmt: skip


@triton.jit
def decode_kernel(
    query, sink_query, out, k_store, v_store, k_scale, v_scale,
    block_tables, context_lens, parts, part_lses, arrived,
    shared_lens, shared_parts, shared_lses, shared_splits, scaling,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head, out_stride_row, out_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
    GROUP_P2: tl.constexpr, ROWS: tl.constexpr, TILE_PARTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    CASCADE: tl.constexpr, SHARED_SPLIT: tl.constexpr,
    SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context_len = tl.load(context_lens + row)

    # The tokens of this program: begin:end. With sinks, they are a part of their own, the first.
    first = SINKS
    if WINDOW > 0:
        first = tl.maximum(first, context_len - WINDOW)
    if CASCADE:
        shared_len = tl.load(shared_lens + row)
        first = shared_len
    size = SPLIT * tl.cdiv(tl.maximum(context_len - first, 1), SPLIT * MAX_SPLITS)
    num_parts = tl.cdiv(tl.maximum(context_len - first, 0), size)
    begin = first + split * size
    end = tl.minimum(begin + size, context_len)
    if SINKS > 0:
        num_parts += 1
        begin = tl.where(split == 0, 0, begin - size)
        end = tl.where(split == 0, tl.minimum(SINKS, context_len), tl.minimum(begin + size, context_len))
    if split >= tl.maximum(num_parts, 1):
        return

    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_P2)
    mask = (heads < GROUP)[:, None] & (dims < DIM)[None, :]
    kv_first = kv_head.to(tl.int64) * GROUP  # the first query head of this KV head
    address = query + row * query_stride_row + (kv_first + heads)[:, None] * query_stride_head
    if SINKS > 0 and split == 0:
        address = sink_query + row * sink_query_stride_row + (kv_first + heads)[:, None] * sink_query_stride_head
    q = tl.load(address + dims[None, :], mask=mask, other=0.0)  # [ROWS, DIM_P2]
    table = block_tables + row * table_stride

    if GROUP == 1:
        best = tl.full([TILE], LOWEST, tl.float32)  # one softmax a lane
        total = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, DIM_P2], tl.float32)
        q = q.to(tl.float32) * scaling
    else:
        best = tl.full([ROWS], LOWEST, tl.float32)  # one softmax a query head
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_P2], tl.float32)

    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        index = start + tl.arange(0, TILE)
        seen = index < end
        k, k_scales = load_tile(
            k_store, k_scale, table, kv_head, index, seen, k_stride_block, k_stride_head, k_stride_token,
            k_scale_stride_block, k_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
        )  # fmt: skip
        v, v_scales = load_tile(
            v_store, v_scale, table, kv_head, index, seen, v_stride_block, v_stride_head, v_stride_token,
            v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
        )  # fmt: skip
        if GROUP == 1:
            score = tl.sum(k.to(tl.float32) * q, 1) * k_scales  # [TILE]
            score = tl.where(seen, score, float("-inf"))
            new_best = tl.maximum(best, score)
            keep = tl.exp2(best - new_best)
            weight = tl.exp2(score - new_best)
            total = total * keep + weight
            acc = acc * keep[:, None] + v.to(tl.float32) * (weight * v_scales)[:, None]
        else:
            # A scale belongs to a token, so it can wait until after the product (K) or join the weight (V).
            score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (k_scales * scaling)[None, :]
            score = tl.where(seen[None, :], score, float("-inf"))  # [ROWS, TILE]
            new_best = tl.maximum(best, tl.max(score, 1))
            keep = tl.exp2(best - new_best)
            weight = tl.exp2(score - new_best[:, None])
            total = total * keep + tl.sum(weight, 1)
            weight = (weight * v_scales[None, :]).to(q.dtype)
            acc = tl.dot(weight, v.to(q.dtype), acc * keep[:, None], input_precision="ieee")
        best = new_best

    if GROUP == 1:  # merge the lanes
        lane_best = best
        best = tl.max(lane_best, 0, keep_dims=True)  # [1]
        weight = tl.exp2(lane_best - best)
        total = tl.sum(total * weight, 0, keep_dims=True)
        acc = tl.sum(acc * weight[:, None], 0, keep_dims=True)  # [1, DIM_P2]
    if CASCADE:  # what the row shares with others has been read for all of them
        best, total, acc = fold_shared(
            best, total, acc, row, heads, heads < GROUP, dims, kv_head, split, shared_len, shared_parts, shared_lses,
            shared_splits, tl.num_programs(0), GROUP, DIM_P2, SHARED_SPLIT, 16 if ROWS == 1 else 1,
        )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # a row of context 0: zeros
    acc = acc / total[:, None]

    target = out + row * out_stride_row + kv_first * out_stride_head
    if num_parts <= 1:
        tl.store(target + heads[:, None] * out_stride_head + dims[None, :], acc.to(out.dtype.element_ty), mask=mask)
    else:
        pair = row * tl.num_programs(0) + kv_head
        parts += pair * tl.num_programs(1) * GROUP * DIM_P2  # [splits, GROUP, DIM_P2]
        part_lses += pair * tl.num_programs(1) * GROUP
        at = split * GROUP + heads
        tl.store(part_lses + at, best + tl.log2(total), mask=heads < GROUP)
        tl.store(parts + at[:, None] * DIM_P2 + dims[None, :], acc, mask=(heads < GROUP)[:, None])
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrived + pair, 1) == num_parts - 1:
            tl.store(arrived + pair, 0)
            own = tl.arange(0, GROUP_P2)  # the query heads without the padding that tensor cores want
            merged = merge_parts(parts, part_lses, num_parts, own, own < GROUP, dims, GROUP, DIM_P2, TILE_PARTS)
            tl.store(
                target + own[:, None] * out_stride_head + dims[None, :], merged.to(out.dtype.element_ty),
                mask=(own < GROUP)[:, None] & (dims < DIM)[None, :],
            )  # fmt: skip
