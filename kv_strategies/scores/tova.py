"""tova: drop what the newest token looks at least (Oren et al., EMNLP 2024, arXiv 2401.06104).

    score = mean over all query heads of softmax(q k / sqrt(D)) of the last query

A transformer with a bounded cache is a recurrent one with as many states; which state to drop, the last query says. The
heads of a layer decide together, so all of them keep the same tokens. The newest is kept. Costs one read of K.
"""

from __future__ import annotations

from torch import Tensor

from .base import At, Score, attention_paid


class Tova(Score):
    num_queries, takes_layers = 1, True

    def num_recent(self, num_kept: int) -> int:
        return 1

    def score(self, keys: Tensor, values: None, queries: Tensor, at: At) -> Tensor:
        paid = attention_paid(keys, queries, lambda weights: weights.mean(1))  # of one query
        of_layer = paid.unflatten(0, (at.num_layers, -1)).mean(1)  # [l, n]
        return of_layer.repeat_interleave(len(keys) // at.num_layers, 0)
