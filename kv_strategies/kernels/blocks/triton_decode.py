"""Split-KV decode (Flash-Decoding, FlashDecoding blog post 2023-10, over a block table as in PagedAttention).

One query a row leaves a GPU idle if a row is one program, so the tokens of a row are split and the parts merged:

    row b, KV head h      |-- part 0 --|-- part 1 --|-- ... --|    one program each, all query heads of the KV head
                            (out, lse)   (out, lse)             the last to arrive merges them

Long parts spare merging, short ones keep a GPU busy, and parts of equal length end together. So each row is cut into
equal parts, at least as long as all tokens of the batch divided by the number of programs that the chip holds at once;
the parts of all rows are laid end to end, and a program finds its own. In float32, where tokens are compared to the
bit, the row's length alone decides, so its results do not depend on its neighbours.

Two ways to compute a part, chosen by the number of query heads that share a KV head:

  one     (MHA) no tensor core helps. Each lane of the tile keeps a softmax of its own over every TILE-th token, and
          the lanes are merged once at the end: inside the loop no lane waits for another.
  several (GQA) they form the rows of a matrix product on tensor cores, padded to the 16 rows these take.

8-bit codes take the same ways, the second with products of float16. As they leave half the time for it, what is most
common has kernels of its own: int8 and the first way `triton_decode_codes.py`, the second without a window
`triton_decode_groups.py`.

Reading K and V once is the floor: bytes = 2 * context * Hkv * D * itemsize a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore, Plan
from ..triton_device import num_multiprocessors
from ..triton_overlap import followed, overlapping, waited
from .triton_cascade import SharedParts, fold_shared
from .triton_common import (
    LOG2_E,
    LOWEST,
    V_UNIT,
    VARYING,
    load_blocks,
    load_tokens,
    merge_parts,
    workspace,
)

#: Parts of one row and KV head at most, where its length alone decides.
MAX_PARTS = 64
#: Fewer pairs of a row and a KV head than these are tuned for by themselves.
FEW_PAIRS = 64


@dataclass(frozen=True)
class Tuning:
    """Sizes to tune; results agree to rounding whatever they are. `bench/kernel_bandwidth.py` sweeps them."""

    tile: int  # tokens an iteration
    num_warps: int
    num_stages: int = 1
    programs: int = 4  # a multiprocessor, at once
    registers: int = 255  # a thread, at most: fewer let more programs in at once
    least: int = 64  # tokens of a part, at least
    part: int = 0  # tokens of a part where the row's length alone decides; 0 where the batch does


def tuning(group: int, dtype: torch.dtype, num_pairs: int, in_registers: bool = False) -> Tuning:
    """The sizes for a number of query heads a KV head and the dtype of K and V as stored, swept on an H100.

    Float32 is for float32 queries on any store: they take the most registers, and their results are compared.

    Args:
        num_pairs: rows times KV heads. Few have many parts each, which one warp is long to merge; and few rows follow
            kernels that need little shared memory: a change of it takes as long as it may spare.
        in_registers: whether `triton_decode_groups.py` can do it.
    """
    if dtype == torch.float32:
        return Tuning(tile=32, num_warps=4, part=256)
    if in_registers and num_pairs >= FEW_PAIRS:
        return Tuning(tile=16, num_warps=1, programs=16, registers=128, least=128)
    if group > 1 and num_pairs < FEW_PAIRS:
        return Tuning(tile=64, num_warps=2, num_stages=2, programs=4)
    if group > 1:
        return Tuning(tile=64, num_warps=4, num_stages=5, programs=2)
    if dtype == torch.int8:
        return Tuning(tile=32, num_warps=2, programs=8, registers=128)
    return Tuning(tile=32, num_warps=4, programs=4, registers=128)


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
    from .triton_decode_codes import decode_codes  # these take parts of this module
    from .triton_decode_groups import decode_groups, suits

    _, num_heads, dim = query.shape
    num_kv_heads = layer.k.shape[1]
    group, rows = num_heads // num_kv_heads, plan.num_decodes
    sinks = sinks if window or sink_query is not None else 0  # else all is visible anyhow
    num_pairs = rows * num_kv_heads
    is_plain = not window and not sinks and (suits(query, layer, tuned.tile) if tuned else suits(query, layer))
    dtype = query.dtype if query.dtype == torch.float32 else layer.k.dtype
    tuned = tuned or tuning(group, dtype, num_pairs, is_plain)
    longest = max((plan.row_lens if shared is None else plan.private_lens)[:rows])
    longest = min(longest, window + layer.block_size if window else longest)  # a window need not begin with a block
    sink_places = tuned.tile * triton.cdiv(sinks, tuned.tile)
    # The kernel knows each row's length, from which its parts follow; this bounds how many there may be.
    longest = max(longest + sink_places, 1)
    if tuned.part:
        num_programs = num_pairs * min(triton.cdiv(longest, tuned.part), MAX_PARTS)
        wanted = 0
    else:
        wanted = tuned.programs * num_multiprocessors(query.device)
        num_programs = min(wanted + num_pairs, num_pairs * triton.cdiv(longest, tuned.least))
    dim_p2, group_p2 = max(triton.next_power_of_2(dim), 16), triton.next_power_of_2(group)
    parts, part_lses, arrived = workspace(plan, "decode", num_programs, 1, group, dim_p2, counters=num_pairs)
    quantised = layer.k_scale is not None
    shared_lens = plan.context_lens if shared is None else plan.shared_lens  # not read unless shared
    shared_parts, shared_lses, shared_split = shared or (parts, part_lses, 1)
    sink_query = query if sink_query is None else sink_query
    arguments = [
        query, sink_query, out, layer.k, layer.v, plan.block_tables, plan.context_lens, parts, part_lses, arrived,
        shared_lens, shared_parts, shared_lses, shared_parts.shape[2], scaling * LOG2_E, rows,
        *query.stride()[:2], *sink_query.stride()[:2], *out.stride()[:2],
        *layer.k.stride()[:3], *layer.v.stride()[:3], plan.block_tables.stride(0),
    ]  # fmt: skip
    sizes = {
        "BLOCK_SIZE": layer.block_size, "HEADS": num_kv_heads, "DIM": dim, "DIM_P2": dim_p2,
        # one row, or as many as there are in few sizes, each of which is another kernel
        "ROWS_P2": 1 if rows == 1 else max(triton.next_power_of_2(rows), 32),
        "TILE_PARTS": max(16 * tuned.num_warps // max(group_p2, 4), 1),
        "WINDOW": window, "SINKS": sinks, "SINK_PLACES": sink_places,
        "CASCADE": shared is not None, "SHARED_SPLIT": shared_split,
        "WANTED": wanted, "PART": tuned.part, "MAX_PARTS": MAX_PARTS, "LEAST": tuned.least, "TILE": tuned.tile,
        "num_warps": tuned.num_warps,
    }  # fmt: skip
    if quantised:
        arguments += [layer.k_scale, layer.v_scale, *layer.k_scale.stride()[:2], *layer.v_scale.stride()[:2]]
    else:  # not read
        arguments += [layer.k, layer.v, 0, 0, 0, 0]
    grid, options = (num_programs,), overlapping(query.device)
    if query.is_cuda:
        options = options | {"maxnreg": tuned.registers}
    if is_plain and tuned.num_warps == 1:
        decode_groups(grid, arguments, sizes, query, group, options)
    elif layer.k.dtype == torch.int8 and group == 1:
        decode_codes(grid, arguments, sizes, query, layer, plan, tuned, longest, options)
    else:
        decode_kernel[grid](
            *arguments, GROUP=group, GROUP_P2=group_p2,
            QUANTISED=quantised, HALF=quantised and query.element_size() == 2, FAST=query.is_cuda,
            ROWS=1 if group == 1 else max(group_p2, 16), STAGES=tuned.num_stages, **sizes, **options,
        )  # fmt: skip


# --- which tokens are whose

# The tokens that a row reads have places, 0, 1, ...: sink tokens, padded to whole tiles, then those from `begin` on.


@triton.jit
def row_places(
    context_len, shared_len, WINDOW: tl.constexpr, SINKS: tl.constexpr, SINK_PLACES: tl.constexpr,
    CASCADE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Of rows: the first token seen (but for sinks), the first one read, a multiple of RUN, and how many places."""
    first = context_len * 0 + SINKS
    if WINDOW > 0:
        first = tl.maximum(first, context_len - WINDOW)
    if CASCADE:
        first = shared_len
    begin = first // RUN * RUN
    return first, begin, tl.where(context_len > first, context_len - begin, 0) + SINK_PLACES


@triton.jit
def target_size(total, HEADS: tl.constexpr, WANTED: tl.constexpr, LEAST: tl.constexpr):
    """The places that a part should have at least: those of all rows and KV heads over the programs wanted, if any."""
    target = tl.maximum(total, LEAST)
    if WANTED > 0:
        target = tl.maximum(tl.cdiv(total * HEADS, WANTED), LEAST)
    return target


@triton.jit
def part_size(
    num_places, target, PART: tl.constexpr, MAX_PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of rows: the places of a part, whole tiles, and the number of parts."""
    if PART > 0:
        size = tl.maximum(PART, TILE * tl.cdiv(num_places, TILE * MAX_PARTS))
    else:
        size = TILE * tl.cdiv(num_places, TILE * tl.maximum(num_places // target, 1))
        size = tl.maximum(size, TILE)
    return size, tl.maximum(tl.cdiv(num_places, size), 1)


@triton.jit
def own_part(
    context_lens, shared_lens, num_rows,
    HEADS: tl.constexpr, ROWS_P2: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, SINK_PLACES: tl.constexpr,
    CASCADE: tl.constexpr, WANTED: tl.constexpr, PART: tl.constexpr, MAX_PARTS: tl.constexpr, LEAST: tl.constexpr,
    TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """What a program does: of row and KV head the part `part` of `num_parts`, the places place:end, from token `begin`
    on; whether there is anything. And the row's lengths."""
    at, row, total = tl.program_id(0), 0, 0
    if ROWS_P2 > 1:
        rows = tl.arange(0, ROWS_P2)
        listed = rows < num_rows
        lens = tl.load(context_lens + rows, mask=listed, other=0)
        shared = lens
        if CASCADE:
            shared = tl.load(shared_lens + rows, mask=listed, other=0)
        _, _, places = row_places(lens, shared, WINDOW, SINKS, SINK_PLACES, CASCADE, RUN)
        total = tl.sum(tl.where(listed, places, 0), 0)
        _, counts = part_size(places, target_size(total, HEADS, WANTED, LEAST), PART, MAX_PARTS, TILE)
        counts = tl.where(listed, counts * HEADS, 0)
        row = tl.minimum(tl.sum((tl.cumsum(counts, 0) <= at).to(tl.int32), 0), num_rows - 1)
        at -= tl.sum(tl.where(rows < row, counts, 0), 0)
    context_len = tl.load(context_lens + row)
    shared_len = context_len
    if CASCADE:
        shared_len = tl.load(shared_lens + row)
    first, begin, num_places = row_places(context_len, shared_len, WINDOW, SINKS, SINK_PLACES, CASCADE, RUN)
    if ROWS_P2 == 1:
        total = num_places
    target = target_size(total, HEADS, WANTED, LEAST)
    size, num_parts = part_size(num_places, target, PART, MAX_PARTS, TILE)
    # Heads first: programs that begin together read what lies together in a block.
    part, kv_head = at // HEADS, at % HEADS
    is_there = part < num_parts  # there may be more programs than parts
    place = part * size
    end = tl.where(is_there, tl.minimum(num_places, place + size), 0)
    return tl.cast(row, tl.int64), kv_head, part, num_parts, place, end, first, begin, context_len, shared_len, is_there


@triton.jit
def token_of(place, end, first, begin, context_len, SINKS: tl.constexpr, SINK_PLACES: tl.constexpr, RUN: tl.constexpr):
    """The tokens at these places of a row, and whether they are seen: by its query, and before place `end`."""
    token = place + (begin - SINK_PLACES)
    seen = place < end
    if RUN > 1:
        seen = seen & (token >= first)
    if SINKS > 0:
        is_sink = place < SINK_PLACES
        token = tl.where(is_sink, place, token)
        seen = tl.where(is_sink, (place < tl.minimum(SINKS, context_len)) & (place < end), seen)
    return token, seen


@triton.jit
def finish_part(
    best, total, acc, out, parts, part_lses, arrived, shared_parts, shared_lses, shared_splits, shared_len,
    row, kv_head, part, num_parts, heads, dims, out_stride_row, out_stride_head,
    GROUP: tl.constexpr, GROUP_P2: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
    CASCADE: tl.constexpr, SHARED_SPLIT: tl.constexpr, TILE_PARTS: tl.constexpr,
):  # fmt: skip
    """Store what a program has found for its heads [ROWS]; the last of a row and KV head merges all parts."""
    if CASCADE:  # what the row shares with others has been read for all of them
        best, total, acc = fold_shared(
            best, total, acc, row, heads, heads < GROUP, dims, kv_head, part, shared_len, shared_parts, shared_lses,
            shared_splits, HEADS, GROUP, DIM_P2, SHARED_SPLIT, 16 if heads.shape[0] == 1 else 1,
        )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # a row of context 0: zeros
    acc = acc / total[:, None]

    target = out + row * out_stride_row + kv_head.to(tl.int64) * GROUP * out_stride_head
    if num_parts <= 1:
        mask = (heads < GROUP)[:, None] & (dims < DIM)[None, :]
        tl.store(target + heads[:, None] * out_stride_head + dims[None, :], acc.to(out.dtype.element_ty), mask=mask)
    else:
        first_program = (tl.program_id(0) - part * HEADS).to(tl.int64)
        parts += first_program * GROUP * DIM_P2  # [num_parts, HEADS, GROUP, DIM_P2], this head of it
        part_lses += first_program * GROUP
        at = part * (HEADS * GROUP) + heads
        tl.store(part_lses + at, best + tl.log2(total), mask=heads < GROUP)
        tl.store(parts + at[:, None] * DIM_P2 + dims[None, :], acc, mask=(heads < GROUP)[:, None])
        tl.debug_barrier()  # all threads have stored before one of them says so
        pair = row * HEADS + kv_head
        if tl.atomic_add(arrived + pair, 1) == num_parts - 1:
            tl.store(arrived + pair, 0)
            own = tl.arange(0, GROUP_P2)  # the query heads without the padding that tensor cores want
            merged = merge_parts(parts, part_lses, num_parts, own, own < GROUP, dims, HEADS * GROUP, DIM_P2, TILE_PARTS)
            tl.store(
                target + own[:, None] * out_stride_head + dims[None, :], merged.to(out.dtype.element_ty),
                mask=(own < GROUP)[:, None] & (dims < DIM)[None, :],
            )  # fmt: skip


# --- what is read


@triton.jit
def load_queries(
    query, row, kv_head, heads, dims, stride_row, stride_head, GROUP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The queries of a KV head [ROWS, DIM_P2]."""
    head = kv_head.to(tl.int64) * GROUP + heads
    address = query + row * stride_row + head[:, None] * stride_head
    return tl.load(address + dims[None, :], mask=(heads < GROUP)[:, None] & (dims < DIM)[None, :], other=0.0)


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
    query, sink_query, out, k_store, v_store, block_tables, context_lens, parts, part_lses, arrived,
    shared_lens, shared_parts, shared_lses, shared_splits, scaling, num_rows,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head, out_stride_row, out_stride_head,
    k_stride_block, k_stride_head, k_stride_token, v_stride_block, v_stride_head, v_stride_token, table_stride,
    k_scale, v_scale, k_scale_stride_block, k_scale_stride_head, v_scale_stride_block, v_scale_stride_head,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
    GROUP_P2: tl.constexpr, ROWS: tl.constexpr, ROWS_P2: tl.constexpr, TILE_PARTS: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, SINK_PLACES: tl.constexpr, CASCADE: tl.constexpr, SHARED_SPLIT: tl.constexpr,
    WANTED: tl.constexpr, PART: tl.constexpr, MAX_PARTS: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, QUANTISED: tl.constexpr, HALF: tl.constexpr, FAST: tl.constexpr, OVERLAP: tl.constexpr,
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
        GROUP, GROUP_P2, HEADS, DIM, DIM_P2, CASCADE, SHARED_SPLIT, TILE_PARTS,
    )  # fmt: skip
