"""When does a figure mean something? Where the exact cache can do the task, and with an interval beside it.

A loss cannot be seen where there is nothing to lose. So a task is made easier, level by level, until the exact
baseline has `NEEDED` of some samples right. Then others are measured, drawn anew, since those that chose the level
flatter it; and the task counts where the baseline reaches `NEEDED` of these as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

NEEDED = 0.8
_Z = 1.959964  # the normal distribution's 97.5 % quantile


def counts(right: Sequence[bool]) -> bool:
    """Whether a baseline that has these right can do the task."""
    return sum(right) >= NEEDED * len(right) > 0


def level_for(levels: Sequence[dict], attempt: Callable[[dict], Sequence[bool]]) -> dict | None:
    """The first level, the hardest comes first, that `attempt` can do; None where it can do none."""
    return next((level for level in levels if counts(attempt(level))), None)


def interval(right: int, count: int) -> tuple[float, float]:
    """95 % of a share, by Wilson's score (E. B. Wilson, JASA 22, 1927): holds for few samples and near 0 and 1."""
    share, z2 = right / count, _Z**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)
