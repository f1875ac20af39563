"""Top-N attention of decode rows, V gathered straight from pinned host memory. See `topn.reference`.

    scores_kernel   (KV head, split, row)    reads K once: a score a token and head, and the softmax sum of each split
    choose_kernel   (query head, row)        finds the heaviest tokens, fetches their V, sums

A GPU reaches pinned host memory by its own address. A fetch takes a microsecond or two, so what counts is how many are
under way: all chosen rows of a head are asked for at once, by all heads side by side.

The N-th largest score is found by bisection on the bits of the scores, which a float orders like an integer once the
sign is folded. A pass counts the scores above a threshold; they lie in the processor's own cache. `mass` is the same
search with the sum of weights in place of the count. Nothing is sorted, and nothing depends on the host.

Visible tokens are numbered without gaps: the sinks, then the window.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import LayerStore, Plan
from .triton_common import LOG2_E, LOWEST, load_tile

_SPLIT = 256  # tokens of a program that computes scores
_TILE = 64  # of which so many an iteration


def topn_attention(
    query: Tensor,
    layer: LayerStore,
    plan: Plan,
    tally: Tensor,
    *,
    scaling: float,
    top_n: int = 0,
    mass: float = 0.0,
    renormalise: bool = False,
    window: int = 0,
    sinks: int = 0,
    sink_query: Tensor | None = None,
    chunk: int = 4096,
    tile: int = 128,
) -> Tensor:
    """See `topn.topn_attention`. Shapes and host bounds alone decide what is launched."""
    rows, num_heads, dim = query.shape
    num_kv_heads = layer.k.shape[1]
    group = num_heads // num_kv_heads
    sinks = sinks if window or sink_query is not None else 0  # else all is visible anyhow
    longest = max(plan.row_lens[:rows])
    width = max(min(longest, window + sinks) if window else longest, 1)
    num_splits = triton.cdiv(width, _SPLIT)
    limit = min(top_n, width) if top_n else width
    dim_p2, group_p2 = triton.next_power_of_2(dim), triton.next_power_of_2(group)

    def workspace() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = {"device": query.device, "dtype": torch.float32}
        return (
            torch.empty(rows, num_heads, width, **sizes),  # scores
            torch.empty(rows, num_heads, num_splits, 3, **sizes),  # of a split: largest, smallest, sum of weights
            torch.empty(rows, num_heads, limit, **{**sizes, "dtype": torch.int32}),  # chosen tokens
            torch.empty(rows, num_heads, limit, **sizes),  # and their weights
        )

    scores, parts, chosen, weights = plan.once(("top n", rows, num_heads, width, limit), workspace)
    out = query.new_empty(query.shape)
    quantised = layer.k_scale is not None
    k_scale, v_scale = (layer.k_scale, layer.v_scale) if quantised else (layer.k, layer.v)  # not read unless quantised
    has_sink_query = sink_query is not None
    sink_query = query if sink_query is None else sink_query
    scores_kernel[(num_kv_heads, num_splits, rows)](
        query, sink_query, layer.k, k_scale, plan.block_tables, plan.context_lens, scores, parts, scaling * LOG2_E,
        width, *query.stride()[:2], *sink_query.stride()[:2], *layer.k.stride()[:3], *k_scale.stride()[:2],
        plan.block_tables.stride(0),
        BLOCK_SIZE=layer.block_size, GROUP=group, DIM=dim, DIM_P2=dim_p2, QUANTISED=quantised,
        ROWS=1 if group == 1 else max(group_p2, 16), WINDOW=window, SINKS=sinks, SINK_QUERY=has_sink_query,
        SPLIT=_SPLIT, TILE=_TILE, num_warps=4,
    )  # fmt: skip
    chunk = min(chunk, triton.next_power_of_2(width))
    choose_kernel[(num_heads, rows)](
        out, layer.v, v_scale, plan.block_tables, plan.context_lens, scores, parts, chosen, weights, tally,
        width, num_splits, limit, mass, *out.stride()[:2], *layer.v.stride()[:3], *v_scale.stride()[:2],
        plan.block_tables.stride(0),
        BLOCK_SIZE=layer.block_size, GROUP=group, DIM=dim, DIM_P2=dim_p2, QUANTISED=quantised,
        WINDOW=window, SINKS=sinks, MASS=mass > 0, RENORMALISE=renormalise,
        SPLIT=_SPLIT, SPLITS_P2=triton.next_power_of_2(num_splits), CHUNK=chunk,
        TILE=min(tile, triton.next_power_of_2(limit)), num_warps=max(1, min(16, chunk // 256)),
    )  # fmt: skip
    return out


@triton.jit
def visible_tokens(context_len, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """How many sinks and how many tokens in all a row sees, and the index of the first that is no sink."""
    num_sinks = tl.minimum(SINKS, context_len)
    first = num_sinks
    if WINDOW > 0:
        first = tl.maximum(first, context_len - WINDOW)
    return num_sinks, num_sinks + context_len - first, first


@triton.jit
def scores_kernel(
    query, sink_query, k_store, k_scale, block_tables, context_lens, scores, parts, scaling, width,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head,
    k_stride_block, k_stride_head, k_stride_token, k_scale_stride_block, k_scale_stride_head, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
    ROWS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, SINK_QUERY: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_sinks, num_visible, first = visible_tokens(tl.load(context_lens + row), WINDOW, SINKS)
    begin = split * SPLIT
    if begin >= num_visible:
        return
    end = tl.minimum(begin + SPLIT, num_visible)

    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_P2)
    own = heads < GROUP
    mask = own[:, None] & (dims < DIM)[None, :]
    head = kv_head.to(tl.int64) * GROUP + heads
    address = query + row * query_stride_row + head[:, None] * query_stride_head
    q = tl.load(address + dims[None, :], mask=mask, other=0.0)
    q_sink = q
    if SINK_QUERY:
        address = sink_query + row * sink_query_stride_row + head[:, None] * sink_query_stride_head
        q_sink = tl.load(address + dims[None, :], mask=mask, other=0.0)
    table = block_tables + row * table_stride
    target = scores + (row * tl.num_programs(0) * GROUP + head)[:, None] * width

    best = tl.full([ROWS], LOWEST, tl.float32)
    least = tl.full([ROWS], -LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        seen = place < end
        index = tl.where(place < num_sinks, place, first + place - num_sinks)
        k, k_scales = load_tile(
            k_store, k_scale, table, kv_head, index, seen, k_stride_block, k_stride_head, k_stride_token,
            k_scale_stride_block, k_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
        )  # fmt: skip
        score = products(q, k, GROUP)  # [ROWS, TILE]
        if SINK_QUERY:  # noqa: SIM102 (the first is decided when compiled)
            if start < num_sinks:
                score = tl.where((place < num_sinks)[None, :], products(q_sink, k, GROUP), score)
        score = score * (k_scales * scaling)[None, :]
        tl.store(target + place[None, :], score, mask=own[:, None] & seen[None, :])
        new_best = tl.maximum(best, tl.max(tl.where(seen[None, :], score, LOWEST), 1))
        weight = tl.where(seen[None, :], tl.exp2(score - new_best[:, None]), 0.0)
        total = total * tl.exp2(best - new_best) + tl.sum(weight, 1)
        least = tl.minimum(least, tl.min(tl.where(seen[None, :], score, -LOWEST), 1))
        best = new_best
    part = parts + ((row * tl.num_programs(0) * GROUP + head) * tl.num_programs(1) + split) * 3
    tl.store(part, best, mask=own)
    tl.store(part + 1, least, mask=own)
    tl.store(part + 2, total, mask=own)


@triton.jit
def products(q, k, GROUP: tl.constexpr):
    """[ROWS, D] x [TILE, D] -> [ROWS, TILE] float32; tensor cores where several heads share K."""
    if GROUP == 1:
        return tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
    return tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")


@triton.jit
def ordered(score):
    """int32 that sort as the float32 scores do."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def above(scores, num_visible, threshold, log_total, MASS: tl.constexpr, CHUNK: tl.constexpr):
    """How many scores are at or above the threshold (as an ordered int), or what they weigh."""
    total = tl.zeros([CHUNK], tl.float32 if MASS else tl.int32)
    for start in range(0, num_visible, CHUNK):
        place = start + tl.arange(0, CHUNK)
        score = tl.load(scores + place, mask=place < num_visible, other=float("-inf"))
        hit = (ordered(score).to(tl.int64) >= threshold) & (place < num_visible)
        if MASS:
            total += tl.where(hit, tl.exp2(score - log_total), 0.0)
        else:
            total += hit.to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def choose_kernel(
    out, v_store, v_scale, block_tables, context_lens, scores, parts, chosen, weights, tally,
    width, num_splits, limit, mass, out_stride_row, out_stride_head, v_stride_block, v_stride_head, v_stride_token,
    v_scale_stride_block, v_scale_stride_head, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, MASS: tl.constexpr, RENORMALISE: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS_P2: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_sinks, num_visible, first = visible_tokens(tl.load(context_lens + row), WINDOW, SINKS)
    dims = tl.arange(0, DIM_P2)
    target = out + row * out_stride_row + head * out_stride_head + dims
    if num_visible == 0:
        tl.store(target, tl.zeros([DIM_P2], tl.float32).to(out.dtype.element_ty), mask=dims < DIM)
        return
    pair = row * tl.num_programs(0) + head
    scores += pair * width
    chosen += pair * limit
    weights += pair * limit
    limit = tl.minimum(limit, num_visible)

    # The softmax over everything visible: its log-sum-exp (base 2), and the range of the scores.
    split = tl.arange(0, SPLITS_P2)
    written = split * SPLIT < num_visible
    part = parts + (pair * num_splits + split) * 3
    part_best = tl.load(part, mask=written, other=LOWEST)
    best = tl.max(part_best, 0)
    least = tl.min(tl.load(part + 1, mask=written, other=-LOWEST), 0)
    log_total = best + tl.log2(tl.sum(tl.load(part + 2, mask=written, other=0.0) * tl.exp2(part_best - best), 0))

    # The largest threshold that leaves enough: high never does, low always.
    low = ordered(least).to(tl.int64)
    high = ordered(best).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached = above(scores, num_visible, middle, log_total, MASS, CHUNK)
        if MASS:
            enough = reached >= mass
        else:
            enough = reached >= limit
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        if not MASS:
            high = tl.where(reached == limit, low + 1, high)

    # All above it, and of those equal to it as many as are missing.
    reached = above(scores, num_visible, low + 1, log_total, MASS, CHUNK)
    if MASS:
        equal = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.int32).to(tl.float32, bitcast=True)
        num_equal = tl.maximum(tl.ceil((mass - reached) / tl.exp2(equal - log_total)), 1.0)
        num_equal = tl.minimum(num_equal, num_visible.to(tl.float32)).to(tl.int32)
    else:
        num_equal = limit - reached
    num_chosen = tl.zeros([], tl.int32)
    equal_before = tl.zeros([], tl.int32)
    for start in range(0, num_visible, CHUNK):
        place = start + tl.arange(0, CHUNK)
        seen = place < num_visible
        score = tl.load(scores + place, mask=seen, other=float("-inf"))
        rank = ordered(score).to(tl.int64)
        is_equal = ((rank == low) & seen).to(tl.int32)
        nth_equal = equal_before + tl.cumsum(is_equal, 0)
        take = ((rank > low) & seen) | ((is_equal > 0) & (nth_equal <= num_equal))
        at = num_chosen + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(chosen + at, tl.where(place < num_sinks, place, first + place - num_sinks), mask=take)
        tl.store(weights + at, tl.exp2(score - log_total), mask=take)
        num_chosen += tl.sum(take.to(tl.int32), 0)
        equal_before += tl.sum(is_equal, 0)
    tl.debug_barrier()  # all threads have stored before any of them reads

    table = block_tables + row * table_stride
    kv_head = head // GROUP
    acc = tl.zeros([TILE, DIM_P2], tl.float32)
    kept = tl.zeros([TILE], tl.float32)
    for start in range(0, num_chosen, TILE):
        at = start + tl.arange(0, TILE)
        seen = at < num_chosen
        index = tl.load(chosen + at, mask=seen, other=0, cache_modifier=".cg")
        weight = tl.load(weights + at, mask=seen, other=0.0, cache_modifier=".cg")
        v, v_scales = load_tile(
            v_store, v_scale, table, kv_head, index, seen, v_stride_block, v_stride_head, v_stride_token,
            v_scale_stride_block, v_scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
        )  # fmt: skip
        acc += v.to(tl.float32) * (weight * v_scales)[:, None]
        kept += weight
    total = tl.sum(kept, 0)
    result = tl.sum(acc, 0)
    if RENORMALISE:
        result = result / total
    tl.store(target, result.to(out.dtype.element_ty), mask=dims < DIM)

    dropped = tl.maximum(1.0 - total, 0.0).to(tl.float64)
    tl.atomic_add(tally, 1.0)
    tl.atomic_add(tally + 1, num_chosen.to(tl.float64))
    tl.atomic_add(tally + 2, dropped)
    tl.atomic_max(tally + 3, dropped)
