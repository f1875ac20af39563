"""What a score is, and what several of them need: the attention that the last queries of a row pay to its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Site

#: What a score makes of keys and queries exists for so many pairs of them at once, of as many heads as that allows, one
#: at least: 128 MB, and once more while a softmax is taken of it.
WEIGHTS_AT_ONCE = 1 << 25


class At(NamedTuple):
    """Where in the model, and in its row, a score is asked."""

    layer_idx: int  # the first of them
    position: int  # of the newest token, whose query is the last
    num_layers: int = 1


class Score:
    """A number a token and head; the highest are kept. Tokens are never seen whole: a layer at a time, or a few."""

    #: How many queries it is given: the last of the row, as far as there are any, kept as attention passes. At most
    #: `step.plan.RING_SIZE`, and of a row that was compacted those since, and of its newest tokens then (`num_recent`).
    num_queries = 0
    #: Whether it is given values.
    reads_values = False
    #: Whether it may be given `at.num_layers` layers at once, one behind the other, as if one layer had so many heads:
    #: fewer operators, where a head is scored alone. Else a layer at a time.
    takes_layers = False

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

    def num_bytes(self, num_keys: int, num_tokens: int, group: int, head_dim: int) -> int:
        """Bytes that `score` takes at most beside what it is given, for who plans ahead: more for more tokens.

        Here: without queries a copy of the keys in float32. With queries what is taken of some heads at a time, which
        is what they pay to the keys, and then either such a copy or, while a softmax is taken, as much again.

        Args:
            num_keys: of all heads that are given at once, `num_tokens` of each; group: query heads a KV head.
        """
        if not self.num_queries:
            return 4 * num_keys * head_dim
        pairs = group * self.num_queries  # of a key
        weights = min(num_keys, max(WEIGHTS_AT_ONCE // pairs, num_tokens)) * pairs
        return 4 * (weights + max(weights, weights // pairs * head_dim))


def attention_paid(keys: Tensor, queries: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """What the last m queries [Hq, m, D] pay to each key [Hkv, n, D]: causal softmax weights in float32, made one
    number a token by `reduce` [h, m, n] -> [h, n], which is called for some of the heads at a time. -> [Hq, n]
    """
    group = len(queries) // len(keys)
    num_heads = heads_at_once(group * queries.shape[1] * keys.shape[1])
    heads = zip(keys.split(num_heads), queries.split(num_heads * group), strict=True)
    return torch.cat([reduce(_weights(k, q)) for k, q in heads])


def _weights(keys: Tensor, queries: Tensor) -> Tensor:
    """Of some heads, [Hq, m, n] float32. What it takes on its way is given back before the next heads come."""
    group, num_queries, head_dim = len(queries) // len(keys), *queries.shape[1:]
    num_tokens = keys.shape[1]
    unseen = torch.ones(num_queries, num_queries, dtype=torch.bool, device=keys.device).triu_(1)  # of the last m
    queries = queries.float() * head_dim**-0.5
    scores = queries.unflatten(0, (len(keys), group)).flatten(1, 2) @ keys.float().mT  # [h, G * m, n]
    scores = scores.view(len(queries), num_queries, num_tokens)
    scores[..., num_tokens - num_queries :].masked_fill_(unseen, float("-inf"))
    return scores.softmax(-1)


def heads_at_once(num_pairs: int) -> int:
    """Of how many heads to look at keys and queries at once, which have so many pairs of them each."""
    return max(1, WEIGHTS_AT_ONCE // max(1, num_pairs))


def over_groups(per_head: Tensor, num_kv_heads: int) -> Tensor:
    """[Hq, n] -> [Hkv, n], the mean over the query heads of a group."""
    return per_head.unflatten(0, (num_kv_heads, -1)).mean(1)
