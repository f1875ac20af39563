"""Needles (RULER, arXiv 2404.06654, section 3.1): numbers of special words hidden in a long text, and asked for.

single       one fact                  multikey      facts of other words beside it
multivalue   one word, many numbers    multiquery    many words are asked for at once
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from bench.tasks.story import Question, Story, Task

ENTRIES = "Entries are hidden within the following text. Memorize them: you will be asked about them."
INTRO = "Some special magic numbers are hidden within the following text. Memorize them: you will be asked about them."


def write(rng: random.Random, words: Sequence[str], level: dict) -> Story:
    """`keys` words have `values` numbers of `digits` digits each; those of `queries` words are asked for."""
    if level.get("entry"):
        return _entries(rng, words, level)
    num_keys, num_values, num_asked = level["keys"], level.get("values", 1), level.get("queries", 1)
    keys = rng.sample(words, num_keys)
    drawn = numbers(rng, num_keys * num_values, level["digits"])
    facts = [f"The special magic number for {key} is {n}." for key, n in zip(keys * num_values, drawn, strict=True)]
    rng.shuffle(facts)
    asked = [n for index in range(num_asked) for n in drawn[index::num_keys]]
    named = " and ".join(keys[:num_asked])
    what, verb = ("number", "is") if len(asked) == 1 else ("numbers", "are")
    question = Question(
        f"What {verb} the special magic {what} for {named} mentioned in the text?",
        f"The special magic {what} for {named} {verb}",
        asked,
    )
    return Story(INTRO, [question], facts)


def _entries(rng: random.Random, words: Sequence[str], level: dict) -> Story:
    """The same with a number right behind its word, in brackets: what a small model finds most surely among others of
    its kind.
    """
    keys, drawn = rng.sample(words, level["keys"]), numbers(rng, level["keys"], level["digits"])
    facts = [*map(entry, keys, drawn)]
    question = Question(f"What stands in the text behind {keys[0]}?", f"[{keys[0]}", drawn[:1])
    return Story(ENTRIES, [question], rng.sample(facts, len(facts)))


def entry(key: str, number: str) -> str:
    return f"[{key} {number}]"


def numbers(rng: random.Random, count: int, digits: int) -> list[str]:
    """Different numbers, none of which begins with 0."""
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


TASKS = [
    Task("needle, single", write, [{"keys": 1, "digits": digits} for digits in (7, 5, 3)]),
    Task(
        "needle, multikey",
        write,
        [
            *({"keys": keys, "digits": digits} for keys, digits in ((8, 7), (4, 5), (3, 4), (2, 3))),
            {"keys": 4, "digits": 7, "entry": True},
        ],
    ),
    Task(
        "needle, multivalue",
        write,
        [
            {"keys": 1, "values": 4, "digits": 7},
            {"keys": 1, "values": 3, "digits": 5},
            {"keys": 1, "values": 2, "digits": 5, "chat": True},
            {"keys": 1, "values": 2, "digits": 3},
        ],
    ),
    Task(
        "needle, multiquery",
        write,
        [
            {"keys": 4, "queries": 4, "digits": 7},
            {"keys": 3, "queries": 3, "digits": 5},
            {"keys": 2, "queries": 2, "digits": 5, "chat": True},
            {"keys": 2, "queries": 2, "digits": 3},
        ],
    ),
]
