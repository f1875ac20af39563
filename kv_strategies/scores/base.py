"""What a score is, and what several of them need: the attention that the last queries of a row pay to its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Site

#: Attention weights that exist at once, of as many heads as that allows, one at least: 256 MB of them.
WEIGHTS_AT_ONCE = 1 << 26


class At(NamedTuple):
    """Where in the model, and in its row, a score is asked."""

    layer_idx: int
    position: int  # of the newest token, whose query is the last


class Score:
    """A number a token and head; the highest are kept. Tokens are never seen whole: a layer at a time."""

    #: How many queries it is given: the last of the row, as far as there are any, kept as attention passes. At most
    #: `step.plan.RING_SIZE`.
    num_queries = 0
    #: Whether it is given values.
    reads_values = False

    def bind(self, site: Site) -> None:
        """Called once. Raises ValueError where the score cannot serve such a model."""

    def num_recent(self, num_kept: int) -> int:
        """How many of the newest tokens are kept whatever their score, of `num_kept` in all."""
        return 0

    def score(self, keys: Tensor, values: Tensor | None, queries: Tensor | None, at: At) -> Tensor:
        """
        Args:
            keys: [Hkv, n, D] of any float dtype, rotated as they are stored, in the order of the tokens.
            values: [Hkv, n, D], or None unless `reads_values`.
            queries: [Hq, m, D] rotated, of the newest m tokens, the newest last; or None where `num_queries` is 0. The
                heads of a group lie next to each other.

        Returns:
            [Hkv, n]; infinity keeps a token for sure, and NaN is an error.
        """
        raise NotImplementedError


def attention_paid(keys: Tensor, queries: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """What the last m queries [Hq, m, D] pay to each key [Hkv, n, D]: causal softmax weights in float32, made one
    number a token by `reduce` [h, m, n] -> [h, n], which is called for some of the heads at a time. -> [Hq, n]
    """
    group, num_queries, head_dim = len(queries) // len(keys), *queries.shape[1:]
    index = torch.arange(keys.shape[1], device=keys.device)
    unseen = index > index[len(index) - num_queries :, None]  # [m, n]
    num_heads = max(1, WEIGHTS_AT_ONCE // max(1, group * unseen.numel()))
    paid = []
    for k, q in zip(keys.split(num_heads), queries.split(num_heads * group), strict=True):
        scores = q.float().unflatten(0, (len(k), group)).flatten(1, 2) @ k.float().mT  # [h, G * m, n]
        scores = scores.view(len(q), num_queries, -1) * head_dim**-0.5
        paid.append(reduce(scores.masked_fill_(unseen, float("-inf")).softmax(-1)))
    return torch.cat(paid)


def over_groups(per_head: Tensor, num_kv_heads: int) -> Tensor:
    """[Hq, n] -> [Hkv, n], the mean over the query heads of a group."""
    return per_head.unflatten(0, (num_kv_heads, -1)).mean(1)
