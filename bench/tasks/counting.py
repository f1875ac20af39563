"""Common and frequent words (RULER, arXiv 2404.06654, section 3.3): what comes most often?

    common     `asked` words come `often` times each, all others 3 times
    frequent   the word of rank r comes r^-alpha as often as the first (a Zeta distribution)

A list of words alone is unlike any text that a small model has seen: the easiest levels say numbers instead, `counts`
times each, in sentences among natural text. Who repeats any of them without counting is right in 60 %, well below what
a task needs to count (`power.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import cycle, islice

from bench.tasks.needles import numbers
from bench.tasks.story import Question, Story, Task

SELDOM = 3


def common(rng: random.Random, words: Sequence[str], level: dict) -> Story:
    if "counts" in level:
        return _said(rng, level["counts"])
    drawn = rng.sample(words, len(words))
    asked, others = drawn[: level["asked"]], drawn[level["asked"] :]

    def fill(count: int) -> list[str]:
        num_common = min(level["often"] * len(asked), count * 3 // 4)
        num_others = count - num_common
        chosen = others[: -(-num_others // SELDOM)]
        listed = [*islice(cycle(asked), num_common), *islice(cycle(chosen), num_others)]
        return rng.sample(listed, count)

    return _listed(asked, fill)


def frequent(rng: random.Random, words: Sequence[str], level: dict) -> Story:
    if "counts" in level:
        return _said(rng, level["counts"])
    drawn = rng.sample(words, len(words))

    def fill(count: int) -> list[str]:
        shares = [rank ** -level["alpha"] for rank in range(1, len(drawn) + 1)]
        counts = [int(count * share / sum(shares)) for share in shares]
        listed = [word for word, times in zip(drawn, counts, strict=True) for _ in range(times)]
        rare = drawn[sum(times > 0 for times in counts) :]  # rounding down leaves room for some that come once
        return rng.sample([*listed, *islice(cycle(rare), count - len(listed))], count)

    return _listed(drawn[: level["asked"]], fill)


def _listed(asked: list[str], fill: Callable[[int], list[str]]) -> Story:
    intro = "Below is a list of words, many of which come more than once. Memorize the ones that come most often."
    what = "word is" if len(asked) == 1 else f"{len(asked)} words are"
    question = Question("Which words come most often in the list above?", f"The most frequent {what}:", asked)
    return Story(intro, [question], fill=fill)


def _said(rng: random.Random, counts: Sequence[int]) -> Story:
    drawn = numbers(rng, len(counts), 4)
    facts = [f"The special magic number is {n}." for n, times in zip(drawn, counts, strict=True) for _ in range(times)]
    ask = "Which special magic number is mentioned most often in the text?"
    question = Question(ask, "The special magic number is", drawn[:1])
    return Story(
        "Special magic numbers are hidden within the following text.", [question], rng.sample(facts, len(facts))
    )


TASKS = [
    Task(
        "common words",
        common,
        [{"asked": 10, "often": 30}, {"asked": 3, "often": 60}, {"counts": [12, 4, 4]}],
    ),
    Task(
        "frequent words",
        frequent,
        [{"asked": 3, "alpha": 2.0}, {"asked": 1, "alpha": 2.0}, {"counts": [12, 6, 2]}],
    ),
]
