"""Top-N attention of decode rows, V gathered straight from pinned host memory. See `topn.reference`.

    scores_kernel   (KV head, split, row)    reads K once: a score a token and head; of every SPAN scores the largest
    choose_kernel   (query head, row)        finds the heaviest tokens, fetches their V, sums

A GPU reaches pinned host memory by its own address. A fetch takes a microsecond or two, so what counts is how many are
under way: all chosen rows of a head are asked for at once, by all heads side by side.

A head has one program to choose, so it must look at few scores. The N heaviest tokens lie in the N spans that are
heaviest by their heaviest token: N tokens, one of each of these spans, go before any token of another.

    16384 scores -> 1024 spans of 16 -> the heaviest 128 -> their 2048 scores -> the heaviest 128

Either choice is a bisection on the bits of the scores, which a float orders like an integer once the sign is folded. A
pass counts the scores at or above a threshold; as many as CHUNK stay in registers. `mass` is the same search with the
sum of weights in place of the count, over all scores. Nothing is sorted, and nothing depends on the host.

Visible tokens are numbered without gaps, in places: the sinks, then the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore, Plan
from .triton_common import LOG2_E, LOWEST, load_tile
from .turned import turned


@dataclass(frozen=True)
class Tuning:
    """Sizes to tune; the tokens chosen are the same whatever they are. `bench/probes/offload.py` sweeps them."""

    split: int = 512  # tokens of a program that computes scores
    tile: int = 64  # of which so many an iteration
    num_warps: int = 4
    num_stages: int = 1
    span: int = 16  # tokens that the first choice takes or leaves as one
    chunk: int = 16384  # scores that a choosing program holds in registers, at most
    held: int = 16  # of which so many a thread
    rows: int = 128  # rows of V asked for at once


def tuning(group: int) -> Tuning:
    """The sizes for a shape: `group` query heads a KV head."""
    return Tuning() if group == 1 else Tuning(split=256, num_stages=3)


@turned
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
    tuned: Tuning | None = None,
) -> Tensor:
    """See `topn.reference`. Shapes and host bounds alone decide what is launched."""
    rows, num_heads, dim = query.shape
    num_kv_heads = layer.k.shape[1]
    group = num_heads // num_kv_heads
    tuned = tuned or tuning(group)
    sinks = sinks if window or sink_query is not None else 0  # else all is visible anyhow
    longest = max(plan.row_lens[:rows])
    width = max(min(longest, window + sinks) if window else longest, 1)
    span = max(tuned.span, triton.next_power_of_2(triton.cdiv(width, tuned.chunk)))
    num_spans = triton.cdiv(width, span)  # at most a chunk
    limit = min(top_n, width) if top_n else width
    by_span = limit < num_spans  # fewer are wanted than there are spans
    dim_p2, group_p2 = max(triton.next_power_of_2(dim), 16), triton.next_power_of_2(group)

    def workspace() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        floats, ints = ({"device": query.device, "dtype": dtype} for dtype in (torch.float32, torch.int32))
        return (
            torch.empty(rows, num_heads, width, **floats),  # scores
            torch.empty(rows, num_heads, 2, num_spans, **floats),  # of a span: the largest, and the sum of weights
            torch.empty(rows, num_heads, limit if by_span else 0, **ints),  # chosen spans
            torch.empty(rows, num_heads, limit, **ints),  # chosen tokens, by place
        )

    scores, spans, chosen_spans, chosen = plan.once(("top n", rows, num_heads, width, num_spans, limit), workspace)
    out = query.new_empty(query.shape)
    quantised = layer.k_scale is not None
    k_scale, v_scale = (layer.k_scale, layer.v_scale) if quantised else (layer.k, layer.v)  # not read unless quantised
    has_sink_query = sink_query is not None
    sink_query = query if sink_query is None else sink_query
    scores_kernel[(num_kv_heads, triton.cdiv(width, tuned.split), rows)](
        query, sink_query, layer.k, k_scale, plan.block_tables, plan.context_lens, scores, spans, scaling * LOG2_E,
        width, num_spans, *query.stride()[:2], *sink_query.stride()[:2], *layer.k.stride()[:3], *k_scale.stride()[:2],
        plan.block_tables.stride(0),
        BLOCK_SIZE=layer.block_size, GROUP=group, DIM=dim, DIM_P2=dim_p2, QUANTISED=quantised,
        GROUP_P2=group_p2, ROWS=1 if group == 1 else max(group_p2, 16), WINDOW=window, SINKS=sinks,
        SINK_QUERY=has_sink_query, SPLIT=tuned.split, TILE=tuned.tile, STAGES=tuned.num_stages, SPAN=span,
        num_warps=tuned.num_warps,
    )  # fmt: skip
    spans_p2 = triton.next_power_of_2(num_spans)
    num_listed = limit * span if by_span else width  # scores to choose from, at most
    chunk = min(tuned.chunk, triton.next_power_of_2(num_listed))
    tile = min(tuned.rows, triton.next_power_of_2(limit))
    choose_kernel[(num_heads, rows)](
        out, layer.v, v_scale, plan.block_tables, plan.context_lens, scores, spans, chosen_spans, chosen, tally,
        width, num_spans, limit, mass, *out.stride()[:2], *layer.v.stride()[:3], *v_scale.stride()[:2],
        plan.block_tables.stride(0),
        BLOCK_SIZE=layer.block_size, GROUP=group, DIM=dim, DIM_P2=dim_p2, QUANTISED=quantised,
        WINDOW=window, SINKS=sinks, MASS=mass > 0, RENORMALISE=renormalise, BY_SPAN=by_span,
        SPAN=span, SPANS_P2=spans_p2, CHUNK=chunk, MORE=num_listed > chunk, TILE=tile,
        num_warps=max(4, min(16, max(chunk, spans_p2, tile * dim_p2 // 4) // (32 * tuned.held))),
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
    query, sink_query, k_store, k_scale, block_tables, context_lens, scores, spans, scaling, width, num_spans,
    query_stride_row, query_stride_head, sink_query_stride_row, sink_query_stride_head,
    k_stride_block, k_stride_head, k_stride_token, k_scale_stride_block, k_scale_stride_head, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
    GROUP_P2: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, SINK_QUERY: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_sinks, num_visible, first = visible_tokens(tl.load(context_lens + row), WINDOW, SINKS)
    begin = split * SPLIT
    if begin >= num_visible:
        return
    end = tl.minimum(begin + SPLIT, num_visible)

    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_P2)
    mask = (heads < GROUP)[:, None] & (dims < DIM)[None, :]
    kv_first = kv_head.to(tl.int64) * GROUP  # the first query head of this KV head
    address = query + row * query_stride_row + (kv_first + heads)[:, None] * query_stride_head
    q = tl.load(address + dims[None, :], mask=mask, other=0.0)
    q_sink = q
    if SINK_QUERY:
        address = sink_query + row * sink_query_stride_row + (kv_first + heads)[:, None] * sink_query_stride_head
        q_sink = tl.load(address + dims[None, :], mask=mask, other=0.0)
    table = block_tables + row * table_stride
    pair = row * tl.num_programs(0) * GROUP + kv_first  # of row and query head
    scores += pair * width

    # Nothing but products in the loop: no token waits for another.
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
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
        target = scores + heads[:, None].to(tl.int64) * width + place[None, :]
        tl.store(target, score, mask=(heads < GROUP)[:, None] & seen[None, :])

    tl.debug_barrier()  # all threads have stored before any of them reads
    own = tl.arange(0, GROUP_P2)  # the query heads without the padding that tensor cores want
    span = begin // SPAN + tl.arange(0, SPLIT // SPAN)
    place = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    address = scores + own[:, None, None].to(tl.int64) * width + place[None, :, :]
    mask = (own < GROUP)[:, None, None] & (place < end)[None, :, :]
    score = tl.load(address, mask=mask, other=float("-inf"), cache_modifier=".cg")
    largest = tl.max(score, 2)  # [GROUP_P2, SPLIT // SPAN]
    total = tl.sum(tl.exp2(score - tl.maximum(largest, LOWEST)[:, :, None]), 2)
    address = spans + (pair + own)[:, None] * 2 * num_spans + span[None, :]
    mask = (own < GROUP)[:, None] & (span * SPAN < end)[None, :]
    tl.store(address, largest, mask=mask)
    tl.store(address + num_spans, total, mask=mask)


@triton.jit
def products(q, k, GROUP: tl.constexpr):
    """[ROWS, D] x [TILE, D] -> [ROWS, TILE] float32; tensor cores where several heads share K."""
    if GROUP == 1:
        return tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
    return tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")


@triton.jit
def choose_kernel(
    out, v_store, v_scale, block_tables, context_lens, scores, spans, chosen_spans, chosen, tally,
    width, num_spans, limit, mass, out_stride_row, out_stride_head, v_stride_block, v_stride_head, v_stride_token,
    v_scale_stride_block, v_scale_stride_head, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, MASS: tl.constexpr, RENORMALISE: tl.constexpr, BY_SPAN: tl.constexpr,
    SPAN: tl.constexpr, SPANS_P2: tl.constexpr, CHUNK: tl.constexpr, MORE: tl.constexpr,
    TILE: tl.constexpr,
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
    spans += pair * 2 * num_spans
    chosen += pair * limit

    # The softmax over everything visible: its log-sum-exp (base 2).
    span = tl.arange(0, SPANS_P2)
    written = span * SPAN < num_visible
    largest = tl.load(spans + span, mask=written, other=float("-inf"))
    totals = tl.load(spans + num_spans + span, mask=written, other=0.0)
    best = tl.maximum(tl.max(largest, 0), LOWEST)
    log_total = best + tl.log2(tl.sum(totals * tl.exp2(tl.maximum(largest, LOWEST) - best), 0))

    low = ordered(tl.full([], float("-inf"), tl.float32))
    high = ordered(best) + 1
    num_listed = num_visible
    if BY_SPAN:
        chosen_spans += pair * limit
        least = ordered(tl.min(tl.where(written, largest, best), 0))
        num_written = tl.cdiv(num_visible, SPAN)
        num_listed, bound = select(
            chosen_spans, spans, spans, num_written, num_written, tl.minimum(limit, num_written), least, high,
            log_total, False, False, SPAN, SPANS_P2, False,
        )  # fmt: skip
        num_listed *= SPAN
        low = tl.where(num_written < limit, low, bound)  # as many tokens as are wanted are no smaller than the bound
        tl.debug_barrier()  # all threads have stored before any of them reads
    wanted = mass if MASS else tl.minimum(limit, num_visible)
    num_chosen, _ = select(
        chosen, scores, chosen_spans, num_listed, num_visible, wanted, low, high, log_total,
        MASS, BY_SPAN, SPAN, CHUNK, MORE,
    )  # fmt: skip
    tl.debug_barrier()

    table = block_tables + row * table_stride
    kv_head = head // GROUP
    acc = tl.zeros([TILE, DIM_P2], tl.float32)
    kept = tl.zeros([TILE], tl.float32)
    for start in range(0, num_chosen, TILE):
        at = start + tl.arange(0, TILE)
        seen = at < num_chosen
        place = tl.load(chosen + at, mask=seen, other=0, cache_modifier=".cg")
        weight = tl.exp2(tl.load(scores + place, mask=seen, other=float("-inf")) - log_total)
        index = tl.where(place < num_sinks, place, first + place - num_sinks)
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


@triton.jit
def select(
    chosen, values, listed_spans, num_listed, num_values, wanted, low, high, log_total,
    MASS: tl.constexpr, BY_SPAN: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Write the numbers of the largest values, in their order; of equal ones the first.

    Either `wanted` of them or, for MASS, the fewest whose weights reach it. With BY_SPAN only those of the listed spans
    are looked at. CHUNK of them stay in registers; with MORE, the rest is read in every pass. As ordered integers, the
    threshold is at least `low` and below `high`.

    Returns:
        how many were chosen, and a threshold that leaves no fewer than were wanted.
    """
    number, value = listed(values, listed_spans, 0, num_listed, num_values, BY_SPAN, SPAN, CHUNK)
    weight = weigh(value, log_total, MASS)
    if not MASS:
        high = tl.where(wanted == num_values, low + 1, high)  # all of them
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # their sum may be too large for an int32
        threshold = unordered(middle)
        total = tl.where(value >= threshold, weight, 0.0)
        if MORE:
            for start in range(CHUNK, num_listed, CHUNK):
                _, other = listed(values, listed_spans, start, num_listed, num_values, BY_SPAN, SPAN, CHUNK)
                total += tl.where(other >= threshold, weigh(other, log_total, MASS), 0.0)
        reached = tl.sum(total, 0)
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached >= wanted, high, middle)
        if not MASS:
            high = tl.where(reached == wanted, low + 1, high)

    # All above the threshold, and of those equal to it as many as are missing.
    threshold = unordered(low)
    above = tl.where(value > threshold, weight, 0.0)
    if MORE:
        for start in range(CHUNK, num_listed, CHUNK):
            _, other = listed(values, listed_spans, start, num_listed, num_values, BY_SPAN, SPAN, CHUNK)
            above += tl.where(other > threshold, weigh(other, log_total, MASS), 0.0)
    missing = wanted - tl.sum(above, 0)
    if MASS:
        missing = tl.maximum(tl.ceil(missing / tl.exp2(threshold - log_total)), 1.0)
        missing = tl.minimum(missing, num_listed)
    missing = missing.to(tl.int32)
    num_chosen, missing = append(chosen, tl.zeros([], tl.int32), missing, number, value, threshold)
    if MORE:
        for start in range(CHUNK, num_listed, CHUNK):
            number, value = listed(values, listed_spans, start, num_listed, num_values, BY_SPAN, SPAN, CHUNK)
            num_chosen, missing = append(chosen, num_chosen, missing, number, value, threshold)
    return num_chosen, low


@triton.jit
def append(chosen, num_chosen, missing, number, value, threshold):
    """Go on with the list of the chosen: all above the threshold, and the first `missing` of those equal to it."""
    is_equal = (value == threshold).to(tl.int32)
    take = (value > threshold) | ((is_equal > 0) & (tl.cumsum(is_equal, 0) <= missing))
    tl.store(chosen + num_chosen + tl.cumsum(take.to(tl.int32), 0) - 1, number, mask=take)
    return num_chosen + tl.sum(take.to(tl.int32), 0), missing - tl.sum(is_equal, 0)


@triton.jit
def listed(
    values, listed_spans, start, num_listed, num_values,
    BY_SPAN: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """CHUNK entries of a list: numbers and values. Where none is, NaN, which is neither above nor equal to anything."""
    at = start + tl.arange(0, CHUNK)
    number = at
    if BY_SPAN:
        span = tl.load(listed_spans + at // SPAN, mask=at < num_listed, other=0, cache_modifier=".cg")
        number = span * SPAN + at % SPAN
    seen = (at < num_listed) & (number < num_values)
    return number, tl.load(values + number, mask=seen, other=float("nan"))


@triton.jit
def weigh(value, log_total, MASS: tl.constexpr):
    """What a value counts for: its softmax weight, or one (exact in a float32 up to 16 million)."""
    if MASS:
        return tl.exp2(value - log_total)
    return tl.full(value.shape, 1.0, tl.float32)


@triton.jit
def ordered(value):
    """An int32 that sorts as the float32 does."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(rank):
    """The float32 of an ordered int32."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
