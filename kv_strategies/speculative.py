"""Speculative decoding: guess the next tokens, and let one forward say how many of the guesses are right.

    row        .. the cat sat on | the              a decode step reads all weights for one token
    proposal                     | the cat sat on   with guesses behind it, for several at the same reading
    drawn                        | cat sat down     the tokens that the model draws after each of them
    kept                         | cat sat down     up to the first that was not guessed; what is behind it is cut off

Lossless, greedy or sampled: what is kept are the tokens that plain decoding would have drawn, since a draw depends on
the logits, the seed and the number of the token alone. Where no guess is right a step still gives one token, and has
computed the others in vain. (Y. Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023;
A. Saxena, Prompt Lookup Decoding, 2023.)

    Runner(model, strategy, speculate=PromptLookup())
    Runner(model, strategy, speculate=DraftModel(Runner(draft, build("prefix", draft))))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .step.requests import Request, Result

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class Row(NamedTuple):
    """A sequence that is about to decode."""

    token_ids: np.ndarray  # [n] int32, prompt and output
    limit: int  # tokens that may be guessed at most
    salt: str


class Proposer(Protocol):
    """Guesses for each row, [up to its limit] int; none for no idea."""

    def check(self, model: LlamaForCausalLM) -> None:
        """Raises ValueError where it cannot guess for this model."""

    def propose(self, rows: Sequence[Row]) -> list[np.ndarray]: ...


class Drafts(Protocol):
    """A runner, as far as a draft model needs it."""

    model: LlamaForCausalLM
    max_context: int

    def generate(self, requests: Sequence[Request]) -> list[Result]: ...


class PromptLookup:
    """What followed the last time that the newest tokens occurred: for text that repeats or quotes its prompt.

    The longer the stretch that occurred before, the likelier is what followed: two tokens are guessed for each of it.

    Args:
        num_tokens: guesses a step at most.
        max_ngram: the longest stretch of newest tokens to look for; shorter ones are tried after it.
    """

    def __init__(self, num_tokens: int = 10, max_ngram: int = 3):
        if num_tokens < 1 or max_ngram < 1:
            raise ValueError(f"num_tokens and max_ngram must be at least 1, got {num_tokens} and {max_ngram}")
        self.num_tokens, self.max_ngram = num_tokens, max_ngram

    def check(self, model: LlamaForCausalLM) -> None:
        pass

    def propose(self, rows: Sequence[Row]) -> list[np.ndarray]:
        return [self._follow(row.token_ids, min(self.num_tokens, row.limit)) for row in rows]

    def _follow(self, tokens: np.ndarray, limit: int) -> np.ndarray:
        for size in range(min(self.max_ngram, len(tokens) - 1), 0, -1):
            found = np.flatnonzero((sliding_window_view(tokens[:-1], size) == tokens[-size:]).all(axis=1))
            if not len(found):
                continue
            end = int(found[-1]) + size
            while size < min(limit, end) and tokens[end - size - 1] == tokens[-size - 1]:
                size += 1
            return tokens[end : end + max(0, min(limit, 2 * size))]
        return tokens[:0]


class DraftModel:
    """What a smaller model of the same vocabulary would say.

    Args:
        runner: of the draft model; with a strategy that shares prefixes it computes only what is new to it.
        num_tokens: guesses a step at most.
    """

    def __init__(self, runner: Drafts, num_tokens: int = 4):
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        self.runner, self.num_tokens = runner, num_tokens

    def check(self, model: LlamaForCausalLM) -> None:
        own, wanted = self.runner.model.config.vocab_size, model.config.vocab_size
        if own != wanted:
            raise ValueError(f"a draft model must have the model's vocabulary of {wanted} tokens; this one has {own}")

    def propose(self, rows: Sequence[Row]) -> list[np.ndarray]:
        requests = {
            index: Request(row.token_ids, count, salt=row.salt, stop_token_ids=())
            for index, row in enumerate(rows)
            if (count := min(self.num_tokens, row.limit, self.runner.max_context - len(row.token_ids))) > 0
        }
        results = self.runner.generate(list(requests.values()))
        found = {index: result.token_ids for index, result in zip(requests, results, strict=True)}
        return [np.array(found.get(index, []), dtype=np.int32) for index in range(len(rows))]
