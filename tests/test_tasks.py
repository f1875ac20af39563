"""Tasks: what they write replays, has the length asked for, can be answered from the text alone, is judged right."""

from __future__ import annotations

import random

import pytest
import torch
from common import VOCAB, tiny_llama

from bench.tasks import TASKS, answers, power
from bench.tasks.story import Question, Sample, Turn, samples, words
from kv_strategies import build
from kv_strategies.models.load import DEFAULT_MODEL, load_tokenizer

LEVELS = [
    (name, level | chat) for name, task in TASKS.items() for level in task.levels for chat in ({}, {"chat": True})
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(DEFAULT_MODEL))


@pytest.mark.parametrize("name, level", LEVELS)
def test_a_sample(tokenizer, name, level):
    """The facts are in the context, the answers not in the question; same seed, same tokens; the length is exact."""
    length = 1500
    some = samples(tokenizer, TASKS[name], level, length, [3, 4])
    assert some == samples(tokenizer, TASKS[name], level, length, [3, 4]) and some[0] != some[1]
    for sample in some:
        assert max(len(sample.context) + len(turn.rest) for turn in sample.turns) == length
        context = tokenizer.decode(sample.context).lower()
        for index, turn in enumerate(sample.turns):
            asked = tokenizer.decode(turn.rest)
            for answer in turn.question.answers:
                assert context.count(answer.lower()) >= 1
                assert answer.lower() not in asked.lower()
                if answer.isdigit() and "counts" not in level and name != "variable tracking":
                    assert context.count(answer) == 1
            assert asked.endswith(turn.question.begun)
            if name.endswith("two turns") and index:
                before = sample.turns[index - 1].question
                assert asked.index(before.ask) < asked.index(before.answers[0]) < asked.index(turn.question.ask)


@pytest.mark.parametrize("name", ["common words", "frequent words"])
def test_what_comes_most_often(tokenizer, name):
    """Those asked for come more often than any other word of the list, the hardest level and the easiest list."""
    for level in TASKS[name].levels[:2]:
        story = TASKS[name].write(random.Random(0), words(tokenizer), level)
        listed = story.fill(1300)
        assert len(listed) == 1300
        often = min(listed.count(word) for word in story.questions[0].answers)
        assert often > max(listed.count(word) for word in set(listed) - set(story.questions[0].answers))


def test_a_length_without_room_for_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"needle, single needs \d+ tokens .* asked for 20"):
        samples(tokenizer, TASKS["needle, single"], TASKS["needle, single"].levels[0], 20, [0])


@pytest.mark.parametrize(
    "said, is_right",
    [(" 123 and 45.", True), ("45, 123", True), (" 123.", False), (" 1234 45", False), ("", False)],
)
def test_an_answer_is_right_where_all_is_said(said, is_right):
    assert Question("", "", ["123", "45"]).is_right(said) == is_right


def test_intervals_are_those_of_the_literature():
    """Newcombe 1998 (Statistics in Medicine 17, table I, method 3): 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert power.interval(right, count) == pytest.approx((low, high), abs=5e-5)


def test_a_level_is_the_hardest_that_the_baseline_can_do():
    rates = {"hard": [True] * 3 + [False] * 2, "enough": [True] * 4 + [False], "easy": [True] * 5}
    tried = []

    def attempt(level: dict) -> list[bool]:
        tried.append(level["name"])
        return rates[level["name"]]

    levels = [{"name": name} for name in rates]
    assert power.level_for(levels, attempt) == {"name": "enough"} and tried == ["hard", "enough"]
    assert power.level_for(levels[:1], attempt) is None and not power.counts([])


def test_every_way_gives_the_answers_of_the_native_cache():
    """With a lossless strategy: the question shown, and hidden behind contexts of several lengths, in two turns."""
    model, rng = tiny_llama(), random.Random(1)

    def some(count: int) -> list[int]:
        return [rng.randrange(2, VOCAB) for _ in range(count)]

    drawn = [
        Sample(some(length), [Turn(some(rest), Question("", "", [""]), 6) for rest in rests])
        for length, rests in ((33, (3, 9)), (40, (5, 5)), (7, (4, 1)))
    ]
    expected = answers.native(model, 1)(drawn)
    strategy = build("prefix", model, num_blocks=64)
    assert answers.shown(model, strategy, 2)(drawn) == expected
    assert answers.hidden(model, strategy, 2)(drawn) == expected
    assert torch.tensor(expected).shape == (2, 3, 6)
    strategy.reset()  # nothing is held


def test_all_turns_must_be_right():
    turn = Turn([0], Question("", "", ["a"]), 1)
    drawn = [Sample([0], [turn, turn]) for _ in range(3)]
    said = [[[0], [0], [1]], [[0], [1], [1]]]
    assert answers.right(drawn, lambda _: said, lambda ids: "ab"[ids[0]]) == [True, False, False]


def test_who_does_not_count_fails_tasks_of_counting():
    """To repeat any number that is mentioned is right too seldom for the task to count."""
    said = [level["counts"] for task in TASKS.values() for level in task.levels if "counts" in level]
    assert said and all(max(counts) <= 0.6 * sum(counts) < power.NEEDED * sum(counts) for counts in said)
