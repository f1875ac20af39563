"""Scores: how much is a token worth to a head that may keep only some?

A score is one class with one method, from what a head has stored to a number a token; the highest are kept. A file
each, beside its paper. One from outside is a class and a registration (`docs/adding-a-score.md`):

    class Largest(Score):
        def score(self, keys, values, queries, at):
            return keys.abs().amax(-1)

    register_score("largest", Largest)
    build("evict", model, score="largest", keep=0.5)

Shapes: n tokens stored of one row, m of its last queries, Hq query heads in groups over Hkv heads of K and V, D numbers
a head.
"""

from __future__ import annotations

from collections.abc import Callable

from .base import At, Score
from .controls import Random, Recent
from .expected import ExpectedAttention
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import KNorm
from .snapkv import SnapKV
from .tova import Tova

__all__ = ["SCORES", "At", "Score", "register_score"]

SCORES: dict[str, Callable[[], Score]] = {
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "snapkv": SnapKV,
    "tova": Tova,
    "expected": ExpectedAttention,
    "h2o": H2O,
    "random": Random,
    "window": Recent,
}


def register_score(name: str, make: Callable[[], Score]) -> None:
    """Add a score from outside, for this process.

    Raises:
        ValueError: the name is taken or no name.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a score needs a name, got {name!r}")
    if name in SCORES:
        raise ValueError(f"the score {name!r} is taken; known are {', '.join(SCORES)}")
    if not callable(make):
        raise ValueError(f"the score {name!r} needs a class, or what makes one, got {type(make).__name__}")
    SCORES[name] = make
