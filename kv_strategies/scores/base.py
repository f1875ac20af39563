"""What a score is, and what several of them need: the attention that the last queries of a row pay to its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Site


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


def attention_paid(keys: Tensor, queries: Tensor) -> Tensor:
    """Softmax weights [Hq, m, n] float32 of the last m queries [Hq, m, D] over all keys [Hkv, n, D], causal."""
    num_heads, num_queries, head_dim = queries.shape
    num_tokens = keys.shape[1]
    grouped = queries.float().unflatten(0, (len(keys), -1)).flatten(1, 2)  # [Hkv, G * m, D]
    scores = (grouped @ keys.float().mT).view(num_heads, num_queries, num_tokens) * head_dim**-0.5
    index = torch.arange(num_tokens, device=keys.device)
    unseen = index > index[num_tokens - num_queries :, None]  # [m, n]
    return scores.masked_fill_(unseen, float("-inf")).softmax(-1)


def over_groups(per_head: Tensor, num_kv_heads: int) -> Tensor:
    """[Hq, n] -> [Hkv, n], the mean over the query heads of a group."""
    return per_head.unflatten(0, (num_kv_heads, -1)).mean(1)
