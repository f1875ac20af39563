"""A launched step, and the way of its tokens to the host: a copy that nobody waits for until the tokens are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .sequences import ActiveSequence
from .step.budget import Work
from .step.scores import Logprobs


class Found(NamedTuple):
    """What a step has found, on the host."""

    drawn: list[list[tuple[int, dict[int, float] | None]]]  # of each sequence its tokens, with log probabilities
    scored: list[tuple[ActiveSequence, list[dict[int, float]]]]  # log probabilities of prompts


@dataclass
class LaunchedStep:
    """A launched forward: which sequences drew a token, and where the tokens will be."""

    sequences: list[ActiveSequence]
    proposals: list[np.ndarray]  # what each of them was fed behind its newest token; it drew a token for each of these
    is_awaited: bool  # tokens are the first of their requests, or the next step needs them on the host: read at once
    work: Work  # what it was to do, for who learns what that takes
    has_first: bool  # a first token of a request is among them, perhaps beside others
    scoring: list[ActiveSequence]  # whose prompts were scored
    on_host: list[Tensor | Logprobs | None]  # tokens, log probabilities of those who asked, of each that was scored
    ready: torch.cuda.Event | None

    @property
    def is_done(self) -> bool:
        """Whether nobody has to wait for its tokens any more."""
        return self.ready is None or self.ready.query()

    def read(self) -> Found:
        """Wait for the tokens. Changes nothing, so that it can be called again where it raises."""
        if self.ready is not None:
            self.ready.synchronize()
        tokens = [] if self.on_host[0] is None else self.on_host[0].tolist()
        drawn = zip(tokens, self._logprobs(), strict=True)
        return Found([list(islice(drawn, 1 + len(proposal))) for proposal in self.proposals], list(self._scored()))

    def _logprobs(self) -> Iterator[dict[int, float] | None]:
        """Of each token, None where they are not asked for."""
        rows = count()
        for seq, proposal in zip(self.sequences, self.proposals, strict=True):
            k = seq.request.logprobs
            for _ in range(1 + len(proposal)):
                yield None if k is None else self.on_host[1].row(next(rows), k)

    def _scored(self) -> Iterator[tuple[ActiveSequence, list[dict[int, float]]]]:
        for seq, part in zip(self.scoring, self.on_host[2:], strict=True):
            yield seq, [part.row(row, seq.request.prompt_logprobs) for row in range(len(part.ids))]


def start_copy(
    parts: list[Tensor | Logprobs | None], device: torch.device
) -> tuple[list[Tensor | Logprobs | None], torch.cuda.Event | None]:
    """Bring them to the host, without waiting; and what to wait for."""
    if device.type != "cuda":
        return parts, None
    on_host = [Logprobs(*map(_to_host, part)) if isinstance(part, Logprobs) else _to_host(part) for part in parts]
    ready = torch.cuda.Event()
    ready.record()
    return on_host, ready


def _to_host(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return on_host.copy_(tensor, non_blocking=True)
