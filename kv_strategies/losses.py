"""What lossy strategies were measured to lose, for `kv-strategies plan`.

`losses.jsonl` beside this file holds it, so that an installed package knows as well; `make report` writes it from the
results of the bench. A line is one figure beside that of the exact cache: of one setting, one model and one length of
text. It says nothing about other settings, and little about other models and lengths, so these are always named.

Lossless parts change no token, so a sum loses what its lossy parts lose alone: `prefix+int8` what `int8` loses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .registry import STRATEGIES, parts_of

PATH = Path(__file__).with_name("losses.jsonl")
PERPLEXITY = "perplexity"
SOLVED = {"shown": "tasks solved", "hidden": "tasks solved, question hidden"}  # by the form of the question


@dataclass(frozen=True)
class Loss:
    """One figure.

    Args:
        length: tokens of the texts that were read.
        measure: PERPLEXITY of natural text, or the share of tasks of SOLVED that were answered right.
        value, exact: of the strategy, and of the exact cache on the same texts.
        low, high: the 95 % interval of `value`, of a share.
        samples: tokens that were judged, or tasks.
        tasks: their kinds.
    """

    strategy: str
    options: dict[str, object]
    model: str
    dtype: str
    length: int
    measure: str
    value: float
    exact: float
    samples: int
    low: float | None = None
    high: float | None = None
    tasks: Sequence[str] = ()

    @property
    def where(self) -> str:
        return f"{self.model} in {self.dtype} at {self.length} tokens"

    def __str__(self) -> str:
        if self.measure == PERPLEXITY:
            return f"{self.value / self.exact - 1:+.2%} perplexity"
        kinds = self.tasks[0] if len(self.tasks) == 1 else f"{len(self.tasks)} kinds"
        interval = f"{self.low:.0%} to {self.high:.0%}; exact {self.exact:.0%}"
        return f"{self.value:.0%} of {self.measure} ({kinds}: {interval})"


@cache
def measured() -> tuple[Loss, ...]:
    return tuple(Loss(**json.loads(line)) for line in PATH.read_text(encoding="utf-8").splitlines())


def lossy_parts(strategy: str, options: dict[str, object]) -> dict[str, dict[str, object]]:
    """The parts of a strategy that may change a token, with all of their options.

    Raises:
        ValueError: an unknown strategy.
    """
    parts = {}
    for part in parts_of(strategy):
        preset = STRATEGIES[part]
        given = {name: options[name] for name in preset.options if name in options}
        if preset.is_lossy(given):
            parts[part] = {name: p.default for name, p in preset.options.items()} | given
    return parts


def losses_of(strategy: str, options: dict[str, object], model: str, context: int) -> list[Loss] | None:
    """Of every measure one figure of exactly this setting; of `model` where there is one, else of another, and of the
    length nearest to `context`. Empty where nothing was measured, None where there is nothing to lose.
    """
    parts = lossy_parts(strategy, options)
    if not parts:
        return None

    def far(loss: Loss) -> tuple[bool, float]:
        return loss.model != model, abs(math.log(loss.length / context))

    own = [loss for loss in measured() if lossy_parts(loss.strategy, loss.options) == parts]
    measures = dict.fromkeys(loss.measure for loss in own)
    return [min((loss for loss in own if loss.measure == measure), key=far) for measure in measures]


def in_words(losses: Sequence[Loss] | None) -> str:
    """With the model and the length that each was measured on."""
    if losses is None:
        return "none"
    places = dict.fromkeys(loss.where for loss in losses)
    told = (f"{', '.join(str(loss) for loss in losses if loss.where == where)}, with {where}" for where in places)
    return "; ".join(told) or "not measured"
