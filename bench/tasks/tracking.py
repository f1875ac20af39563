"""Variable tracking (RULER, arXiv 2404.06654, section 3.2): assignments are scattered over a text, and followed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from bench.tasks.needles import numbers
from bench.tasks.story import Question, Story, Task

INTRO = "Variable assignments are hidden within the following text. Memorize them: you will be asked about them."


def write(rng: random.Random, words: Sequence[str], level: dict) -> Story:
    """The first variable of a chain is given a number, each of `hops` others the one before it. All of the chain are
    asked for, by the number; where `one` is, the number of the last.
    """
    names = [word.upper() for word in rng.sample(words, level["hops"] + 1)]
    number = numbers(rng, 1, level["digits"])[0]
    facts = [f"VAR {names[0]} = {number}."]
    facts += [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]
    if level.get("one"):
        question = Question(f"What is the value of VAR {names[-1]}?", f"The value of VAR {names[-1]} is", [number])
    else:
        question = Question(
            f"Find all variables that are assigned the value {number} in the text.",
            f"The variables that are assigned the value {number} are: VAR",
            names,
        )
    return Story(INTRO, [question], facts)


TASKS = [
    Task(
        "variable tracking",
        write,
        [*({"hops": hops, "digits": 5} for hops in (4, 2, 1)), {"hops": 1, "digits": 5, "one": True}],
    ),
]
