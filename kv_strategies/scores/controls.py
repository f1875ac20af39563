"""Controls: what a score has to beat, since neither looks at K, V or queries.

random    any tokens
window    the first `sinks` and the newest (StreamingLLM; Xiao et al., ICLR 2024, arXiv 2309.17453), in all heads
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import At, Score


class _Control(Score):
    def num_bytes(self, num_keys: int, num_tokens: int, group: int, head_dim: int) -> int:
        return 4 * num_keys  # the score


class Random(_Control):
    def score(self, keys: Tensor, values: None, queries: None, at: At) -> Tensor:
        """The same for the same token of the same layer, so that a row computed again keeps what it kept."""
        generator = torch.Generator(keys.device).manual_seed(at.position << 16 | at.layer_idx)
        return torch.rand(keys.shape[:2], generator=generator, device=keys.device)


class Recent(_Control):
    takes_layers = True

    def __init__(self, sinks: int = 4):
        self.sinks = sinks

    def score(self, keys: Tensor, values: None, queries: None, at: At) -> Tensor:
        index = torch.arange(keys.shape[1], device=keys.device, dtype=torch.float32)
        return torch.where(index < self.sinks, float("inf"), index).expand(keys.shape[:2])
