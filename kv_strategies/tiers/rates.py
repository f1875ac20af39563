"""How fast this machine moves bytes and computes tokens, learnt while it runs: what decides whether a fetch pays."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..step.plan import Plan
from .transfer import Lane, Mark

#: Fewer new tokens say little about how fast a prompt is computed.
_MIN_TIMED_TOKENS = 32


class Rate:
    """Units a second, learnt: recent measurements count more."""

    def __init__(self) -> None:
        self._seconds_per_unit: float | None = None

    def learn(self, units: float, seconds: float) -> None:
        if units > 0 and seconds > 0:
            new, old = seconds / units, self._seconds_per_unit
            self._seconds_per_unit = new if old is None else 0.8 * old + 0.2 * new

    def seconds(self, units: float) -> float:
        """0 where nothing is known yet."""
        return units * (self._seconds_per_unit or 0.0)

    @property
    def value(self) -> float | None:
        return None if self._seconds_per_unit is None else 1 / self._seconds_per_unit


@dataclass
class Rates:
    """What this machine does a second, as measured while it runs: bytes moved, tokens computed.

    Args:
        decide: whether they say what pays; else fetching always does, for ranks that have to decide alike and measure
            each for itself.
    """

    decide: bool = True
    down: Rate = field(default_factory=Rate)
    up: Rate = field(default_factory=Rate)
    disk_read: Rate = field(default_factory=Rate)
    disk_write: Rate = field(default_factory=Rate)
    prefill: Rate = field(default_factory=Rate)

    def seconds_saved(self, num_bytes: int, num_tokens: int, *, on_disk: bool) -> float:
        """By fetching a block and not computing it; below 0 where computing is faster. Unmeasured, fetching wins."""
        if self.prefill.value is None or not self.decide:
            return 1e-9
        fetch = self.up.seconds(num_bytes) + (self.disk_read.seconds(num_bytes) if on_disk else 0.0)
        return self.prefill.seconds(num_tokens) - fetch

    def stats(self) -> dict[str, float | None]:
        return {name: rate.value for name, rate in vars(self).items() if isinstance(rate, Rate)}


class PrefillClock:
    """How fast prompts are computed: the time from the first layer's attention to the last's, over their tokens."""

    def __init__(self, rate: Rate, layer_devices: Sequence[torch.device]):
        self._rate, self._last_layer = rate, len(layer_devices) - 1
        self._first, self._last = (Lane(device, main=True) for device in (layer_devices[0], layer_devices[-1]))
        # Times of two devices cannot be compared: a lane beside the first one's waits for the last.
        self._end = self._last if self._first.device == self._last.device else Lane(self._first.device)
        self._began: tuple[Mark, float] | None = None
        self._timed: deque[tuple[int, Mark, Mark]] = deque()

    def open(self, layer_idx: int, plan: Plan) -> None:
        if layer_idx == 0:
            is_prompt = plan.num_tokens - plan.num_decodes >= _MIN_TIMED_TOKENS
            self._began = (self._first.mark(timed=True), time.perf_counter()) if is_prompt else None

    def close(self, layer_idx: int, plan: Plan) -> None:
        if layer_idx != self._last_layer or self._began is None:
            return
        (mark, began), self._began = self._began, None
        if mark is None:
            self._rate.learn(plan.num_tokens, time.perf_counter() - began)
            return
        self._end.wait(self._last.mark())
        self._timed.append((plan.num_tokens, mark, self._end.mark(timed=True)))
        while self._timed[0][2].query():
            num_tokens, mark, end = self._timed.popleft()
            self._rate.learn(num_tokens, mark.elapsed_time(end) / 1e3)
            if not self._timed:
                break
