"""The GPU path: who computes which rows.

tokens that rows share                     triton_cascade, one launch for all of them, then without these tokens:
rows with one query                        triton_decode, one launch for all of them
long stretches of prompts                  library, one call a row or two
the rest: prefix hits, ends, short rows    triton_prefill, one launch for as many as follow each other
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from ...step.plan import LayerStore, Plan
from . import library
from .triton_cascade import read_shared
from .triton_decode import decode
from .triton_prefill import prefill
from .turned import turned


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
    options = {"scaling": scaling, "window": window, "sinks": sinks, "sink_query": sink_query}
    first_prefill, num_rows = plan.num_decodes, len(plan.query_lens)
    starts = [0]
    for query_len in plan.query_lens:
        starts.append(starts[-1] + query_len)

    def num_long(row: int) -> int:
        """How many of the row's first queries are for the library."""
        query_len, row_len = plan.query_lens[row], plan.row_lens[row]
        is_plain = sink_query is None and (not window or row_len <= window) and plan.private_lens[row] == row_len
        if plan.is_replayed or not is_plain or (key is None and layer.k_scale is None):
            return 0  # what a graph holds knows bounds of the lengths alone
        return library.num_queries(query_len, row_len - query_len, query)

    def read_long(row: int, num_queries: int) -> Tensor:
        own = slice(starts[row], starts[row] + num_queries)
        past_len = plan.row_lens[row] - plan.query_lens[row]
        own_kv = (None, None) if layer.k_scale is not None else (key[own], value[own])
        return library.attention(query[own], *own_kv, layer, plan.block_tables[row], past_len, scaling)

    if num_rows == 1 and 0 < num_long(0) == len(query):
        return read_long(0, len(query))

    out = query.new_empty(query.shape)
    if not window and sink_query is None:  # what a window hides is another part for each row
        options["shared"] = read_shared(query, layer, plan, scaling=scaling)
    if first_prefill:
        decode(query, layer, plan, out, **options)
    for num_queries, rows in groupby(range(first_prefill, num_rows), num_long):
        rows = list(rows)
        if not num_queries:
            if any(plan.query_lens[row] for row in rows):
                prefill(query, layer, plan, out, rows[0], rows[-1] + 1, **options)
            continue
        for row in rows:
            out[starts[row] : starts[row] + num_queries] = read_long(row, num_queries)
            rest = plan.query_lens[row] - num_queries
            if rest:
                rest_plan = plan.once(("last queries", row), partial(last_queries, plan, row, rest))
                prefill(query, layer, rest_plan, out, 0, 1, **options | {"shared": None})
    return out


def last_queries(plan: Plan, row: int, num_queries: int) -> Plan:
    """The plan of one row's last queries alone. They stand where they stood among the packed ones."""
    end = plan.cu_seqlens_q[row + 1 : row + 2]
    return replace(
        plan,
        cu_seqlens_q=torch.cat([end - num_queries, end]),
        context_lens=plan.context_lens[row : row + 1],
        block_tables=plan.block_tables[row : row + 1],
        query_lens=[num_queries],
        row_lens=[plan.row_lens[row]],
        num_decodes=0,
        row_groups=[],
        groups=None,
        shared_lens=None,
        scratch={},
    )
