"""What the decode and prefill kernels share: the online softmax over tiles, and the merge of split parts.

A part of the tokens yields an output and a log-sum-exp (base 2) a query; parts merge exactly:

    lse = log2 sum_i 2^lse_i          out = sum_i 2^(lse_i - lse) out_i

The last program to arrive does the merge, which saves a launch a layer. Parts are added in their order, not in
the order of arrival, so that a result is the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore, Plan

LOG2_E = 1.4426950408889634
#: For `triton.jit`: numbers that differ from step to step, and where tables lie in the memory of a plan, are no reason
#: to compile a kernel again (three seconds, for each sort of number: 1, a multiple of 16, another).
VARYING = {
    "do_not_specialize": [
        "num_rows", "first_row", "last_row", "num_queries", "num_groups", "num_tokens", "shared_splits", "table_stride",
    ],
    "do_not_specialize_on_alignment": [
        "block_tables", "table", "context_lens", "cu_seqlens_q", "slot_mapping", "shared_lens", "groups",
    ],
}  # fmt: skip
#: Where a maximum starts: finite, so that the difference of two starts is 0 and not NaN.
LOWEST = tl.constexpr(-1.0e30)
#: Where V is summed as codes, weights times scales are so many times as large: else the small ones vanish in a float16,
#: which begins at 2^-24. V may be as large as 65504 / 256 * 127.
V_UNIT = tl.constexpr(256.0)


@triton.jit
def load_tile(
    store, scales, table, kv_head, index, seen, stride_block, stride_head, stride_token,
    scale_stride_block, scale_stride_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Tokens `index` [TILE] of a row -> their K or V [TILE, DIM_P2] as stored (4-bit codes as int8), zeros where not
    seen, and scales."""
    return load_tokens(
        store, scales, load_blocks(table, index, seen, BLOCK_SIZE), kv_head, index, seen, stride_block, stride_head,
        stride_token, scale_stride_block, scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
    )  # fmt: skip


@triton.jit
def load_blocks(table, index, seen, BLOCK_SIZE: tl.constexpr):
    """The blocks that hold tokens `index` of a row."""
    return tl.load(table + index // BLOCK_SIZE, mask=seen, other=0)


@triton.jit
def load_tokens(
    store, scales, block, kv_head, index, seen, stride_block, stride_head, stride_token,
    scale_stride_block, scale_stride_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """As `load_tile`, of tokens whose blocks are known."""
    block, offset = block.to(tl.int64), index % BLOCK_SIZE
    dims = tl.arange(0, DIM_P2)
    IN_HALF_BYTES: tl.constexpr = store.dtype.element_ty == tl.uint8
    HALF: tl.constexpr = DIM // 2
    address = block * stride_block + kv_head.to(tl.int64) * stride_head + offset * stride_token
    mask = seen[:, None]
    if DIM != DIM_P2:
        mask = mask & (dims < DIM)[None, :]
    if IN_HALF_BYTES:  # see `reference.HALF_BYTES`; a byte is read twice, the second time from the cache
        tile = tl.load(store + address[:, None] + (dims % HALF)[None, :], mask=mask, other=0)
        tile = (tile >> (dims // HALF * 4).to(tl.uint8)[None, :]) & 15
        tile = tl.where(mask, tile.to(tl.int8) * 2 - 15, 0)
    else:
        tile = tl.load(store + address[:, None] + dims[None, :], mask=mask, other=0.0)
    scale = tl.full(index.shape, 1.0, tl.float32)
    if QUANTISED:
        address = block * scale_stride_block + kv_head.to(tl.int64) * scale_stride_head + offset
        scale = tl.load(scales + address, mask=seen, other=0.0).to(tl.float32)
    return tile, scale


@triton.jit
def attend(
    best, total, acc, q, scaling, begin, end, position,
    k_store, v_store, k_scale, v_scale, table, kv_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
    WINDOW: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on with the online softmax of q [ROWS, DIM_P2] over the tokens begin:end of a row."""
    if QUANTISED:
        acc *= V_UNIT
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
        # A scale belongs to a token, so it can wait until after the product (K) or join the weight (V).
        score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (k_scales * scaling)[None, :]
        if MASKED:
            visible = seen[None, :] & (index[None, :] <= position[:, None])
            if WINDOW > 0:
                visible = visible & (index[None, :] > position[:, None] - WINDOW)
            score = tl.where(visible, score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        keep = tl.exp2(best - new_best)
        weight = tl.exp2(score - new_best[:, None])
        total = total * keep + tl.sum(weight, 1)
        if QUANTISED:
            weight *= (v_scales * V_UNIT)[None, :]
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * keep[:, None], input_precision="ieee")
        best = new_best
    if QUANTISED:
        acc /= V_UNIT
    return best, total, acc


@triton.jit
def merge_parts(
    parts, part_lses, num_parts, rows, rows_mask, dims, stride, DIM_P2: tl.constexpr, TILE_PARTS: tl.constexpr
):
    """Parts [num_parts, stride, DIM_P2] and their log-sum-exp [num_parts, stride] -> of these rows the merged
    [ROWS_P2, DIM_P2] and its log-sum-exp [ROWS_P2].

    Weights first: the sums that follow do not wait for each other then, only for the memory.
    """
    best = tl.full(rows.shape, LOWEST, tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    # Of few rows more, so that memory is waited for once, not once for a few numbers.
    AT_ONCE: tl.constexpr = 4 * TILE_PARTS if 4 * TILE_PARTS * rows.shape[0] > 64 else 64 // rows.shape[0]
    for start in range(0, num_parts, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        mask = (part < num_parts)[:, None] & rows_mask[None, :]
        # .cg: other programs wrote these, so they are read from L2, past this core's own cache.
        lse = tl.load(part_lses + part[:, None] * stride + rows[None, :], mask=mask, other=LOWEST, cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(lse, 0))
        total = total * tl.exp2(best - new_best) + tl.sum(tl.where(mask, tl.exp2(lse - new_best[None, :]), 0.0), 0)
        best = new_best
    out = tl.zeros([rows.shape[0], DIM_P2], tl.float32)
    for start in tl.range(0, num_parts, TILE_PARTS, loop_unroll_factor=4):
        part = start + tl.arange(0, TILE_PARTS)
        mask = (part < num_parts)[:, None] & rows_mask[None, :]
        at = part[:, None] * stride + rows[None, :]  # [TILE_PARTS, ROWS_P2]
        lse = tl.load(part_lses + at, mask=mask, other=LOWEST, cache_modifier=".cg")
        address = parts + at[:, :, None] * DIM_P2 + dims[None, None, :]
        data = tl.load(address, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
        out += tl.sum(tl.exp2(lse - best[None, :])[:, :, None] * data, 0)
    total = tl.where(total > 0, total, 1.0)
    return out / total[:, None], best + tl.log2(total)


@triton.jit
def fold_parts(
    best, total, out, parts, part_lses, num_parts, rows, rows_mask, dims,
    STRIDE: tl.constexpr, DIM_P2: tl.constexpr, TILE_PARTS: tl.constexpr,
):  # fmt: skip
    """Go on with an online softmax over parts that are done: row r of part p is entry `rows[r] + p * STRIDE`."""
    for start in range(0, num_parts, TILE_PARTS):
        part = start + tl.arange(0, TILE_PARTS)
        mask = (part < num_parts)[:, None] & rows_mask[None, :]
        at = part[:, None] * STRIDE + rows[None, :]  # [TILE_PARTS, ROWS_P2]
        # .cg: other programs wrote these, so they are read from L2, past this core's own cache.
        lse = tl.load(part_lses + at, mask=mask, other=LOWEST, cache_modifier=".cg")
        address = parts + at[:, :, None] * DIM_P2 + dims[None, None, :]
        data = tl.load(address, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(lse, 0))
        weight = tl.exp2(lse - new_best[None, :])
        keep = tl.exp2(best - new_best)
        total = total * keep + tl.sum(tl.where(mask, weight, 0.0), 0)
        out = out * keep[:, None] + tl.sum(weight[:, :, None] * data, 0)
        best = new_best
    return best, total, out


@triton.jit
def opaque(x, FAST: tl.constexpr):
    """x, of which the compiler does not know how it was made: else it would lay that out for a product, and move it to
    there through shared memory. No instruction is left of this."""
    if FAST:
        x = tl.inline_asm_elementwise("mov.b16 $0, $1;", "=h,h", [x], dtype=tl.float16, is_pure=False, pack=1)
    return x


def workspace(
    plan: Plan, name: str, rows: int, parts: int, size: int, dim: int, counters: int | None = None, numbers: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the parts [rows, parts, size, dim], some numbers of each [numbers, rows, parts, size] (their
    log-sum-exps, unless told), and arrival counters (zero), one a row unless told.

    One for all layers of a plan: layers follow one another, and the last program to arrive at a counter puts it
    back to zero. What a graph capture uses is its own, cleared inside the graph, so that it needs nothing from outside.
    """
    counters = rows if counters is None else counters
    return plan.once(
        (name, rows, parts, size, dim, counters, numbers),
        lambda: (
            torch.empty(rows, parts, size, dim, dtype=torch.float32, device=plan.device),
            torch.empty(numbers, rows, parts, size, dtype=torch.float32, device=plan.device),
            torch.zeros(counters, dtype=torch.int32, device=plan.device),
        ),
    )


def planes(layer: LayerStore) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K, V and their scales as kernels take them: where there are none, K and V stand for them, and are not read."""
    return (layer.k, layer.v, layer.k, layer.v) if layer.k_scale is None else layer
