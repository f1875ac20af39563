"""Where two strategies first give different tokens, and whether rounding accounts for it.

Greedy tokens part where the two likeliest candidates are closer together than the arithmetic is exact. So at the first
token that differs this asks three things of a plain forward over the tokens that both agree on:

    margin      logit of A's token less that of B's, in the model's own dtype, through the native cache
    exact       the same margin in float32
    rounding    by how much the dtype moves the logits of the two: the largest |own dtype - float32| of them

If |exact| is at most 2 x rounding, either token may come out of exact mathematics done in that dtype. If it is more, a
strategy has changed the answer: a lossy one may; a lossless one has a fault.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .baseline import Baseline
from .runner import Runner
from .step.requests import Request
from .strategy import Strategy


@dataclass(frozen=True)
class Difference:
    """The first token at which two runs of one prompt part."""

    prompt: int  # index of the prompt
    token: int  # index among the new tokens
    tokens: tuple[int, int]  # of A and of B; -1 where one has ended
    margin: float  # logit of A's less that of B's, in the model's dtype
    exact: float  # in float32
    rounding: float  # what the dtype moves a logit by

    @property
    def is_rounding(self) -> bool:
        return abs(self.exact) <= 2 * self.rounding


def first_difference(
    a: Strategy | Baseline, b: Strategy | Baseline, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Difference | None:
    """Run the prompts through both, greedily; None where all tokens are the same."""
    requests = [Request(prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    runners = [Runner(s.model, s, warm_up=False) for s in (a, b)]
    ours, theirs = ([result.token_ids for result in runner.generate(requests)] for runner in runners)
    for index, (prompt, left, right) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if left == right:
            continue
        at = next((i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
        if at is None:  # one is the start of the other, which only an end that differs explains
            return Difference(index, min(len(left), len(right)), (-1, -1), 0.0, 0.0, 0.0)
        pair = left[at], right[at]
        own = _logits(a.model, [*prompt, *left[:at]])[list(pair)]
        exact = _logits(_in_float32(a.model), [*prompt, *left[:at]])[list(pair)]
        rounding = float((own - exact).abs().max())
        return Difference(index, at, pair, float(own[0] - own[1]), float(exact[0] - exact[1]), rounding)
    return None


@torch.inference_mode()
def _logits(model: LlamaForCausalLM, token_ids: list[int]) -> Tensor:
    """[V] float32 of the next token, without any cache."""
    ids = torch.tensor([token_ids], device=model.device)
    return model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()


def _in_float32(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return model if model.dtype == torch.float32 else copy.deepcopy(model).float()
