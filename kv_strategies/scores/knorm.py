"""knorm: keys of small norm draw attention (Devoto et al., EMNLP 2024, arXiv 2406.11430).

    score = - || k ||

Needs nothing but K: no query, no attention weight. Costs one read of K. The paper finds it best with the first layers
left whole, which equally many tokens in all layers do not allow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import At, Score


class KNorm(Score):
    takes_layers = True

    def score(self, keys: Tensor, values: None, queries: None, at: At) -> Tensor:
        return -torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)

    def num_bytes(self, num_keys: int, num_tokens: int, group: int, head_dim: int) -> int:
        return 0  # a GPU takes the norm of 16 bits as they are; a CPU, which is not planned for, copies them
