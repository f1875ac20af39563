"""Shards: what a rank holds of a model's weights, as upstream's tensor parallelism leaves them.

A sharded parameter is a DTensor, whose local part is this rank's rows (q, k, v, gate, up, the head, an embedding) or
columns (o, down); the others are whole on every rank. Upstream's modules have a `forward` around their own that does
what lies between (`tp_forward`); whoever reads the local parts does that by itself (`fused.py`).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from .ranks import Ranks
from .upstream import CACHE

_STYLES = "transformers.distributed.tensor_parallel"
_FORWARD = "TensorParallelLayer.install_forward.<locals>.tp_forward"


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here: all of it unless it is sharded."""
    return getattr(tensor, "_local_tensor", tensor)


def sharded_dim(tensor: Tensor | None) -> int | None:
    """The dimension over which a tensor is spread; None where it is whole."""
    placements = getattr(tensor, "placements", ())
    return next((placement.dim for placement in placements if placement.is_shard()), None)


def check_heads(config: LlamaConfig, num_ranks: int) -> None:
    """Raises ValueError where ranks cannot hold equally many heads of K and V each."""
    heads = config.num_key_value_heads
    if heads % num_ranks:
        fits = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise ValueError(
            f"{num_ranks} ranks cannot share the {heads} KV heads of this model evenly: start as many as divide them "
            f"({fits}), as in torchrun --nproc-per-node {heads}"
        )


def own_forward(module: nn.Module):
    """What has taken the place of the forward of a module's class; None for nothing, or for upstream's tensor
    parallelism around it.
    """
    forward = vars(module).get("forward")
    if getattr(forward, "__module__", None) == _STYLES and getattr(forward, "__qualname__", None) == _FORWARD:
        return None
    return forward


def announce_forwards(model: LlamaForCausalLM) -> None:
    """From here on a cache with `announce` is told of every forward before its tokens are embedded: where the table is
    spread over ranks they work together on that already, which those that disagree must not.
    """
    hooks = model.model._forward_pre_hooks
    if _announce not in hooks.values():
        model.model.register_forward_pre_hook(_announce, with_kwargs=True)


def _announce(module: LlamaModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    cache, input_ids = kwargs.get(CACHE), kwargs.get("input_ids")
    if not hasattr(cache, "announce"):
        return None
    cache.announce(input_ids)
    if input_ids is None:
        return None
    ranks = cache.strategy.ranks
    with ranks.together():
        states = embed(module.embed_tokens, input_ids, ranks)
    return args, kwargs | {"input_ids": None, "inputs_embeds": states}


def embed(module: nn.Embedding, input_ids: Tensor, ranks: Ranks) -> Tensor:
    """[.., n] -> [.., n, hidden], the table whole or its rows spread over ranks."""
    is_plain = type(module) is nn.Embedding and not (module._forward_pre_hooks or module._forward_hooks)
    if sharded_dim(module.weight) != 0 or not is_plain or own_forward(module) is not None:
        return module(input_ids)
    rows = local(module.weight)
    first = ranks.rank * -(-len(module.weight) // ranks.size)  # as `torch.chunk` splits
    own = input_ids - first
    is_elsewhere = (own < 0) | (own >= len(rows))
    found = F.embedding(own.masked_fill(is_elsewhere, 0), rows)
    return ranks.add(found.masked_fill(is_elsewhere[..., None], 0))
