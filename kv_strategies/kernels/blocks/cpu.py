"""The CPU path: torch's flash attention over the blocks where they lie.

On a CPU the pool keeps a head's blocks one after the other, so consecutive block ids are consecutive tokens and a *run*
of them is a plain strided view [Hkv, n, D], read in place:

    block table   7 8 9 10 | 3 | 21 22 23 ...        three runs
    attention     (out, lse) of each part, merged:   out = sum_i softmax(lse)_i out_i

A call costs about as much as copying a few hundred tokens, so runs shorter than that are gathered into one part
together, and decoding rows that are no longer than that all into one padded call. The parts depend on the block tables
alone: they are found once a plan, not once a layer.

The few queries of a decoding row are two plain products in float32, which read K and V faster: 1024 tokens in SmolLM2's
heads take 98 us, by flash attention 134 (two cores). Codes with scales are never multiplied out for it. A scale belongs
to a token, so it is a factor of its score and of its weight, and what is left is to widen the codes, a tile at a time:

    scores = (q . codes_k) * scale_k        out = (softmax(scores) * scale_v) . codes_v
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...step.plan import NULL_SLOT, LayerStore, Plan
from .. import reference
from ..linear import Rotary, rotate_heads
from .turned import turned

#: Runs shorter than this many tokens are gathered: below it, one more call costs more than the copy (measured with
#: SmolLM2's heads on two cores: 15 to 20 us a call and its share of the merge, 0.06 us a token copied in float32).
MIN_RUN = 256
#: Decoding rows of at most so many tokens are gathered together. Eight of 48 to 360 tokens take 0.55 ms a layer so, 0.6
#: row by row where each is one run, and 1.6 ms where each is several (float32; two cores share three heads badly).
MAX_GATHERED = 512
#: Tokens of an 8-bit store widened or dequantised at a time, so that no full copy of a context ever exists. Fewer cost
#: more calls: 4200 of them in SmolLM2's heads take 0.33 ms in one piece, 0.39 in three (float32, two cores).
CODE_TILE = 8192
#: Queries of a windowed prefill computed at a time.
QUERY_TILE = 128

#: Queries of a K/V head whose scores are worth writing down: with more of them flash attention is faster, and needs no
#: memory for all scores.
MAX_MULTIPLIED = 8
#: What a product is added to where there is nothing to add.
NOTHING = torch.zeros(1, dtype=torch.float32, device="cpu")  # whatever the user's defaults are at import

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Part(NamedTuple):
    """K and V of some tokens of a row [1, Hkv, n, D], numbers or codes with their scales [1, Hkv, n]."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def numbers(self) -> tuple[Tensor, Tensor]:
        if self.k_scale is None:
            return self.k, self.v
        return widened(self.k) * self.k_scale.float()[..., None], widened(self.v) * self.v_scale.float()[..., None]

    def attend(self, query: Tensor, scaling: float, is_only: bool = False) -> tuple[Tensor, Tensor | None]:
        """Queries [1, Hkv, m, D], few of them -> (out [1, Hkv, m, D], log-sum-exp [1, Hkv, m]); no mask. Of the only
        part there is nobody asks for the log-sum-exp.
        """
        if self.k_scale is None and (self.k.dtype != torch.float32 or query.shape[2] > MAX_MULTIPLIED):
            return flash(query, self.k, self.v, scale=scaling)
        scores = torch.baddbmm(NOTHING, widened(self.k[0]), query[0].mT, beta=0, alpha=scaling).mT  # [Hkv, m, n]
        if self.k_scale is not None:
            scores *= self.k_scale[0].float()[:, None]
        weights = scores.softmax(-1)
        if self.v_scale is not None:
            weights *= self.v_scale[0].float()[:, None]
        out = torch.bmm(weights, widened(self.v[0]))
        return out[None], None if is_only else scores.logsumexp(-1)[None]


def store_kv(
    key: Tensor,
    value: Tensor,
    layer: LayerStore,
    slot_mapping: Tensor,
    query: Tensor | None = None,
    rotary: Rotary | None = None,
    plan: Plan | None = None,
) -> None:
    """See `reference.store_kv`."""
    if rotary is not None:
        rotate_heads(query, rotary)
        rotate_heads(key, rotary)
    slot = slot_mapping.item() if len(slot_mapping) == 1 else NULL_SLOT
    is_one = slot != NULL_SLOT
    if not is_one and (not len(slot_mapping) or slot_mapping.min() < 0 or not all(map(is_flat, (layer.k, layer.v)))):
        return reference.store_kv(key, value, layer, slot_mapping)
    written = [(layer.k, key), (layer.v, value)]
    if layer.k_scale is not None:
        codes, scales = quantised(key, value, layer)
        written = list(zip(layer, (*codes, *scales), strict=True))
    for store, states in written:
        if is_one:  # a third of the time of what is below
            block, offset = divmod(slot, layer.block_size)
            store[block, :, offset].copy_(states[0])
            continue
        if store.dtype.itemsize == 1:
            store, states = store.view(torch.uint8), states.view(torch.uint8)  # no index serves float8
        all_tokens = view(store, 0, 0, store.shape[0] * store.shape[2])[0]  # [Hkv, N * block_size, ..]
        all_tokens.index_copy_(1, slot_mapping, states.transpose(0, 1).to(store.dtype))


def quantised(key: Tensor, value: Tensor, layer: LayerStore) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Codes of K and V, and their scales: in one go where both are stored alike."""
    if layer.k.dtype == layer.v.dtype:
        return reference.quantise(torch.stack((key, value)), layer.k.dtype, layer.k_scale.dtype)
    both = ((key, layer.k, layer.k_scale), (value, layer.v, layer.v_scale))
    return tuple(
        zip(*(reference.quantise(states, *(plane.dtype for plane in to)) for states, *to in both), strict=True)
    )


@turned
def attention(
    query: Tensor,
    layer: LayerStore,
    plan: Plan,
    *,
    scaling: float,
    window: int = 0,
    sinks: int = 0,
    sink_query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """See `reference.attention`."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = layer.k.shape[1]
    if sink_query is None and (not window or max(plan.row_lens, default=0) <= window + sinks):
        window = sinks = 0  # all is visible anyhow
    # The query heads of one K/V head become queries of that head: nothing is repeated for grouped queries.
    dtype = query.dtype if layer.k_scale is None else torch.float32
    shape = (-1, 1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    grouped = query.to(dtype).reshape(shape)  # [T, 1, Hkv, G, D]
    sink_grouped = grouped if sink_query is None else sink_query.to(dtype).reshape(shape)

    shared, together = {}, {}
    if not (window or sinks):
        shared = cascade(grouped, layer, plan, scaling)
        together = short_rows(grouped, layer, plan, scaling)
    outs = []  # one [n, Hkv, G, D] a row
    begin = 0
    for row, (query_len, context_len) in enumerate(zip(plan.query_lens, plan.row_lens, strict=True)):
        end = begin + query_len
        first = max(sinks, context_len - window) if window else sinks
        num_shared, seen = shared.get(row, (0, []))
        if row in together:
            outs.append(together[row])
        elif query_len == 1 and context_len:
            first = max(first, num_shared)
            own = parts(layer, plan, row, first, context_len)
            of_sinks = parts(layer, plan, row, 0, min(sinks, context_len))
            is_only = len(own) + len(of_sinks) + len(seen) == 1
            partials = [part.attend(grouped[begin], scaling, is_only) for part in own]
            partials += [part.attend(sink_grouped[begin], scaling, is_only) for part in of_sinks]
            outs.append(merge(partials + seen))  # n = 1: [1, Hkv, G, D] are [n, Hkv, G, D]
        elif query_len and (sinks or 0 < window < context_len):
            queries, sink_queries = grouped[begin:end, 0], sink_grouped[begin:end, 0]
            outs.append(windowed_prefill(queries, sink_queries, layer, plan, row, scaling, window, sinks))
        elif query_len and context_len:
            outs.append(prefill(grouped[begin:end, 0], layer, plan, row, scaling, num_shared, seen))
        else:
            outs.append(torch.zeros_like(grouped[begin:end, 0]))
        begin = end
    if begin < len(query):  # tokens that pad the plan belong to no row
        outs.append(torch.zeros_like(grouped[begin:, 0]))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.view(query.shape).to(query.dtype)


def cascade(grouped: Tensor, layer: LayerStore, plan: Plan, scaling: float) -> dict[int, tuple[int, list]]:
    """The tokens that several rows share, read once for all of their queries [T, 1, Hkv, G, D].

    Returns:
        row -> how many tokens are done, and for each part of them (out [n, Hkv, G, D], lse [n, Hkv, G]) of its queries.
    """
    done = {}
    starts = [0, *accumulate(plan.query_lens)]
    for first, last, num_tokens in plan.row_groups:
        queries = grouped[starts[first] : starts[last], 0]  # [m, Hkv, G, D], of all rows
        num_queries, num_kv_heads, group, head_dim = queries.shape
        stacked = queries.transpose(0, 1).reshape(1, num_kv_heads, num_queries * group, head_dim)
        partials = []
        for part in parts(layer, plan, first, 0, num_tokens):
            out, lse = part.attend(stacked, scaling)
            out = out.reshape(num_kv_heads, num_queries, group, head_dim).transpose(0, 1)
            partials.append((out, lse.reshape(num_kv_heads, num_queries, group).transpose(0, 1)))
        for row in range(first, last):
            own = slice(starts[row] - starts[first], starts[row + 1] - starts[first])
            done[row] = num_tokens, [(out[own], lse[own]) for out, lse in partials]
    return done


def short_rows(grouped: Tensor, layer: LayerStore, plan: Plan, scaling: float) -> dict[int, Tensor]:
    """The decoding rows with few tokens, attended to in one call over a padded copy: row -> [1, Hkv, G, D]."""
    if "short rows" not in plan.scratch:
        plan.scratch["short rows"] = find_short_rows(layer, plan)
    rows, slots, mask = plan.scratch["short rows"]
    if not rows:
        return {}
    index, shape = slots.flatten(), (*slots.shape, layer.k.shape[-1])
    tokens = (store.transpose(0, 1).view(-1, shape[-1]) for store in (layer.k, layer.v))  # [Hkv * N * block_size, D]
    k, v = (states.index_select(0, index).view(shape) for states in tokens)  # [R, Hkv, S, D]
    out, _ = flash(grouped[: rows[-1] + 1, 0][rows], k, v, attn_mask=mask, scale=scaling)
    return dict(zip(rows, out.split(1), strict=True))


def find_short_rows(layer: LayerStore, plan: Plan) -> tuple[list[int], Tensor | None, Tensor | None]:
    """Which rows [R], where K and V of their S tokens lie [R, Hkv, S], and what hides the padding [R, 1, 1, S].

    The padding of a row repeats its last token: memory that no token owns may hold anything.
    """
    grouped = {row for first, last, _ in plan.row_groups for row in range(first, last)}
    rows = [row for row in range(plan.num_decodes) if 0 < plan.row_lens[row] <= MAX_GATHERED and row not in grouped]
    is_plain = (
        layer.k_scale is None and layer.k.transpose(0, 1).is_contiguous() and layer.k.stride() == layer.v.stride()
    )
    if len(rows) < 2 or not is_plain:
        return [], None, None
    num_blocks, num_kv_heads, block_size, _ = layer.k.shape
    lens = torch.tensor([plan.row_lens[row] for row in rows])[:, None]
    index = torch.arange(int(lens.max())).expand(len(rows), -1)
    mask = torch.zeros(index.shape).masked_fill_(index >= lens, -torch.inf)
    index = index.minimum(lens - 1)
    slots = plan.block_tables[rows].gather(1, index // block_size) * block_size + index % block_size  # [R, S]
    heads = torch.arange(num_kv_heads)[:, None] * (num_blocks * block_size)
    return rows, slots[:, None] + heads, mask[:, None, None]


def prefill(
    query: Tensor, layer: LayerStore, plan: Plan, row: int, scaling: float, num_shared: int, seen: list
) -> Tensor:
    """Queries [n, Hkv, G, D] of one row: the past without a mask, their own tokens causally, merged; no mask.

    The first `num_shared` tokens are done already: `seen` holds what they give, see `cascade`.
    """
    query_len, num_kv_heads, group, head_dim = query.shape
    context_len = plan.row_lens[row]
    past = context_len - query_len
    heads = query.permute(1, 2, 0, 3)  # [Hkv, G, n, D]: a K/V head is one batch entry, shared by its G query heads
    (own,) = parts(layer, plan, row, past, context_len, whole=True)
    k, v = own.numbers()  # [1, Hkv, n, D]
    shared = (num_kv_heads, group, query_len, head_dim)
    partials = [flash(heads, k[0, :, None].expand(shared), v[0, :, None].expand(shared), 0.0, True, scale=scaling)]
    for part in parts(layer, plan, row, num_shared, past):
        k, v = part.numbers()
        shared = (num_kv_heads, group, k.shape[2], head_dim)
        partials.append(flash(heads, k[0, :, None].expand(shared), v[0, :, None].expand(shared), scale=scaling))
    partials += [(out.permute(1, 2, 0, 3), lse.permute(1, 2, 0)) for out, lse in seen]
    return merge(partials).permute(2, 0, 1, 3)  # [n, Hkv, G, D]


def windowed_prefill(
    query: Tensor, sink_query: Tensor, layer: LayerStore, plan: Plan, row: int, scaling: float, window: int, sinks: int
) -> Tensor:
    """Queries [n, Hkv, G, D] of one row, a tile at a time over the sinks and the tokens in any window of the tile."""
    query_len, context_len = plan.query_lens[row], plan.row_lens[row]
    table = plan.block_tables[row]
    out = torch.empty(query.shape, dtype=query.dtype)
    for begin in range(0, query_len, QUERY_TILE):
        end = min(begin + QUERY_TILE, query_len)
        position = torch.arange(context_len - query_len + begin, context_len - query_len + end)  # [m]
        last = int(position[-1]) + 1
        first = max(sinks, int(position[0]) + 1 - window) if window else sinks
        index = torch.cat((torch.arange(min(sinks, last)), torch.arange(first, max(first, last))))  # [s]
        k = reference.gather(layer.k, layer.k_scale, table, index, reference.scaled)[:, None]  # [Hkv, 1, s, D] float32
        v = reference.gather(layer.v, layer.v_scale, table, index, reference.scaled)[:, None]
        num_sinks = min(sinks, last)
        sink_scores = sink_query[begin:end].permute(1, 2, 0, 3).float() @ k[:, :, :num_sinks].mT
        scores = query[begin:end].permute(1, 2, 0, 3).float() @ k[:, :, num_sinks:].mT
        visible = reference.sees(position[:, None], index, window, sinks)  # [m, s]
        scores = (torch.cat((sink_scores, scores), -1) * scaling).masked_fill(~visible, float("-inf"))
        out[begin:end] = (scores.softmax(-1) @ v).permute(2, 0, 1, 3).to(out.dtype)
    return out


def merge(partials: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over the union of disjoint parts, from each part's output [.., D] and log-sum-exp [..] (float32)."""
    if len(partials) == 1:
        return partials[0][0]
    outs, lses = zip(*partials, strict=True)
    weights = torch.stack(lses).softmax(0)[..., None]  # [P, .., 1]
    return (torch.stack(outs) * weights).sum(0).to(outs[0].dtype)


def parts(layer: LayerStore, plan: Plan, row: int, begin: int, end: int, whole: bool = False) -> list[Part]:
    """The tokens begin:end of a row, in no particular order: views where possible, codes at most CODE_TILE at a time.

    `whole` asks for one piece in token order.
    """
    if begin >= end:
        return []
    name = ("parts", row, begin, end, whole)
    if name not in plan.scratch:
        plan.scratch[name] = find_parts(plan.block_tables[row], layer, begin, end, whole)
    runs, gathered = plan.scratch[name]
    stores = [store for store in layer[:4] if store is not None]
    pieces = [Part(*(view(store, *run) for store in stores)) for run in runs]
    return pieces + [Part(*(copied(store, *piece) for store in stores)) for piece in gathered]


def find_parts(table: Tensor, layer: LayerStore, begin: int, end: int, whole: bool):
    """Split tokens begin:end of a block table -> (runs to read in place, what to gather), each of which is one part.

    A run is (block, offset, tokens). What is gathered is (block ids, skip, tokens): only the first of its blocks may
    lack tokens at its start and only the last at its end.
    """
    block_size = layer.block_size
    first = begin // block_size
    blocks = table[first : (end - 1) // block_size + 1].long()
    edges = range(len(blocks) + 1)
    if is_flat(layer.k) and is_flat(layer.v):
        edges = [0, *((blocks[1:] != blocks[:-1] + 1).nonzero().flatten() + 1).tolist(), len(blocks)]
    tile = end - begin if whole or layer.k_scale is None else max(1, CODE_TILE // block_size) * block_size
    runs, short, skip, num_short = [], [], 0, 0
    for low, high in pairwise(edges):
        start, stop = max(begin, (first + low) * block_size), min(end, (first + high) * block_size)
        if len(edges) == 2 or (stop - start >= MIN_RUN and not whole):
            for at in range(start, stop, tile):
                place = int(blocks[low]) * block_size + at - (first + low) * block_size
                runs.append((*divmod(place, block_size), min(tile, stop - at)))
            continue
        if not short:
            skip = start % block_size
        short.append(blocks[low:high])
        num_short += stop - start
    gathered, kept = [], torch.cat(short) if short else blocks
    for at in range(0, num_short, tile):
        count = min(tile, num_short - at)
        gathered.append((kept[at // block_size :][: -(-(skip + count) // block_size)], skip, count))
    return runs, gathered


def widened(codes: Tensor) -> Tensor:
    """As `reference.unpack`."""
    if codes.dtype != torch.float8_e4m3fn:
        return reference.unpack(codes)
    # torch converts them one by one, at a twelfth of this rate. float16 has the same fields, its exponent one bit more
    # and its bias 8: the bits move up, and a factor of 2^8 is what the biases differ by.
    bits = codes.view(torch.int8).to(torch.int16)  # the sign in the upper byte
    bits <<= 7
    bits &= ~(1 << 14)
    return bits.view(torch.float16).float().mul_(256)


def is_flat(store: Tensor) -> bool:
    """Whether consecutive block ids are consecutive tokens of every head."""
    return store.stride(0) == store.shape[2] * store.stride(2)


def view(store: Tensor, block: int, offset: int, count: int) -> Tensor:
    """`count` tokens of [N, Hkv, block_size, ..] from `offset` in `block` on, as a view [1, Hkv, count, ..]."""
    _, num_heads, _, *rest = store.shape
    block_stride, head_stride, token_stride, *strides = store.stride()
    start = store.storage_offset() + block * block_stride + offset * token_stride
    return store.as_strided((1, num_heads, count, *rest), (0, head_stride, token_stride, *strides), start)


def copied(store: Tensor, blocks: Tensor, skip: int, count: int) -> Tensor:
    """`count` tokens of blocks of [N, Hkv, block_size, ..] from `skip` in the first one on -> [1, Hkv, count, ..]."""
    dtype, rest = store.dtype, store.shape[3:]
    if dtype.itemsize == 1:
        store = store.view(torch.uint8)  # no index serves float8
    if is_flat(store):
        data = store.transpose(0, 1).index_select(1, blocks)  # [Hkv, n, block_size, ..]
    else:  # one block is one piece of memory, and to select from what is not contiguous takes hundreds of times longer
        data = store.index_select(0, blocks).transpose(0, 1)
    return data.reshape(1, data.shape[0], -1, *rest)[:, :, skip : skip + count].view(dtype)
