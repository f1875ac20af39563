"""From logits to the next token, on the device, every row by its own rules and its own seed.

Sampling uses the Gumbel-max trick: argmax(logits / temperature + Gumbel noise) is a sample of the softmax. The noise
is a hash of (seed, step, token id), not the state of a generator, so a row draws the same token whatever batch it is
in, and again after a preemption.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def sample(logits: Tensor, params: list[SamplingParams], steps: list[int]) -> Tensor:
    """One token a row.

    Args:
        logits: [R, V], any float dtype.
        params, steps: [R]; `steps` counts the tokens a row has drawn so far.

    Returns:
        [R] int64; -1 for a row whose logits are not numbers
    """
    if all(p.temperature == 0 for p in params):
        return greedy(logits)
    scores = warp(logits, params)
    device = scores.device
    keys = to_device([_mix(_mix(p.seed) ^ step) for p, step in zip(params, steps, strict=True)], device)
    drawn = (scores + _gumbel(keys, scores.shape[-1])).argmax(dim=-1)
    best = greedy(logits)
    is_greedy = to_device([p.temperature == 0 for p in params], device)
    return torch.where(is_greedy | (best < 0), best, drawn)


def warp(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """The scores [R, V] float32 whose softmax a row is drawn from; those of a greedy row are its logits."""
    logits = logits.float()
    if all(p.temperature == 0 for p in params):
        return logits
    device, size = logits.device, logits.shape[-1]
    scores = logits / to_device([p.temperature or 1.0 for p in params], device)[:, None]
    if any(p.temperature and (p.top_k or p.top_p < 1) for p in params):
        top_k = to_device([p.top_k if p.top_k and p.temperature else size for p in params], device)[:, None]
        top_p = to_device([p.top_p if p.temperature else 1.0 for p in params], device)[:, None]
        scores = _keep_top(scores, top_k, top_p)
    return scores


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, [R, V] -> [R]; -1 where the logits are NaN or infinite."""
    tokens = logits.argmax(dim=-1, keepdim=True)  # of a NaN, where there is one
    return torch.where(logits.gather(1, tokens).isfinite(), tokens, -1)[:, 0]


def to_device(values: list, device: torch.device) -> Tensor:
    """A list of numbers as a tensor. The host does not wait for the device, as `torch.tensor` would make it."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)


def _keep_top(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf for all but the k best tokens, and of those all but the fewest whose probability reaches p."""
    ordered, order = scores.sort(dim=-1, descending=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    ordered = ordered.masked_fill(ranks >= top_k, -torch.inf)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    # Of a row that keeps all, rounding must not take the last one away: its neighbours may keep fewer.
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1) & (ranks > 0), -torch.inf)
    return torch.empty_like(scores).scatter_(-1, order, ordered)


def _gumbel(keys: Tensor, size: int) -> Tensor:
    """[R, size] Gumbel noise, a function of the row's 32-bit key and the column."""
    columns = torch.arange(size, device=keys.device) * 0x9E3779B1 & 0xFFFFFFFF
    bits = _mix(keys[:, None] ^ columns)
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # 23 bits: neither 0 nor 1 in float32
    return -torch.log(-torch.log(uniform))


def _mix(x):
    """The finaliser of MurmurHash3 (32 bits), on an integer or an int64 tensor of values below 2**32."""
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)
