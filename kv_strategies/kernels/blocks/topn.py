"""Attention over the heaviest tokens only: the softmax runs over all keys, the sum over few values.

    p[j] = softmax over the visible j of (scaling * q . k[j])          all of K is read
    S    = the N tokens of largest p                  top_n = N
           the fewest tokens with p(S) >= mass        mass
    out  = sum of p[j] v[j] over j in S                                |S| rows of V are read

Each query head chooses for itself, in every layer and step; of equal weights, the earlier token goes first. The weights
stay as the softmax over *all* tokens gave them. What is dropped is then replaced by nothing, and

    |out - exact| <= (1 - p(S)) * max |v|

holds with the dropped mass as its only unknown, which is reported. Dividing by p(S) (`renormalise`) replaces the
dropped values by the mean of the kept ones instead: twice the bound, no better where the tail of V averages out, and
far better for the text of docs/offload.md.

From KCache (He and Wu, 2024, arXiv 2404.18057), which keeps K near and V far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...step.plan import LayerStore, Plan
from ..reference import Decode, Visible, dequantise, gather_heads, sees

#: What a tally counts: (row, head) pairs served, tokens kept, mass dropped in all, and the largest mass dropped.
TALLY = ("reads", "kept", "dropped", "worst")


def new_tally(device: torch.device) -> Tensor:
    """[4] float64, see `TALLY`; updated on the device, so that a CUDA graph can hold it."""
    return torch.zeros(len(TALLY), dtype=torch.float64, device=device)


def topn_attention(query: Tensor, layer: LayerStore, plan: Plan, tally: Tensor, **options) -> Tensor:
    """Attention of the plan's first R = num_decodes rows, which have one query each. Arguments as in `reference`."""
    if query.is_cuda:
        from .triton_topn import topn_attention as on_gpu  # Triton is there only where a GPU is

        return on_gpu(query, layer, plan, tally, **options)
    return reference(query, layer, plan, tally, **options)


def reference(
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
    decode: Decode = dequantise,
    visible: Visible | None = None,
) -> Tensor:
    """The specification, in plain torch and float32.

    Args:
        query: [R, Hq, D].
        layer: K on the query's device; V there or in pinned host memory, whence a GPU reads the chosen rows alone.
        tally: [4] float64, added to.
        top_n, mass: one of them is not 0; see above.
        scaling, window, sinks, sink_query, decode, visible: as in `reference.attention`.

    Returns:
        [R, Hq, D]; zeros for rows of context 0.
    """
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for row, context_len in enumerate(plan.context_lens[: len(query)].tolist()):
        if context_len == 0:
            continue
        table, num_heads = plan.block_tables[row], query.shape[1]
        index = torch.arange(context_len, device=query.device)
        if window or visible is not None:
            index = index[sees(index[-1:, None], index, window, sinks, visible)[0]]
        k = gather_heads(layer.k, layer.k_scale, table, index, num_heads, decode)  # [Hq, n, D]
        scores = (k * query[row].float()[:, None]).sum(-1)  # [Hq, n]; equal keys score equally, unlike in a product
        if sink_query is not None:
            scores = torch.where(index < sinks, (k * sink_query[row].float()[:, None]).sum(-1), scores)
        weights, order = (scores * scaling).softmax(-1).sort(dim=-1, descending=True, stable=True)

        kept = torch.zeros_like(weights, dtype=torch.bool)
        if mass:
            kept[:, 0] = True
            kept[:, 1:] = weights.cumsum(-1)[:, :-1] < mass  # the ones before it did not reach the bound
        else:
            kept[:, :top_n] = True
        weights = weights * kept
        reached = weights.sum(-1, keepdim=True)  # [Hq, 1]

        v = gather_heads(layer.v, layer.v_scale, table, index, num_heads, decode)
        v = v.gather(1, order[..., None].expand(-1, -1, v.shape[-1]))  # [Hq, n, D]
        total = (torch.where(kept, weights, 0)[:, None] @ v)[:, 0]
        out[row] = (total / reached if renormalise else total).to(out.dtype)

        dropped = (1 - reached).clamp(min=0).double()
        tally[0] += len(kept)
        tally[1:3] += torch.stack((kept.sum().double(), dropped.sum()))
        tally[3] = torch.maximum(tally[3], dropped.max())
    return out
