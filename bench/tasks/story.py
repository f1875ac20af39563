"""A story is what a task writes; `samples` makes tokens of it, so long that the longest of its prompts has the length.

    context    head | text, the facts hidden in it at random places            what all questions are about
    rest       question, and the answer begun for the model                     a list, one a turn

A prompt is the context and one rest. In a conversation the rest of the second turn holds the first question and its
right answer as well, so that what is fed never depends on what was said.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPARE = 8  # new tokens beyond those of the answer


@dataclass(frozen=True)
class Question:
    ask: str
    begun: str  # the first words of the answer, written for the model
    answers: list[str]  # all of them must be said

    def is_right(self, said: str) -> bool:
        """Whether every answer is among the words said, in any order."""
        words = re.findall(r"\w+", said.lower())
        return all(answer.lower() in words for answer in self.answers)


@dataclass(frozen=True)
class Story:
    intro: str  # stands before the text
    questions: list[Question]
    facts: Sequence[str] = ()  # sentences hidden in natural text, in this order
    fill: Callable[[int], list[str]] | None = None  # in place of natural text: so many words, each a token
    is_conversation: bool = False  # else every question stands behind the context alone


@dataclass(frozen=True)
class Task:
    name: str
    write: Callable[[random.Random, Sequence[str], dict], Story]  # from words that are one token each, and a level
    levels: Sequence[dict]  # the hardest first


@dataclass(frozen=True)
class Turn:
    rest: list[int]  # token ids behind the context
    question: Question
    new_tokens: int


@dataclass(frozen=True)
class Sample:
    context: list[int]  # token ids
    turns: list[Turn]


def samples(
    tokenizer: PreTrainedTokenizerBase, task: Task, level: dict, length: int, seeds: Sequence[int]
) -> list[Sample]:
    """A sample a seed, whose longest prompt has exactly `length` tokens.

    Raises:
        ValueError: `length` leaves no room for any text.
    """
    return [_sample(tokenizer, task, level, length, random.Random(f"{task.name} {level} {seed}")) for seed in seeds]


def _sample(tokenizer, task: Task, level: dict, length: int, rng: random.Random) -> Sample:
    from kv_strategies.models.text import passage

    def encode(text: str, *, is_first: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=is_first, verbose=False)["input_ids"]

    story = task.write(rng, words(tokenizer), level)
    in_chat = level.get("chat", False) and tokenizer.chat_template is not None
    head, rests = _form(tokenizer if in_chat else None, story)
    head, rests = encode(head, is_first=not in_chat), [encode(rest) for rest in rests]  # a chat form begins itself
    facts = [encode(f" {fact}") for fact in story.facts]
    room = length - len(head) - sum(map(len, facts)) - max(map(len, rests))
    if room < 1:
        raise ValueError(f"{task.name} needs {length - room + 1} tokens at {level}; asked for {length}")
    if story.fill:
        text = [token for word in story.fill(room) for token in encode(f" {word}")]
    else:
        text = _hidden(facts, *passage(tokenizer, room, rng), rng)
    turns = [
        Turn(rest, question, len(encode(" " + ", ".join(question.answers))) + SPARE)
        for rest, question in zip(rests, story.questions, strict=True)
    ]
    return Sample([*head, *text], turns)


def _hidden(facts: Sequence[list[int]], ids: list[int], borders: list[int], rng: random.Random) -> list[int]:
    """The text with every fact at the beginning of a sentence, in the order given."""
    places = sorted(rng.choices([*borders, len(ids)], k=len(facts)))
    text, begin = [], 0
    for fact, place in zip(facts, places, strict=True):
        text += [*ids[begin:place], *fact]
        begin = place
    return [*text, *ids[begin:]]


def _form(tokenizer: PreTrainedTokenizerBase | None, story: Story) -> tuple[str, list[str]]:
    """What stands before the text, and behind it for every question: in the chat form of a tokenizer; plain without."""
    asked = [[question] for question in story.questions]
    if story.is_conversation:
        asked = [story.questions[: index + 1] for index in range(len(story.questions))]
    if tokenizer is None:
        forms = [_plain(story.intro, questions) for questions in asked]
    else:
        forms = [_chat(tokenizer, story.intro, questions) for questions in asked]
    return forms[0][0], [rest for _, rest in forms]


_TEXT = "<<text>>"


def _plain(intro: str, questions: Sequence[Question]) -> tuple[str, str]:
    *before, last = questions
    rest = [f"\n\n{each.ask} {each.begun} {', '.join(each.answers)}." for each in before]
    return f"{intro}\n\n", "".join([*rest, f"\n\n{last.ask} {last.begun}"])


def _chat(tokenizer: PreTrainedTokenizerBase, intro: str, questions: Sequence[Question]) -> tuple[str, str]:
    *before, last = questions
    messages = []
    for question in before:
        messages += [("user", question.ask), ("assistant", f"{question.begun} {', '.join(question.answers)}.")]
    messages.append(("user", last.ask))
    messages[0] = ("user", f"{intro}\n\n{_TEXT}\n\n{messages[0][1]}")
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], add_generation_prompt=True, tokenize=False
    )
    head, rest = whole.split(_TEXT)
    return head, rest + last.begun


@lru_cache(maxsize=4)
def words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words of the text that are one token each behind a space, the most frequent first: what keys and lists are of."""
    from kv_strategies.models.text import TEXT

    counts = Counter(re.findall(r"\b[a-z]{5,9}\b", TEXT.read_text(encoding="utf-8")))
    known = [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= 3]
    ids = tokenizer([f" {word}" for word in known], add_special_tokens=False)["input_ids"]
    return [word for word, tokens in zip(known, ids, strict=True) if len(tokens) == 1]
