"""snapkv: what the end of the prompt looks at, the answer will look at, too (Li et al., NeurIPS 2024, 2404.14469).

    votes = sum over the last `window` queries of softmax(q k / sqrt(D))        the observation window
    score = the most votes among `kernel` neighbours                            what stands together stays together

The window itself is always kept; window, kernel and the maximum are those of the paper's LongBench runs. The query
heads of a group vote together. Costs one read of K, and `window` rows of attention weights for each head, some heads at
a time.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from .base import At, Score, attention_paid, over_groups


class SnapKV(Score):
    takes_layers = True

    def __init__(self, window: int = 32, kernel: int = 7):
        self.num_queries, self.kernel = window, kernel

    def num_recent(self, num_kept: int) -> int:
        return self.num_queries

    def score(self, keys: Tensor, values: None, queries: Tensor, at: At) -> Tensor:
        num_older = keys.shape[1] - queries.shape[1]
        paid = attention_paid(keys, queries, lambda weights: weights.sum(1))
        votes = over_groups(paid[:, :num_older], len(keys))  # [Hkv, older]
        if num_older:
            votes = max_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return pad(votes, (0, queries.shape[1]))
