"""expected: the attention that later queries will pay, in expectation (Devoto et al., 2025, arXiv 2510.00636).

Queries are about normal, q ~ N(mu, S) before they are rotated. What comes next stands at positions p + 1 to
p + `future`; with R the mean of those rotations, a later query is N(R mu, R S R'), and exp(q k) is in expectation, in
closed form:

    z     = exp(k R mu / sqrt(D) + k R S R' k / 2D)          the expected unnormalised weight of a token
    score = (z / sum of z + `epsilon`) * || v ||             and what it would add to the output

The first `sinks` tokens are kept. mu and S are of the last queries that are kept as attention passes, turned back to
position 0; the paper takes those of the whole prompt, and || W_o v ||, with the output weights, in place of || v ||.
Costs one read of K and V, and a product of K with these queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Site
from ..step.plan import RING_SIZE
from .base import At, Score, heads_at_once


class ExpectedAttention(Score):
    num_queries, reads_values, takes_layers = RING_SIZE, True, True

    def __init__(self, future: int = 512, sinks: int = 4, epsilon: float = 0.02):
        self.future, self.sinks, self.epsilon = future, sinks, epsilon

    def bind(self, site: Site) -> None:
        self._rotary_emb = site.rotary_emb

    def score(self, keys: Tensor, values: Tensor, queries: Tensor, at: At) -> Tensor:
        positions = torch.arange(at.position + 1 - queries.shape[1], at.position + 1, device=queries.device)
        cos, sin = self._angles(positions)
        plain = turn(queries.float(), cos, -sin)  # [Hq, m, D]
        ahead = self._angles(at.position + 1 + torch.arange(self.future, device=queries.device))
        later = turn(plain, *(part.mean(0) for part in ahead))  # R q, since the mean of rotations is linear
        mean = later.mean(1)  # [Hq, D]
        spread = later - mean[:, None]  # [Hq, m, D]
        num_heads = heads_at_once(queries[..., 0].numel() // len(keys) * keys.shape[1])
        parts = keys, *(part.unflatten(0, (len(keys), -1)) for part in (mean, spread))
        heads = zip(*(part.split(num_heads) for part in parts), strict=True)
        weight = torch.cat([expected_weight(*some) for some in heads])  # [Hkv, n]
        score = (weight + self.epsilon) * torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
        score[:, : self.sinks] = float("inf")
        return score

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [p, D / 2] float32 of turning to each position [p]."""
        angles = positions[:, None] * self._rotary_emb.inv_freq.to(positions.device, torch.float32)
        return angles.cos(), angles.sin()


def expected_weight(keys: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """z / sum of z [h, n] of some heads [h, n, D], the mean over their groups of G query heads, with means [h, G, D]
    and differences of m queries from them [h, G, m, D].
    """
    keys, head_dim = keys.float(), keys.shape[2]
    z = keys @ mean.mT * head_dim**-0.5  # [h, n, G]
    products = (keys @ spread.flatten(1, 2).mT).unflatten(2, spread.shape[1:3])  # [h, n, G, m]
    z += products.square_().mean(3) / (2 * head_dim)  # k S k' is the mean of (k s)^2
    return z.softmax(1).mean(2)


def turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries [.., D] by cos and sin [.., D / 2], in the pairs of Transformers' Llama: i and i + D / 2."""
    first, second = states.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
