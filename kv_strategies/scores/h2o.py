"""h2o: heavy hitters, the few tokens that most attention went to (Zhang et al., NeurIPS 2023, arXiv 2306.14048).

    score = sum over the queries of softmax(q k / sqrt(D))

and of all tokens kept, half are the newest. The paper sums over all queries of the row. Attention kernels never hand
their weights out, so here the sum is over the last queries that are kept as attention passes (`step/rings.py`): the
whole prompt where it is no longer than that, its end otherwise. Costs one read of K, and as many rows of attention
weights for each head, some heads at a time.
"""

from __future__ import annotations

from torch import Tensor

from ..step.plan import RING_SIZE
from .base import At, Score, attention_paid, over_groups


class H2O(Score):
    num_queries, takes_layers = RING_SIZE, True

    def num_recent(self, num_kept: int) -> int:
        return num_kept // 2

    def score(self, keys: Tensor, values: None, queries: Tensor, at: At) -> Tensor:
        return over_groups(attention_paid(keys, queries, lambda weights: weights.sum(1)), len(keys))
