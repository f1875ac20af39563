"""What the decode kernels share: how rows are cut into parts, what a program finds to do, and what it does at the end.

Long parts spare merging, short ones keep a GPU busy, and parts of equal length end together. So each row is cut into
equal parts, at least as long as all tokens of the batch divided by the number of programs that the chip holds at once;
the parts of all rows are laid end to end, and a program finds its own. In float32, where tokens are compared to the
bit, the row's length alone decides, so its results do not depend on its neighbours.

The tokens that a row reads have places, 0, 1, ...: sink tokens, padded to whole tiles, then those from `begin` on.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .triton_cascade import fold_shared
from .triton_common import merge_parts


@dataclass(frozen=True)
class Tuning:
    """Sizes to tune; results agree to rounding whatever they are. `bench/probes/kernel_bandwidth.py` sweeps them."""

    tile: int  # tokens an iteration
    num_warps: int
    num_stages: int = 1
    programs: int = 4  # a multiprocessor, at once
    registers: int = 255  # a thread, at most: fewer let more programs in at once
    least: int = 64  # tokens of a part, at least
    part: int = 0  # tokens of a part where the row's length alone decides; 0 where the batch does


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
    CASCADE: tl.constexpr, SHARED_SPLIT: tl.constexpr, TILE_PARTS: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """Store what a program has found for its heads [ROWS]; whoever arrives last merges parts, see `merge_group`."""
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
        # This head of [num_parts, HEADS, GROUP, DIM_P2], and its counters [num_parts, HEADS].
        first_program = (tl.program_id(0) - part * HEADS).to(tl.int64)
        parts += first_program * GROUP * DIM_P2
        part_lses += first_program * GROUP
        arrived += first_program
        at = part * (HEADS * GROUP) + heads
        tl.store(part_lses + at, best + tl.log2(total), mask=heads < GROUP)
        tl.store(parts + at[:, None] * DIM_P2 + dims[None, :], acc, mask=(heads < GROUP)[:, None])
        index, count, step = part, num_parts, 1
        if FAN == 0:
            merge_group(
                target, parts, part_lses, arrived, index, count, step, 0, dims, out_stride_head,
                GROUP, GROUP_P2, HEADS, DIM, DIM_P2, TILE_PARTS, FAN,
            )  # fmt: skip
        else:
            fan = tl.maximum(FAN, tl.ceil(tl.sqrt(num_parts.to(tl.float32))).to(tl.int32))  # two levels are enough
            while count > 1:
                count = merge_group(
                    target, parts, part_lses, arrived, index, count, step, fan, dims, out_stride_head,
                    GROUP, GROUP_P2, HEADS, DIM, DIM_P2, TILE_PARTS, FAN,
                )  # fmt: skip
                index, step = index // fan, step * fan


@triton.jit
def merge_group(
    target, parts, part_lses, arrived, index, count, step, fan, dims, out_stride_head,
    GROUP: tl.constexpr, GROUP_P2: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
    TILE_PARTS: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """Of each `fan` parts that lie side by side (FAN 0: of all) the last to arrive merges them and puts the result
    where the first of them lies, or, of no more than these, where the row's belongs. So the last of a long row need not
    read many parts, one after the other: some hundred of them took longer than the tokens of the row.

    Args:
        index, count: which part this is, and how many there are, `step` apart: each is the merged one of as many.

    Returns:
        How many there are merged once more, one of which this is; 0 where others have not arrived yet.
    """
    first, size = 0, count
    if FAN > 0:
        first = index // fan * fan
        size = tl.minimum(count - first, fan)
    own = tl.arange(0, GROUP_P2)  # the query heads without the padding that tensor cores want
    # A group's counter is that of its second part, where no other group's second one begins. One part alone needs none.
    counter = arrived + (first + 1) * step * HEADS
    tl.debug_barrier()  # all threads have stored before one of them says so
    before = 0
    if size > 1:
        before = tl.atomic_add(counter, 1)
    merged_count = 0
    if before == size - 1:
        tl.store(counter, 0, mask=size > 1)
        start = first * step * (HEADS * GROUP)
        merged, lse = merge_parts(
            parts + start * DIM_P2, part_lses + start, size, own, own < GROUP, dims, step * (HEADS * GROUP),
            DIM_P2, TILE_PARTS,
        )  # fmt: skip
        if size == count:
            tl.store(
                target + own[:, None] * out_stride_head + dims[None, :], merged.to(target.dtype.element_ty),
                mask=(own < GROUP)[:, None] & (dims < DIM)[None, :],
            )  # fmt: skip
        else:
            merged_count = tl.cdiv(count, fan)
            tl.debug_barrier()  # all threads have read
            tl.store(part_lses + start + own, lse, mask=own < GROUP)
            tl.store(parts + (start + own)[:, None] * DIM_P2 + dims[None, :], merged, mask=(own < GROUP)[:, None])
    return merged_count


@triton.jit
def load_queries(
    query, row, kv_head, heads, dims, stride_row, stride_head, GROUP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The queries of a KV head [ROWS, DIM_P2]."""
    head = kv_head.to(tl.int64) * GROUP + heads
    address = query + row * stride_row + head[:, None] * stride_head
    return tl.load(address + dims[None, :], mask=(heads < GROUP)[:, None] & (dims < DIM)[None, :], other=0.0)
