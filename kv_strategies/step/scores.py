"""What a request asks of its logits beyond a draw: that they are changed before it, and what they were.

    logits -> tokens that may not come yet -> logits processors -> temperature, top-k, top-p (`sampling.py`) -> a token
                                                                                                  `-> log probabilities

The order is that of `generate()`, and so are the numbers: log probabilities are of the distribution that the token was
drawn from. Nothing here runs for rows that ask for nothing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .sampling import to_device

#: What user code raises to stop more than its own request. All else, whatever it derives from, ends that alone.
STOPS_ALL = (KeyboardInterrupt, SystemExit, GeneratorExit)
_log = logging.getLogger(__name__)


class Shaping(NamedTuple):
    """What changes the logits of one row."""

    forbidden: Sequence[int]  # tokens that may not be drawn yet
    processors: LogitsProcessorList
    name: str  # of the request, for who reads a warning
    token_ids: Callable[[], Sequence[int]]  # of prompt and output, read only where there are processors


def shape(logits: Tensor, rows: Mapping[int, Shaping]) -> Tensor:
    """Logits [R, V] -> scores [R, V] float32, a copy: these rows are changed and the others are not. A row whose
    processors fail gets NaN, which ends its request and nobody else's, after a warning.
    """
    scores = logits.to(torch.float32, copy=True)
    for row, (forbidden, processors, name, token_ids) in rows.items():
        if forbidden:
            scores[row, to_device(list(forbidden), scores.device)] = -torch.inf
        if processors:
            input_ids = torch.tensor(token_ids(), dtype=torch.int64, device=scores.device)[None]
            try:
                scores[row] = _processed(processors, input_ids, scores[row : row + 1].clone())
            except STOPS_ALL:
                raise
            except BaseException as error:
                warn_of_error(name, "a logits processor", error)
                scores[row] = torch.nan
    return scores


def _processed(processors: LogitsProcessorList, input_ids: Tensor, scores: Tensor) -> Tensor:
    """Scores [1, V] -> [V]."""
    found = processors(input_ids, scores)
    if not torch.is_tensor(found) or found.shape != scores.shape:
        got = list(found.shape) if torch.is_tensor(found) else type(found).__name__
        raise ValueError(f"it is to give scores {list(scores.shape)}, and gave {got}")
    return found[0]


def warn_of_error(name: str, what: str, error: BaseException) -> None:
    """What a request has brought along has failed: the request ends, and others go on."""
    warn(f"{name} ends with an error: {what} has failed ({type(error).__name__}: {error})")


def warn(text: str) -> None:
    """A warning in the middle of a step. Where warnings are made errors it is logged: a step of many requests does not
    end for one of them.
    """
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        _log.warning(text)


class Logprobs(NamedTuple):
    """Log probabilities of R draws, on the device or on the host: the token first, then the k likeliest."""

    ids: Tensor  # [R, 1 + k] int64
    values: Tensor  # [R, 1 + k] float32

    def row(self, index: int, k: int) -> dict[int, float]:
        """Of one draw, the token and its k likeliest, those of probability 0 left out."""
        ids, values = self.ids[index, : 1 + k].tolist(), self.values[index, : 1 + k].tolist()
        return {token: value for token, value in zip(ids, values, strict=True) if value != -torch.inf}


def logprobs(scores: Tensor, tokens: Tensor, k: int) -> Logprobs:
    """Log probabilities of `tokens` [R], and of the k likeliest (or all V), under scores [R, V]."""
    values = scores.float().log_softmax(dim=-1)
    top, ids = values.topk(min(k, values.shape[-1]), dim=-1)
    chosen = tokens.clamp(min=0)[:, None]  # of a row that has failed any will do
    return Logprobs(torch.cat([chosen, ids], dim=1), torch.cat([values.gather(1, chosen), top], dim=1))
