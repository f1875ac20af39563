"""The GPU path: who computes which rows.

tokens that rows share                     triton_cascade, one launch for all of them, then without these tokens:
rows with one query                        triton_decode, one launch for all of them
long stretches of prompts                  library, one call a row or two
the rest: prefix hits, ends, short rows    triton_prefill, one launch for as many as follow each other
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate, groupby
from typing import NamedTuple

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
    if sink_query is None and max(plan.row_lens, default=0) <= window:
        window = sinks = 0  # nothing is hidden: the kernels need not look
    options = {"scaling": scaling, "window": window, "sinks": sinks, "sink_query": sink_query}
    is_readable = sink_query is None and (key is not None or layer.k_scale is not None)  # by the library

    def read_long(long: Long) -> Tensor:
        own = slice(long.begin, long.begin + long.num_queries)
        past_len = plan.row_lens[long.row] - plan.query_lens[long.row]
        own_kv = (None, None) if layer.k_scale is not None else (key[own], value[own])
        return library.attention(query[own], *own_kv, layer, plan.block_tables[long.row], past_len, scaling)

    what = ("who reads", is_readable, window, query.shape, query.dtype)
    long_rows, stretches = plan.once(what, lambda: assign(plan, query, window, is_readable))
    if long_rows and long_rows[0].num_queries == query.shape[0]:
        return read_long(long_rows[0])

    out = query.new_empty(query.shape)
    if not window and sink_query is None:  # what a window hides is another part for each row
        options["shared"] = read_shared(query, layer, plan, scaling=scaling)
    if plan.num_decodes:
        decode(query, layer, plan, out, **options)
    for first_row, last_row in stretches:
        prefill(query, layer, plan, out, first_row, last_row, **options)
    for long in long_rows:
        out[long.begin : long.begin + long.num_queries] = read_long(long)
        rest = plan.query_lens[long.row] - long.num_queries
        if rest:
            rest_plan = plan.once(("last queries", long.row), partial(last_queries, plan, long.row, rest))
            prefill(query, layer, rest_plan, out, 0, 1, **options | {"shared": None})
    return out


class Long(NamedTuple):
    """A row whose first queries are for the library."""

    row: int
    num_queries: int
    begin: int  # where they begin among all queries


def assign(plan: Plan, query: Tensor, window: int, is_readable: bool) -> tuple[list[Long], list[tuple[int, int]]]:
    """Who reads the rows that have more than one query: the library, and in stretches first:last `triton_prefill`."""

    def num_long(row: int) -> int:
        query_len, row_len = plan.query_lens[row], plan.row_lens[row]
        is_plain = (not window or row_len <= window) and plan.private_lens[row] == row_len
        if plan.is_replayed or not is_plain or not is_readable:
            return 0  # what a graph holds knows bounds of the lengths alone
        return library.num_queries(query_len, row_len - query_len, query)

    starts = [0, *accumulate(plan.query_lens)]
    lens = {row: num_long(row) for row in range(plan.num_decodes, len(plan.query_lens))}
    others = (list(rows) for is_long, rows in groupby(lens, lambda row: lens[row] > 0) if not is_long)
    return (
        [Long(row, num_queries, starts[row]) for row, num_queries in lens.items() if num_queries],
        [(rows[0], rows[-1] + 1) for rows in others if any(plan.query_lens[row] for row in rows)],
    )


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
