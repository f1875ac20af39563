"""Split-KV decode (Flash-Decoding, FlashDecoding blog post 2023-10, over a block table as in PagedAttention).

One query a row leaves a GPU idle if a row is one program, so the tokens of a row are split and the parts merged:

    row b, KV head h      |-- split 0 --|-- split 1 --|-- ... --|    one program each, all query heads of the KV head
                              (out, lse)    (out, lse)             the last to arrive merges them

Long splits spare merging, short ones keep a GPU busy: a program takes as many tokens as leave each multiprocessor
a few programs. In float32, where tokens are compared to the bit, the split depends on the row's own length alone, so
neither do its results on its neighbours.

Two ways to compute a part, chosen by the number of query heads that share a KV head:

  one     (MHA) no tensor core helps. Each lane of the tile keeps a softmax of its own over every TILE-th token, and
          the lanes are merged once at the end: inside the loop no lane waits for another.
  several (GQA) they form the rows of a matrix product on tensor cores, padded to the 16 rows these take.

8-bit codes take the same ways, the second with products of float16; int8 and the first way have a kernel of their own,
`triton_decode_codes.py`.

Reading K and V once is the floor: bytes = 2 * context * Hkv * D * itemsize a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import LayerStore, Plan
from .triton_cascade import SharedParts, fold_shared
from .triton_common import LOG2_E, LOWEST, V_UNIT, load_blocks, load_tokens, merge_parts, workspace
from .triton_overlap import followed, overlapping, waited


@dataclass(frozen=True)
class Tuning:
    """Sizes to tune; results agree to rounding whatever they are. `bench/kernel_bandwidth.py` sweeps them."""

    split: int  # most tokens a program, as long as a row has no more than max_splits
    least: int  # fewest tokens a program, where the launch has few of them
    max_splits: int
    tile: int  # tokens an iteration
    num_warps: int
    num_stages: int = 1
    programs: int = 528  # that keep a large GPU busy: four a multiprocessor, say


def tuning(group: int, dtype: torch.dtype) -> Tuning:
    """The sizes for a number of query heads a KV head and the dtype of K and V as stored, swept on an H200.

    Float32 is for float32 queries on any store: they take the most registers, and their results are compared.
    """
    if dtype == torch.float32:
        return Tuning(split=256, least=256, max_splits=64, tile=32, num_warps=4)
    if group > 1:
        return Tuning(split=1024, least=64, max_splits=64, tile=64, num_warps=2, num_stages=2, programs=264)
    if dtype == torch.int8:
        return Tuning(split=512, least=64, max_splits=64, tile=32, num_warps=2)
    return Tuning(split=512 if dtype.itemsize == 1 else 1024, least=64, max_splits=64, tile=32, num_warps=4)


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
    tuned = tuned or tuning(group, query.dtype if query.dtype == torch.float32 else layer.k.dtype)
    sinks = sinks if window or sink_query is not None else 0  # else all is visible anyhow
    longest = max((plan.row_lens if shared is None else plan.private_lens)[:rows])
    longest = min(longest, window + layer.block_size if window else longest)  # a window need not begin with a block
    # The kernel knows each row's length, from which `own_part` follows; this bounds what may come out.
    num_splits = max(triton.cdiv(longest, tuned.split), triton.cdiv(tuned.programs, num_kv_heads * rows))
    num_splits = min(num_splits, triton.cdiv(longest, tuned.least), tuned.max_splits)
    num_splits = max(num_splits, 1) + (sinks > 0)
    dim_p2, group_p2 = max(triton.next_power_of_2(dim), 16), triton.next_power_of_2(group)
    parts, part_lses, arrived = workspace(plan, "decode", rows * num_kv_heads, num_splits, group, dim_p2)
    quantised = layer.k_scale is not None
    shared_lens = plan.context_lens if shared is None else plan.shared_lens  # not read unless shared
    shared_parts, shared_lses, shared_split = shared or (parts, part_lses, 1)
    sink_query = query if sink_query is None else sink_query
    arguments = [
        query, sink_query, out, layer.k, layer.v, plan.block_tables, plan.context_lens, parts, part_lses, arrived,
        shared_lens, shared_parts, shared_lses, shared_parts.shape[2], scaling * LOG2_E,
        *query.stride()[:2], *sink_query.stride()[:2], *out.stride()[:2],
        *layer.k.stride()[:3], *layer.v.stride()[:3], plan.block_tables.stride(0),
    ]  # fmt: skip
    sizes = {
        "BLOCK_SIZE": layer.block_size, "DIM": dim, "DIM_P2": dim_p2,
        "TILE_PARTS": max(16 * tuned.num_warps // max(group_p2, 4), 1), "WINDOW": window, "SINKS": sinks,
        "CASCADE": shared is not None, "SHARED_SPLIT": shared_split, "PROGRAMS": tuned.programs,
        "SPLIT": tuned.split, "LEAST": tuned.least, "MAX_SPLITS": tuned.max_splits,
        "TILE": tuned.tile, "num_warps": tuned.num_warps,
    }  # fmt: skip
    if quantised:
        arguments += [layer.k_scale, layer.v_scale, *layer.k_scale.stride()[:2], *layer.v_scale.stride()[:2]]
    else:  # not read
        arguments += [layer.k, layer.v, 0, 0, 0, 0]
    grid = num_kv_heads, num_splits, rows
    overlap = overlapping(query.device)
    if layer.k.dtype == torch.int8 and group == 1:
        from .triton_decode_codes import decode_codes  # which takes parts of this module

        decode_codes(grid, arguments, sizes, query, layer, plan, tuned, longest, overlap)
    else:
        decode_kernel[grid](
            *arguments, GROUP=group, GROUP_P2=group_p2,
            QUANTISED=quantised, HALF=quantised and query.element_size() == 2, FAST=query.is_cuda,
            ROWS=1 if group == 1 else max(group_p2, 16), STAGES=tuned.num_stages, **sizes, **overlap,
        )  # fmt: skip


@triton.jit
def own_part(
    context_lens, shared_lens, row, split,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, CASCADE: tl.constexpr, PROGRAMS: tl.constexpr,
    SPLIT: tl.constexpr, LEAST: tl.constexpr, MAX_SPLITS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The tokens of a program, begin:end less those before first; of how many parts; how many are read for others too.

    Parts begin at multiples of RUN. With sinks, these are a part of their own, the first.
    """
    context_len = tl.load(context_lens + row)
    first = SINKS
    shared_len = 0
    if WINDOW > 0:
        first = tl.maximum(first, context_len - WINDOW)
    if CASCADE:
        shared_len = tl.load(shared_lens + row)
        first = shared_len
    whole = first // RUN * RUN
    num_tokens = tl.where(context_len > first, context_len - whole, 0)
    programs = tl.cdiv(PROGRAMS, tl.num_programs(0) * tl.num_programs(2))  # of a row and KV head, for a busy GPU
    size = tl.minimum(tl.maximum(tl.cdiv(num_tokens, programs), LEAST), SPLIT)
    size = TILE * tl.cdiv(tl.maximum(size, tl.cdiv(num_tokens, MAX_SPLITS)), TILE)
    num_parts = tl.cdiv(num_tokens, size)
    begin = whole + split * size
    end = tl.minimum(begin + size, context_len)
    if SINKS > 0:
        num_parts += 1
        first = tl.where(split == 0, 0, first)
        begin = tl.where(split == 0, 0, begin - size)
        end = tl.where(split == 0, tl.minimum(SINKS, context_len), tl.minimum(begin + size, context_len))
    return first, begin, end, num_parts, shared_len


@triton.jit
def finish_part(
    best, total, acc, out, parts, part_lses, arrived, shared_parts, shared_lses, shared_splits, shared_len,
    row, kv_head, split, num_parts, heads, dims, out_stride_row, out_stride_head,
    GROUP: tl.constexpr, GROUP_P2: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
    CASCADE: tl.constexpr, SHARED_SPLIT: tl.constexpr, TILE_PARTS: tl.constexpr,
):  # fmt: skip
    """Store what a program has found for its heads [ROWS]; the last of a row and KV head merges all parts."""
    if CASCADE:  # what the row shares with others has been read for all of them
        best, total, acc = fold_shared(
            best, total, acc, row, heads, heads < GROUP, dims, kv_head, split, shared_len, shared_parts, shared_lses,
            shared_splits, tl.num_programs(0), GROUP, DIM_P2, SHARED_SPLIT, 16 if heads.shape[0] == 1 else 1,
        )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # a row of context 0: zeros
    acc = acc / total[:, None]

    target = out + row * out_stride_row + kv_head.to(tl.int64) * GROUP * out_stride_head
    if num_parts <= 1:
        mask = (heads < GROUP)[:, None] & (dims < DIM)[None, :]
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


@triton.jit
def load_queries(
    query, sink_query, row, kv_head, split, heads, dims,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The queries of a KV head [ROWS, DIM_P2]; for the part of the sinks those that are turned for them."""
    head = kv_head.to(tl.int64) * GROUP + heads
    address = query + row * query_stride_row + head[:, None] * query_stride_head
    if SINKS > 0 and split == 0:
        address = sink_query + row * sink_query_stride_row + head[:, None] * sink_query_stride_head
    return tl.load(address + dims[None, :], mask=(heads < GROUP)[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def load_kv(
    k_store, v_store, k_scale, v_scale, block, kv_head, index, seen,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token,
    k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """K and V [TILE, DIM_P2] of tokens `index` in these blocks, and their scales [TILE]."""
    k, k_scales = load_tokens(
        k_store, k_scale, block, kv_head, index, seen, k_stride_block, k_stride_head, k_stride_token,
        k_scale_stride_block, k_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
    )  # fmt: skip
    v, v_scales = load_tokens(
        v_store, v_scale, block, kv_head, index, seen, v_stride_block, v_stride_head, v_stride_token,
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


@triton.jit
def decode_kernel(
    query, sink_query, out, k_store, v_store, block_tables, context_lens, parts, part_lses, arrived,
    shared_lens, shared_parts, shared_lses, shared_splits, scaling,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head, out_stride_row, out_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token, table_stride,
    k_scale, v_scale, k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, GROUP_P2: tl.constexpr,
    ROWS: tl.constexpr, TILE_PARTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    CASCADE: tl.constexpr, SHARED_SPLIT: tl.constexpr, PROGRAMS: tl.constexpr,
    SPLIT: tl.constexpr, LEAST: tl.constexpr, MAX_SPLITS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    QUANTISED: tl.constexpr, HALF: tl.constexpr, FAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """HALF: 8-bit codes are multiplied as float16. FAST: NVIDIA's instructions are there."""
    followed(OVERLAP)
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    _, begin, end, num_parts, shared_len = own_part(
        context_lens, shared_lens, row, split, WINDOW, SINKS, CASCADE, PROGRAMS, SPLIT, LEAST, MAX_SPLITS, TILE, 1
    )
    table = block_tables + row * table_stride
    lanes = tl.arange(0, TILE)
    index = begin + lanes
    block = load_blocks(table, index, index < end, BLOCK_SIZE)
    waited(OVERLAP)
    if split >= tl.maximum(num_parts, 1):
        return

    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_P2)
    q = load_queries(
        query, sink_query, row, kv_head, split, heads, dims, query_stride_row, query_stride_head,
        sink_query_stride_row, sink_query_stride_head, GROUP, DIM, SINKS,
    )  # fmt: skip
    if GROUP == 1:
        best = tl.full([TILE], LOWEST, tl.float32)  # one softmax a lane
        total = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, DIM_P2], tl.float32)
        q = q.to(tl.float32) * scaling
        # Loads run a tile ahead of the arithmetic, and the block table another: so a whole tile is always under way.
        k, v, k_scales, v_scales = load_kv(
            k_store, v_store, k_scale, v_scale, block, kv_head, index, index < end, k_stride_block, k_stride_head,
            k_stride_token, v_stride_block, v_stride_head, v_stride_token, k_scale_stride_block, k_scale_stride_head,
            v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
        )  # fmt: skip
        block = load_blocks(table, index + TILE, index + TILE < end, BLOCK_SIZE)
        for start in tl.range(begin, end, TILE, num_stages=1):
            index = start + TILE + lanes
            next_k, next_v, next_k_scales, next_v_scales = load_kv(
                k_store, v_store, k_scale, v_scale, block, kv_head, index, index < end, k_stride_block, k_stride_head,
                k_stride_token, v_stride_block, v_stride_head, v_stride_token, k_scale_stride_block,
                k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
            )  # fmt: skip
            block = load_blocks(table, index + TILE, index + TILE < end, BLOCK_SIZE)
            score = tl.sum(k.to(tl.float32) * q, 1) * k_scales  # [TILE]
            score = tl.where(start + lanes < end, score, float("-inf"))
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
            q = (q.to(tl.float32) / largest[:, None]).to(tl.float16)
            score_scale *= largest
        for _ in tl.range(begin, end, TILE, num_stages=STAGES):  # loads run ahead through shared memory
            next_block = load_blocks(table, index + TILE, index + TILE < end, BLOCK_SIZE)
            seen = index < end
            k, v, k_scales, v_scales = load_kv(
                k_store, v_store, k_scale, v_scale, block, kv_head, index, seen, k_stride_block, k_stride_head,
                k_stride_token, v_stride_block, v_stride_head, v_stride_token, k_scale_stride_block,
                k_scale_stride_head, v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
            )  # fmt: skip
            block = next_block
            index += TILE
            if QUANTISED:
                # Not pure, so that V is widened where it was loaded: turned for the product as bytes, it costs more.
                k, v = widen(k, HALF, FAST, True), widen(v, HALF, FAST, False)
            score = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee") * score_scale[:, None]
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
        row, kv_head, split, num_parts, heads, dims, out_stride_row, out_stride_head,
        GROUP, GROUP_P2, DIM, DIM_P2, CASCADE, SHARED_SPLIT, TILE_PARTS,
    )  # fmt: skip
