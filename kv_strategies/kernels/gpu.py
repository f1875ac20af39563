"""The GPU path: who computes which rows.

tokens that rows share                     triton_cascade, one launch for all of them, then without these tokens:
rows with one query                        triton_decode, one launch for all of them
long rows with nothing cached              torch's own attention over this step's K and V, one call a row
the rest: prefix hits, chunks, short rows  triton_prefill, one launch for as many as follow each other
"""

from __future__ import annotations

from itertools import groupby

import torch.nn.functional as F
from torch import Tensor

from ..plan import LayerStore, Plan
from .triton_cascade import read_shared
from .triton_decode import decode
from .triton_prefill import prefill

#: Rows of at least this many queries and nothing cached go to torch's attention; below it, its calls cost more than
#: they save.
MIN_FRESH = 512


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
    """See `reference.attention`; key and value as in `kernels.attention`."""
    options = {"scaling": scaling, "window": window, "sinks": sinks, "sink_query": sink_query}

    def fresh(row: int) -> bool:
        query_len, row_len = plan.query_lens[row], plan.row_lens[row]
        unwindowed = sink_query is None and (not window or row_len <= window)
        return key is not None and layer.k_scale is None and MIN_FRESH <= query_len == row_len and unwindowed

    first_prefill, num_rows = plan.num_decodes, len(plan.query_lens)
    starts = [0]
    for query_len in plan.query_lens:
        starts.append(starts[-1] + query_len)
    if starts[-1] == len(query) and num_rows == 1 and fresh(0):
        return fresh_attention(query, key, value, scaling)

    out = query.new_empty(query.shape)
    if not window and sink_query is None:  # what a window hides is another part for each row
        options["shared"] = read_shared(query, layer, plan, scaling=scaling)
    if first_prefill:
        decode(query, layer, plan, out, **options)
    for is_fresh, rows in groupby(range(first_prefill, num_rows), fresh):
        rows = list(rows)
        if is_fresh:
            for row in rows:
                own = slice(starts[row], starts[row + 1])
                out[own] = fresh_attention(query[own], key[own], value[own], scaling)
        elif any(plan.query_lens[row] for row in rows):
            prefill(query, layer, plan, out, rows[0], rows[-1] + 1, **options)
    return out


def fresh_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention among n tokens, [n, Hq, D] and [n, Hkv, D] -> [n, Hq, D], by the fastest kernel torch has."""
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))  # [1, H, n, D]
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out[0].transpose(0, 1)
