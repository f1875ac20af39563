"""Attention whose result for a query does not depend, to the bit, on what is computed beside it.

A row's tokens are cut into segments where their indices say, each attended to by itself and folded one after the other;
see `triton_invariant.py`, which does it on a GPU. Here a CPU does, by products of one shape: QUERIES queries with the
heads of their group, by SEGMENT tokens, what is missing zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...step.plan import LayerStore, Plan
from .. import reference
from .turned import turned

#: Queries of a product on a CPU, and tokens.
QUERIES, SEGMENT = 4, 256
#: Products of that shape at a time: they bound the memory of the scores.
AT_ONCE = 64
LOWEST = -1.0e30  # where a maximum starts: finite, so that the difference of two starts is 0 and not NaN


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
    """See `reference.attention`; without a window. What rows share is read by each of them."""
    assert not window and sink_query is None, "deterministic=True refuses a window"
    attend = _on_gpu if query.is_cuda else _on_cpu
    return attend(query, layer, plan, scaling=scaling)


@turned
def _on_gpu(query: Tensor, layer: LayerStore, plan: Plan, *, scaling: float) -> Tensor:
    from .triton_invariant import attend  # Triton is there only where a GPU is

    out = query.new_empty(query.shape)
    for first, last in ((0, plan.num_decodes), (plan.num_decodes, len(plan.query_lens))):
        if any(plan.query_lens[first:last]):
            attend(query, layer, plan, out, first, last, scaling=scaling)
    return out


@turned
def _on_cpu(query: Tensor, layer: LayerStore, plan: Plan, *, scaling: float) -> Tensor:
    num_heads, dim = query.shape[1:]
    group = num_heads // layer.k.shape[1]
    out = torch.zeros(query.shape, dtype=query.dtype)
    end = 0
    for row, (query_len, context_len) in enumerate(zip(plan.query_lens, plan.row_lens, strict=True)):
        begin, end = end, end + query_len
        if not query_len or not context_len:
            continue
        past = context_len - query_len
        tiles = F.pad(query[begin:end].float(), (0, 0, 0, 0, 0, -query_len % QUERIES))
        tiles = tiles.view(-1, QUERIES, num_heads // group, group, dim).transpose(1, 2).flatten(2, 3)
        position = past + torch.arange(len(tiles) * QUERIES).view(-1, QUERIES).repeat_interleave(group, 1)
        done = [
            _attend(*some, layer, plan.block_tables[row], context_len, scaling)
            for some in zip(tiles.split(AT_ONCE), position.split(AT_ONCE), strict=True)
        ]
        whole = torch.cat(done).unflatten(2, (QUERIES, group)).transpose(1, 2).reshape(-1, num_heads, dim)
        out[begin:end] = whole[:query_len].to(out.dtype)
    return out


def _attend(
    query: Tensor, position: Tensor, layer: LayerStore, table: Tensor, context_len: int, scaling: float
) -> Tensor:
    """Tiles of queries [tiles, Hkv, R, D] at these positions [tiles, R] of a row -> as the queries."""
    best = torch.full((*query.shape[:3], 1), LOWEST)
    total, acc = torch.zeros_like(best), torch.zeros_like(query)
    for begin in range(0, min(context_len, int(position.max()) + 1), SEGMENT):
        index = torch.arange(begin, begin + SEGMENT)
        k = _gathered(layer.k, layer.k_scale, table, begin, context_len)  # [Hkv, SEGMENT, D]
        v = _gathered(layer.v, layer.v_scale, table, begin, context_len)
        hidden = index > position[:, None, :, None]  # tokens beyond the context are, too: [tiles, 1, R, SEGMENT]
        scores = (query @ k.mT * scaling).masked_fill_(hidden, -torch.inf)
        new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
        keep, weights = (best - new_best).exp(), (scores - new_best).exp()
        total = total * keep + weights.sum(-1, keepdim=True)
        acc = acc * keep + weights @ v
        best = new_best
    return acc / total


def _gathered(store: Tensor, scales: Tensor | None, table: Tensor, begin: int, context_len: int) -> Tensor:
    """A segment of a row [Hkv, SEGMENT, D] float32, zeros beyond its tokens."""
    index = torch.arange(begin, min(begin + SEGMENT, context_len))
    data = reference.gather(store, scales, table, index, reference.scaled)
    return F.pad(data, (0, 0, 0, SEGMENT - data.shape[1]))
