"""Two questions behind one context (SCBench, arXiv 2412.10319): what is shared by both must serve both.

    key-value       the values of two keys of many           prefix-suffix   strings, by their first and last word

Each in SCBench's two modes: in one conversation (two turns), and as requests of their own (a shared context).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from bench.tasks.needles import entry, numbers
from bench.tasks.story import Question, Story, Task


def key_value(rng: random.Random, words: Sequence[str], level: dict, *, is_conversation: bool) -> Story:
    """`pairs` of a word and a number among natural text, as in JSON, where `said` is in sentences, or as `entry`."""
    keys, values = rng.sample(words, level["pairs"]), numbers(rng, level["pairs"], level["digits"])
    if level.get("said"):
        begun = [f"The special magic number for {key} is" for key in keys]
        facts = [f"{start} {n}." for start, n in zip(begun, values, strict=True)]
        asks = [f"What is the special magic number for {key} in the text?" for key in keys]
    elif level.get("entry"):
        begun, facts = [f"[{key}" for key in keys], [entry(key, n) for key, n in zip(keys, values, strict=True)]
        asks = [f"What is the entry of {key} in the text?" for key in keys]
    else:
        begun = [f'"{key}": "' for key in keys]
        facts = [f'{start}{n}",' for start, n in zip(begun, values, strict=True)]
        asks = [f"What is the value of {key} in the text?" for key in keys]
    return _story(rng, "Keys with their values", facts, asks, begun, values, is_conversation)


def prefix_suffix(rng: random.Random, words: Sequence[str], level: dict, *, is_conversation: bool) -> Story:
    """`strings` of a first word, a number and a last word, or as many sentences that say so, where `said` is; `alike`
    others begin like each that is asked for.
    """
    count = level["strings"] + 2 * level["alike"]
    drawn, values = rng.sample(words, level["strings"] + count), numbers(rng, count, level["digits"])
    firsts, lasts = drawn[: level["strings"]], drawn[level["strings"] :]
    firsts += firsts[:2] * level["alike"]
    pairs = [*zip(firsts, lasts, strict=True)]
    if level.get("said"):
        begun = [f"The special magic number between {a} and {b} is" for a, b in pairs]
        facts = [f"{start} {n}." for start, n in zip(begun, values, strict=True)]
        asks = [f"What is the special magic number between {a} and {b} in the text?" for a, b in pairs]
    else:
        begun = [f"The string is: {a}" for a, _ in pairs]
        facts = [f"{a} {n} {b};" for (a, b), n in zip(pairs, values, strict=True)]
        asks = [f'Which string in the text begins with "{a}" and ends with "{b}"?' for a, b in pairs]
    return _story(rng, "Strings of a word, a number and a word", facts, asks, begun, values, is_conversation)


def _story(
    rng: random.Random, what: str, facts: list, asks: list, begun: list, values: list, is_conversation: bool
) -> Story:
    """The first two are asked for."""
    questions = [Question(asks[i], begun[i], [values[i]]) for i in range(2)]
    intro = f"{what} are hidden within the following text. Memorize them: you will be asked about two of them."
    return Story(intro, questions, rng.sample(facts, len(facts)), is_conversation=is_conversation)


LEVELS = {
    key_value: [
        {"pairs": 16, "digits": 7},
        {"pairs": 8, "digits": 5},
        {"pairs": 4, "digits": 5, "said": True},
        {"pairs": 2, "digits": 3, "said": True},
        {"pairs": 4, "digits": 7, "entry": True},
    ],
    prefix_suffix: [
        {"strings": 8, "alike": 1, "digits": 5},
        {"strings": 4, "alike": 1, "digits": 5, "said": True},
        {"strings": 3, "alike": 0, "digits": 4, "said": True},
        {"strings": 2, "alike": 0, "digits": 3, "said": True},
    ],
}
TASKS = [
    Task(f"{write.__name__.replace('_', '-')}, {form}", partial(write, is_conversation=form == "two turns"), levels)
    for write, levels in LEVELS.items()
    for form in ("two turns", "shared context")
]
