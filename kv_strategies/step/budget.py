"""The token budget of a step: how many tokens of prompts go beside decoding rows, whose next tokens wait for them.

A chunk of a prompt in a step is a long pause for all who decode. With a target for that pause, the inter-token latency
(ITL), prompts get what is left of it:

    seconds of a step = those of the decoding rows + tokens of prompts * seconds a token
    budget            = (target - those of the decoding rows) / seconds a token

Both are medians of recent steps: one in which a kernel was compiled, or the caller slept, says little, and is soon
forgotten. What a token costs is taken from the largest of them, since a few tokens beside many rows cost next to
nothing, or mostly the launch. For the same reason a step has no more than twice the tokens of those seen.

A step is timed by the host: from when the tokens of the step before were read, or from its own launch if that is later,
until its tokens are read. Nothing waits for the device that would not without it. (Sarathi-Serve, arXiv 2403.02310,
sets such a budget once, by profiling.)
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

from .checked import checked


class Work(NamedTuple):
    """What a step was launched to do, and when."""

    num_decoding: int  # rows whose next tokens somebody waits for
    num_tokens: int  # of prompts
    launched: float  # seconds


class TokenBudget:
    """Learns what steps cost, and says how many tokens of prompts the next one may have.

    Args:
        target_itl: seconds; None for no limit.
        least: tokens, so that prompts advance whatever the target.

    Raises:
        ValueError: a target that no step can meet.
    """

    def __init__(self, target_itl: float | None, least: int):
        self.target_itl, self._least = checked("target_itl", target_itl, float | None), least
        if self.target_itl is not None and not 0 < self.target_itl < float("inf"):
            raise ValueError(f"target_itl must be more than 0 seconds, and finite, got {target_itl}")
        self._last_read = 0.0
        self._decoding: deque[float] = deque(maxlen=16)  # seconds of steps without prompts
        self._prefilling: deque[tuple[Work, float]] = deque(maxlen=8)  # the others, and their seconds

    def learn(self, work: Work, read: float) -> None:
        """The tokens of a step were read; steps in the order of their launches."""
        seconds = read - max(work.launched, self._last_read)
        self._last_read = read
        if work.num_tokens:
            self._prefilling.append((work, seconds))
        else:
            self._decoding.append(seconds)

    def end_of(self, work: Work) -> float:
        """When the tokens of a step without prompts that was launched last can be there at the earliest: of the recent
        ones the shortest is the guide. Its launch, where nothing is known.
        """
        return max(work.launched, self._last_read) + min(self._decoding, default=-math.inf)

    def within(self, num_tokens: int) -> int:
        """Of so many tokens of prompts that a step has room for, how many are to go beside decoding rows."""
        if self.target_itl is None:
            return num_tokens
        return min(num_tokens, max(self._least, self._limit()))

    def _limit(self) -> int:
        """With so many a step is expected to meet the target; 0 where nothing is known of prompts, or none would."""
        if not self._prefilling:
            return 0
        decoding = median(self._decoding) if self._decoding else 0.0
        largest = max(work.num_tokens for work, _ in self._prefilling)
        per_token = median(
            (seconds - decoding * bool(work.num_decoding)) / work.num_tokens
            for work, seconds in self._prefilling
            if 2 * work.num_tokens >= largest
        )
        return int(min(2 * largest, (self.target_itl - decoding) / max(per_token, 1e-9)))
