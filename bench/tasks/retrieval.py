"""Two questions behind one context (SCBench, arXiv 2412.10319): what is shared by both must serve both.

    key-value       the values of two keys of many           prefix-suffix   strings, by their first and last word

Each in SCBench's two modes: in one conversation (two turns), and as requests of their own (a shared context).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from bench.tasks.needles import numbers
from bench.tasks.story import Question, Story, Task


def key_value(rng: random.Random, words: Sequence[str], level: dict, *, is_conversation: bool) -> Story:
    """`pairs` of a word and a number among natural text, as in JSON or, where `said` is, in sentences."""
    keys, values = rng.sample(words, level["pairs"]), numbers(rng, level["pairs"], level["digits"])
    begun, rest = ("The value of {} is", " {}.") if level.get("said") else ('"{}": "', '{}",')
    facts = [begun.format(key) + rest.format(value) for key, value in zip(keys, values, strict=True)]
    order = rng.sample(range(len(facts)), len(facts))
    questions = [
        Question(f"What is the value of {key} in the text?", begun.format(key), [value])
        for key, value in zip(keys[:2], values[:2], strict=True)
    ]
    intro = "Keys with their values are hidden within the following text. You will be asked for the values of some."
    return Story(intro, questions, [facts[i] for i in order], is_conversation=is_conversation)


def prefix_suffix(rng: random.Random, words: Sequence[str], level: dict, *, is_conversation: bool) -> Story:
    """`strings` of a first word, a number and a last word; `alike` others begin like each that is asked for."""
    drawn = rng.sample(words, 2 * level["strings"] + 2 * level["alike"])
    inner = numbers(rng, level["strings"] + 2 * level["alike"], level["digits"])
    firsts, lasts = drawn[: level["strings"]], drawn[level["strings"] :]
    firsts = [*firsts, *firsts[:2] * level["alike"]]
    facts = [f"{a} {n} {b};" for a, n, b in zip(firsts, inner, lasts, strict=True)]
    questions = [
        Question(f'Which string in the text begins with "{a}" and ends with "{b}"?', f"The string is: {a}", [n])
        for a, n, b in zip(firsts[:2], inner[:2], lasts[:2], strict=True)
    ]
    order = rng.sample(range(len(facts)), len(facts))
    intro = "Strings of a word, a number and a word are hidden within the following text. You will be asked for some."
    return Story(intro, questions, [facts[i] for i in order], is_conversation=is_conversation)


LEVELS = {
    key_value: [
        {"pairs": 16, "digits": 7},
        {"pairs": 8, "digits": 5},
        {"pairs": 4, "digits": 5, "said": True},
        {"pairs": 2, "digits": 3, "said": True},
    ],
    prefix_suffix: [
        {"strings": 8, "alike": 1, "digits": 5},
        {"strings": 4, "alike": 0, "digits": 5},
        {"strings": 2, "alike": 0, "digits": 3},
    ],
}
TASKS = [
    Task(f"{write.__name__.replace('_', '-')}, {form}", partial(write, is_conversation=form == "two turns"), levels)
    for write, levels in LEVELS.items()
    for form in ("two turns", "shared context")
]
