"""keydiff: keys unlike the others are worth keeping (Park et al., NeurIPS 2025, arXiv 2504.15364).

    score = - cos(k, anchor)    with    anchor = mean over the tokens of k / || k ||

What all keys have in common says nothing; a key that points elsewhere holds what no other does. Needs no query, so a
prompt may be cut anywhere, and no later question is guessed. Costs two reads of K.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from .base import At, Score


class KeyDiff(Score):
    takes_layers = True

    def score(self, keys: Tensor, values: None, queries: None, at: At) -> Tensor:
        keys = keys.float()
        anchor = normalize(keys, dim=-1).mean(1, keepdim=True)  # [Hkv, 1, D]
        return -cosine_similarity(keys, anchor, dim=-1)

    def num_bytes(self, num_keys: int, num_tokens: int, group: int, head_dim: int) -> int:
        return 4 * super().num_bytes(num_keys, num_tokens, group, head_dim)  # and what a cosine makes of both sides
