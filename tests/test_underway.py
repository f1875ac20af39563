"""Requests that begin alike and come at once: the first is computed, the others wait a step and find it."""

from __future__ import annotations

import random

import pytest
from common import VOCAB, baseline_tokens, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_strategies import Request, Runner, build, underway
from kv_strategies.underway import MIN_TOKENS_SPARED

MODEL = tiny_llama(num_layers=1)
RNG = random.Random(5)
START, OTHER = ([RNG.randrange(VOCAB) for _ in range(MIN_TOKENS_SPARED + 40)] for _ in range(2))


def run(requests: list[Request], name: str = "prefix", **options):
    """Tokens of each request, all submitted at once, and how many tokens of prompts were computed."""
    strategy = build(name, MODEL, num_blocks=3000, block_size=4)
    tokens = [result.token_ids for result in Runner(MODEL, strategy, **options).generate(requests)]
    strategy.check_integrity()
    stats = strategy.stats()
    return tokens, stats["prompt_tokens"] - stats["hit_tokens"]


@pytest.mark.parametrize("name", ["prefix", "prefix+int8", "prefix+window", "prefix+offload"])
def test_a_start_of_many_requests_is_computed_once(name):
    tails = [[1 + i] * (1 + i % 7) for i in range(20)]
    requests = [Request([*START, *tail], max_new_tokens=3) for tail in tails]
    tokens, computed = run(requests, name, max_num_seqs=24)
    assert computed == len(START) + sum(map(len, tails))
    if name == "prefix":
        assert tokens == baseline_tokens(MODEL, requests)


def queued(*about: tuple[str, list[int]], name: str = "prefix", **options) -> Runner:
    runner = Runner(MODEL, build(name, MODEL, num_blocks=1000, block_size=4), **options)
    runner.submit([Request(tokens, max_new_tokens=9, request_id=name) for name, tokens in about])
    return runner


def started(runner: Runner) -> list[str]:
    runner.step()
    return [seq.request.request_id for seq in runner._running]


def test_who_waits_keeps_its_turn():
    runner = queued(("a", [*START, 1]), ("b", [*START, 2]), ("c", OTHER), ("d", [*START, 3]))
    assert started(runner) == ["a"]
    assert started(runner) == ["a", "b", "c", "d"]


def test_without_sharing_nobody_waits():
    assert len(started(queued(*((str(i), [*START, i]) for i in range(4)), name="paged"))) == 4


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
    runner = queued(("a", [*START, 1]))
    runner.submit([other])
    runner.step()
    assert runner.num_running == 2


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    max_batch_tokens=st.integers(12, 300),
    shortest_first=st.sampled_from([None, 0.0001]),
    least=st.sampled_from([1, 8, 32]),
)
def test_together_costs_hardly_more_than_one_after_the_other(seed, max_batch_tokens, shortest_first, least):
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(underway, "MIN_TOKENS_SPARED", least)
        options = {"max_batch_tokens": max_batch_tokens, "shortest_first": shortest_first}
        tokens, computed = run(requests, max_num_seqs=8, **options)
    assert tokens == baseline_tokens(MODEL, requests)
    _, alone = run(sorted(requests, key=lambda request: -request.priority), max_num_seqs=1)
    assert computed <= alone + len(requests) * (least + 4)
