"""What goes into a runner and what comes out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from .sampling import SamplingParams


@dataclass
class Request:
    """What is asked for. `temperature` 0 is greedy; `n` samples share the prompt's blocks and differ in their seeds."""

    token_ids: Sequence[int]
    max_new_tokens: int = 64
    temperature: float = 0.0
    salt: str = ""  # tenants with different salts never share blocks
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    n: int = 1
    request_id: str | int | None = None  # its index in the list unless told

    @classmethod
    def of(cls, request: Request | Sequence[int], index: int) -> Request:
        """A request of its own from what the user gave, with an id, a seed and its tokens as an array."""
        request = request if isinstance(request, Request) else cls(request)
        ids = request.token_ids
        return replace(
            request,
            token_ids=np.array(ids.cpu() if torch.is_tensor(ids) else ids, dtype=np.int64),
            request_id=index if request.request_id is None else request.request_id,
            seed=random.getrandbits(32) if request.seed is None else request.seed,
        )

    def sampling(self, sample_index: int) -> SamplingParams:
        seed = self.seed + 0x9E3779B9 * sample_index
        return SamplingParams(self.temperature, self.top_k, self.top_p, seed)


@dataclass
class Timings:
    """Seconds, on the host's clock."""

    ttft: float = 0.0  # from submission to the first token
    itl: list[float] = field(default_factory=list)  # between one token and the next


@dataclass
class Result:
    """One sample of a request. `token_ids` are the new tokens, a stop token included."""

    request_id: str | int
    sample_index: int
    token_ids: list[int]
    num_cached_tokens: int
    finish_reason: str  # "stop" or "length"
    timings: Timings


@dataclass
class Event:
    """One new token. `result` comes with the last one."""

    request_id: str | int
    sample_index: int
    token_id: int
    result: Result | None = None


class Output:
    """The tokens of one sample as they become known."""

    def __init__(self, request: Request, sample_index: int, submitted: float):
        self.request = request
        self.sample_index = sample_index
        self.token_ids: list[int] = []
        self.num_cached_tokens = 0
        self.timings = Timings()
        self._last_time = submitted

    def receive(self, token: int, now: float) -> Event:
        """Take a token in; the event has a result if it was the last."""
        if self.token_ids:
            self.timings.itl.append(now - self._last_time)
        else:
            self.timings.ttft = now - self._last_time
        self._last_time = now
        self.token_ids.append(token)
        event = Event(self.request.request_id, self.sample_index, token)
        stopped = token in self.request.stop_token_ids
        if stopped or len(self.token_ids) >= self.request.max_new_tokens:
            event.result = Result(
                request_id=self.request.request_id,
                sample_index=self.sample_index,
                token_ids=self.token_ids,
                num_cached_tokens=self.num_cached_tokens,
                finish_reason="stop" if stopped else "length",
                timings=self.timings,
            )
        return event
