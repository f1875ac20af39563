"""Requests that begin alike and come at once: the first is computed, the others wait a step and find it."""

from __future__ import annotations

import random

import pytest
from common import VOCAB, baseline_tokens, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_strategies import Request, Runner, build
from kv_strategies.underway import MIN_TOKENS_SPARED, MOST_LOOKED_AT

MODEL = tiny_llama(num_layers=1)
RNG = random.Random(5)
START, OTHER = ([RNG.randrange(VOCAB) for _ in range(72)] for _ in range(2))


def run(requests: list[Request], name: str = "prefix", strategy_options: dict | None = None, **options):
    """Tokens of each request, all submitted at once, and how many tokens of prompts were computed."""
    strategy = build(name, MODEL, num_blocks=1500, block_size=4, **(strategy_options or {}))
    tokens = [result.token_ids for result in Runner(MODEL, strategy, **options).generate(requests)]
    strategy.check_integrity()
    stats = strategy.stats()
    return tokens, stats["prompt_tokens"] - stats["hit_tokens"]


@pytest.mark.parametrize("max_batch_tokens", [30, 100, 2048])
@pytest.mark.parametrize("name", ["prefix", "prefix+int8", "prefix+window", "prefix+offload"])
def test_a_start_of_many_requests_is_computed_once(name, max_batch_tokens):
    tails = [[1 + i] * (1 + i % 7) for i in range(20)]
    requests = [Request([*START, *tail], max_new_tokens=3) for tail in tails]
    tokens, computed = run(requests, name, max_num_seqs=24, max_batch_tokens=max_batch_tokens)
    # what is left of the start for the last of its chunks may be too little to wait for
    again = 0 if max_batch_tokens > len(START) else 2 * MIN_TOKENS_SPARED
    assert 0 <= computed - len(START) - sum(map(len, tails)) <= again
    if name == "prefix":
        assert tokens == baseline_tokens(MODEL, requests)


def test_without_sharing_nobody_waits():
    requests = [Request([*START, i], max_new_tokens=2) for i in range(4)]
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=200, block_size=4))
    runner.submit(requests)
    runner.step()
    assert runner.num_running == 4


def queued(*about: tuple[str, list[int], int], **options) -> Runner:
    requests = [Request(tokens, max_new_tokens=9, priority=level, request_id=name) for name, tokens, level in about]
    runner = Runner(MODEL, build("prefix", MODEL, num_blocks=500, block_size=4), **options)
    runner.submit(requests)
    return runner


def started(runner: Runner) -> list[str]:
    runner.step()
    return [seq.request.request_id for seq in runner._running]


def test_others_go_ahead_and_who_waited_is_next():
    runner = queued(("a", [*START, 1], 0), ("b", [*START, 2], 0), ("c", [*OTHER, 1], 0), ("d", [*OTHER, 2], 0))
    assert started(runner) == ["a", "c"]
    assert started(runner) == ["a", "c", "b", "d"]


def test_the_less_urgent_do_not_go_ahead():
    runner = queued(("a", [*START, 1], 1), ("b", [*START, 2], 1), ("c", [*OTHER, 1], 0))
    assert started(runner) == ["a"]
    assert started(runner) == ["a", "b", "c"]


def test_only_who_is_computed_whole_in_the_step_goes_ahead():
    """Else who came first would wait for all of another's prompt."""
    runner = queued(("a", [*START, 1], 0), ("b", [*START, 2], 0), ("c", OTHER * 3, 0), max_batch_tokens=200)
    assert started(runner) == ["a"]
    assert started(runner) == ["a", "b", "c"]


def test_nobody_takes_the_seats_of_who_waits():
    runner = queued(("a", [*START, 1], 0), max_num_seqs=4)
    runner.submit([Request([*START, 2], max_new_tokens=9, n=3, request_id="b")])
    runner.submit([Request(OTHER, max_new_tokens=9, request_id="c")])
    assert started(runner) == ["a"]
    assert started(runner) == ["a", "b", "b", "b"]


def test_for_the_same_tokens_nobody_waits_twice(monkeypatch):
    """Whatever is published, nothing may come of it: a model may change with every forward."""
    runner = queued(*((str(index), [*START, index], 0) for index in range(6)))
    monkeypatch.setattr(runner.strategy.sharing, "match", lambda token_ids, salt: ([], 0))
    assert [len(started(runner)) for _ in range(2)] == [1, 6]


def test_requests_that_compute_all_of_their_tokens_hold_nobody_up():
    Runner(MODEL, (strategy := build("prefix", MODEL, num_blocks=500, block_size=4))).generate([Request(START)])
    runner = Runner(MODEL, strategy, max_batch_tokens=80)
    scoring = [Request([*START, i], max_new_tokens=9, prompt_logprobs=0, request_id=f"s{i}") for i in range(5)]
    runner.submit([scoring[0], Request([*START, 9], max_new_tokens=9, request_id="plain"), *scoring[1:]])
    assert started(runner) == ["s0"]
    assert started(runner)[:2] == ["s0", "plain"]


@pytest.mark.parametrize(
    "other",
    [
        Request(START[: MIN_TOKENS_SPARED - 1] + [1] * 40, max_new_tokens=9),
        Request(START[:MIN_TOKENS_SPARED], max_new_tokens=9),
        Request([*START, 2], max_new_tokens=9, salt="tenant"),
        Request([*START, 2], max_new_tokens=9, prompt_logprobs=0),
    ],
    ids=["too little alike", "one token is always computed", "another tenant", "log probabilities of all its tokens"],
)
def test_who_would_find_too_little_does_not_wait(other):
    runner = queued(("a", [*START, 1], 0))
    runner.submit([other])
    runner.step()
    assert runner.num_running == 2


def test_a_long_queue_of_the_same_prompt_is_looked_at_in_part():
    """And nobody is forgotten."""
    count = MOST_LOOKED_AT + 50
    requests = [Request([*START, i % VOCAB], max_new_tokens=1) for i in range(count)]
    tokens, computed = run([*requests, Request(OTHER, max_new_tokens=1)], max_num_seqs=64, max_batch_tokens=512)
    assert len(tokens) == count + 1 and all(tokens)
    assert computed == len(START) + count + len(OTHER)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    max_batch_tokens=st.integers(12, 300),
    shortest_first=st.sampled_from([None, 0.0001]),
)
def test_together_costs_hardly_more_than_one_after_the_other(seed, max_batch_tokens, shortest_first):
    """Prompts that branch off from one another anywhere, of two tenants and three priorities."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 90))]]
    for _ in range(rng.randint(1, 12)):
        parent = rng.choice(prompts)
        prompts.append(parent[: rng.randint(0, len(parent))] + [rng.randrange(VOCAB)] * rng.randint(1, 60))
    requests = [
        Request(prompt, max_new_tokens=rng.randint(1, 4), salt=rng.choice("ab"), priority=rng.randrange(3))
        for prompt in prompts
    ]
    tokens, computed = run(requests, max_num_seqs=8, max_batch_tokens=max_batch_tokens, shortest_first=shortest_first)
    assert tokens == baseline_tokens(MODEL, requests)
    _, alone = run(sorted(requests, key=lambda request: -request.priority), max_num_seqs=1)
    assert computed <= alone + len(requests) * (MIN_TOKENS_SPARED + 4)
