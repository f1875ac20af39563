"""Attention over 4-bit codes, which are those of K and V turned: turn the queries, and turn back what is read of V.

    q . k = turn(q) . turn(k)        sum_j p_j v_j = turn(sum_j p_j turn(v_j))

So no kernel below turns a key or a value that it reads: of a context there are many, and two vectors a query head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from ...step.plan import LayerStore, Plan
from .. import reference


def turned(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attention`, see `reference.attention`, of what has been turned before its codes were made."""

    @wraps(attention)
    def attend(query: Tensor, layer: LayerStore, plan: Plan, *arguments, **options) -> Tensor:
        if layer.k.dtype == reference.HALF_BYTES:
            query = turn(query, plan)
            if options.get("sink_query") is not None:
                options["sink_query"] = turn(options["sink_query"], plan)
        out = attention(query, layer, plan, *arguments, **options)
        return turn(out, plan) if layer.v.dtype == reference.HALF_BYTES else out

    return attend


def turn(states: Tensor, plan: Plan) -> Tensor:
    """As `reference.turn`, [T, H, D] in the type that they have."""
    if not states.is_cuda:
        return reference.turn(states).to(states.dtype)
    from .triton_turn import turn as on_gpu  # Triton is there only where a GPU is

    return on_gpu(states, plan)
