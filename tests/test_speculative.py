"""Speculative decoding: the tokens of plain decoding, in fewer steps."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from common import VOCAB, baseline_tokens, random_requests, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_composition import OPTIONS
from test_requests import same
from test_runner import replaying_runner
from transformers import RepetitionPenaltyLogitsProcessor

from kv_strategies import STRATEGIES, Request, Runner, build
from kv_strategies.speculative import DraftModel, PromptLookup, Row

MODEL = tiny_llama(num_layers=1)


CODES = ("int8", "fp8", "k8v4", "int4")


class Prophet:
    """Guesses what will be drawn, each token rightly with a probability; of a row that it does not know, anything."""

    def __init__(self, wholes: list[list[int]], chance: float, seed: int):
        self.wholes, self.chance, self.rng = wholes, chance, random.Random(seed)

    def check(self, model):
        pass

    def propose(self, rows):
        return [self._propose(row.token_ids.tolist(), row.limit) for row in rows]

    def _propose(self, tokens: list[int], limit: int) -> np.ndarray:
        whole = next((whole for whole in self.wholes if whole[: len(tokens)] == tokens), tokens)
        right = whole[len(tokens) :] + [0] * limit
        count = self.rng.randint(0, max(0, min(limit, 7)))
        guesses = [t if self.rng.random() < self.chance else self.rng.randrange(VOCAB) for t in right[:count]]
        return np.array(guesses, dtype=np.int32)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(
        [name for name in STRATEGIES if name not in ("baseline", "contiguous", "raw4")] + ["prefix+window"]
    ),
    size=st.sampled_from([1, 3, 4, 16]),
    spare=st.integers(0, 80),
    chance=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_any_guesses_give_the_tokens_of_plain_decoding(seed, name, size, spare, chance):
    """Greedy and sampled, right and wrong, with stops among the guesses, in pools that preempt."""
    rng = random.Random(seed)
    requests = random_requests(rng, rng.randint(1, 5), longest=30, max_new=20)
    for request in requests:
        request.logprobs = rng.choice([None, 2])
        request.min_new_tokens = rng.randint(0, request.max_new_tokens)
        request.logits_processor = RepetitionPenaltyLogitsProcessor(1.5) if rng.random() < 0.2 else ()
    options = {} if name == "prefix+window" else OPTIONS.get(name, [{}])[0]
    if "window" in name:
        options = {"window": 16, "sinks": 2}
    if name == "evict":  # by a score that rounding has no say in: keys of the same token tie but for it
        options = {"score": "window", **rng.choice([{"keep": 0.6}, {"keep": 17, "every": 3}])}
    if name in CODES:  # a token that is verified beside others must not be another code
        options = options | {"deterministic": True}
    plain = Runner(MODEL, build(name, MODEL, num_blocks=600 // size, block_size=size, **options), max_num_seqs=3)
    expected = plain.generate(requests)
    strategy = build(name, MODEL, num_blocks=-(-(60 + spare) // size) + 1, block_size=size, **options)
    wholes = [[*requests[result.request_id].token_ids, *result.token_ids] for result in expected]
    runner = Runner(MODEL, strategy, max_num_seqs=3, max_batch_tokens=24, speculate=Prophet(wholes, chance, seed))
    found = runner.generate(requests)
    strategy.check_integrity()
    assert [(r.token_ids, r.finish_reason) for r in found] == [(r.token_ids, r.finish_reason) for r in expected]
    assert all(a.logprobs is b.logprobs or same(a.logprobs, b.logprobs) for a, b in zip(found, expected, strict=True))
    assert runner.num_accepted <= runner.num_proposed and (chance or runner.num_accepted < 1 + runner.num_proposed / 2)
    assert strategy.stats()["blocks_used"] == 0


@pytest.mark.parametrize(
    "name",
    ["paged", "prefix+window", pytest.param("prefix+int8", marks=pytest.mark.gpu)],  # the interpreter rounds otherwise
)
def test_guesses_of_one_row_replay_a_graph(name, monkeypatch, device):
    model = tiny_llama(num_layers=1).to(device)
    options = {"window": 24, "sinks": 2} if "window" in name else {}
    requests = [Request([5, 6, 7] * n, max_new_tokens=12, temperature=n % 2, seed=n) for n in (1, 4, 9)]
    plain = Runner(model, build(name, model, num_blocks=60, **options), cuda_graphs=False)
    expected = [plain.generate([request])[0].token_ids for request in requests]
    wholes = [[*r.token_ids, *tokens] for r, tokens in zip(requests, expected, strict=True)]
    strategy = build(name, model, num_blocks=60, **options)
    runner = replaying_runner(model, strategy, monkeypatch, max_num_seqs=2, speculate=Prophet(wholes, 0.8, 3))
    assert [runner.generate([request])[0].token_ids for request in requests] == expected
    strategy.check_integrity()
    assert runner._verifying._graphs and runner.num_accepted > 0


def test_prompt_lookup_follows_the_last_time():
    lookup = PromptLookup(num_tokens=4, max_ngram=2)

    def guess(*tokens, limit=10):
        return lookup.propose([Row(np.array(tokens, dtype=np.int32), limit, "")])[0].tolist()

    assert guess(1, 2, 3, 9, 1, 2) == [3, 9, 1, 2]
    assert guess(1, 2, 3, 1, 2, 4, 1, 2) == [4, 1, 2], "the newest of several"
    assert guess(7, 2, 3, 1, 5, 2) == [3, 1], "two tokens for one that has occurred"
    assert guess(1, 2, 3, 4, 5, 6, 7, 1, 2, 3) == [4, 5, 6, 7], "and more for three, though two were looked for"
    assert guess(5, 5, 5) == [5] and guess(1, 2, 3) == guess(1) == []
    assert guess(1, 2, 3, 9, 1, 2, limit=2) == [3, 9] and guess(1, 2, 1, limit=0) == []
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 3"):
        PromptLookup(num_tokens=0)


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_a_draft_model_guesses_and_shares_what_it_has_computed(salt):
    """The draft model is the model itself, so that every guess is right, within the little context that it has."""
    twin = tiny_llama(num_layers=1)
    twin.config.max_position_embeddings = 64
    draft = build("prefix", twin, num_blocks=40, block_size=4)
    strategy = build("paged", MODEL, num_blocks=80)
    runner = Runner(MODEL, strategy, max_num_seqs=4, speculate=DraftModel(Runner(twin, draft), num_tokens=5))
    requests = [Request([i + 1] * (9 + i), max_new_tokens=80, salt=salt) for i in range(3)]
    assert [result.token_ids for result in runner.generate(requests)] == baseline_tokens(MODEL, requests)
    assert runner.num_accepted == runner.num_proposed > 100
    assert draft.stats()["hit_tokens"] > draft.stats()["prompt_tokens"] / 2
    draft.check_integrity()
    table = draft.open_table([1] * 10)
    assert bool(table.num_tokens) == (salt == ""), "what a tenant asked is the tenant's, drafts included"
    table.release()


def test_a_draft_model_guesses_for_several_runners_at_once():
    requests = [Request([i, 5, 6] * 4, max_new_tokens=20, request_id=i) for i in range(3)]
    expected = baseline_tokens(MODEL, requests)
    guesser = Runner(MODEL, build("prefix", MODEL, num_blocks=200))
    guesser.submit([[7, 8]])  # and it has work of its own
    targets = [Runner(MODEL, build("paged", MODEL, num_blocks=20), speculate=DraftModel(guesser)) for _ in range(3)]
    with ThreadPoolExecutor() as threads:
        for found in threads.map(lambda target: target.generate(requests), targets):
            assert [result.token_ids for result in found] == expected
    assert all(target.num_accepted > 0 for target in targets)


def test_what_cannot_speculate_is_refused():
    other = Runner(model := tiny_llama(vocab_size=VOCAB + 1), build("paged", model, num_blocks=8))
    with pytest.raises(ValueError, match=f"vocabulary of {VOCAB} tokens; this one has {VOCAB + 1}"):
        Runner(MODEL, build("paged", MODEL, num_blocks=8), speculate=DraftModel(other))
    with pytest.raises(ValueError, match="baseline decodes one token after the other"):
        Runner(MODEL, build("baseline", MODEL), speculate=PromptLookup())
    for options in ({"top_n": 5}, {"mass": 0.8}):
        with pytest.raises(ValueError, match="top_n and mass read some of V for a token that decodes alone"):
            Runner(MODEL, build("offload", MODEL, num_blocks=8, **options), speculate=PromptLookup())
    with pytest.raises(ValueError, match="num_tokens must be at least 1"):
        DraftModel(other, num_tokens=0)


@pytest.mark.parametrize("guesses", [[-1], [3, VOCAB]])
def test_guesses_that_are_no_tokens_are_refused(guesses, monkeypatch):
    lookup = PromptLookup()
    monkeypatch.setattr(lookup, "propose", lambda rows: [guesses for _ in rows])
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=8), speculate=lookup)
    with pytest.raises(ValueError, match="PromptLookup guesses tokens outside the vocabulary"):
        runner.generate([[1, 2, 3]])
    assert runner.num_running == 0 and runner.strategy.stats()["blocks_used"] == 0


def test_a_proposer_that_fails_costs_time_alone(monkeypatch):
    lookup = PromptLookup()
    monkeypatch.setattr(lookup, "propose", lambda rows: 1 / 0)
    requests = [Request([1, 2, 3], max_new_tokens=5)]
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=8), speculate=lookup)
    with pytest.warns(RuntimeWarning, match=r"PromptLookup has failed \(ZeroDivisionError"):
        assert [result.token_ids for result in runner.generate(requests)] == baseline_tokens(MODEL, requests)


def test_a_step_with_guesses_that_fails_is_as_if_it_had_not_been(monkeypatch):
    requests = [Request([i, 3] * 4, max_new_tokens=15) for i in range(3)]
    expected = baseline_tokens(MODEL, requests)
    wholes = [[*request.token_ids, *tokens] for request, tokens in zip(requests, expected, strict=True)]
    strategy = build("prefix", MODEL, num_blocks=60, block_size=2)
    runner = Runner(MODEL, strategy, max_num_seqs=4, speculate=Prophet(wholes, 0.7, 1))
    draw, calls = runner._draw, []

    def fails_at_times(*args):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise MemoryError
        return draw(*args)

    monkeypatch.setattr(runner, "_draw", fails_at_times)
    runner.submit(requests)
    found = {}
    while runner.num_running or runner.num_waiting:
        try:
            found |= {event.request_id: event.result.token_ids for event in runner.step() if event.result}
        except MemoryError:
            strategy.check_integrity()
    assert [found[i] for i in range(3)] == expected and len(calls) > 6


def test_text_that_repeats_takes_half_the_steps_or_fewer(monkeypatch):
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=40), speculate=PromptLookup())
    launched, launch = [], runner._launch
    monkeypatch.setattr(runner, "_launch", lambda *step: launched.append(1) or launch(*step))
    (plain,) = Runner(MODEL, build("paged", MODEL, num_blocks=40)).generate([Request([4], max_new_tokens=200)])
    whole = [4, *plain.token_ids]
    request = Request(whole + whole[:20], max_new_tokens=100)
    expected = baseline_tokens(MODEL, [request])
    (found,) = runner.generate([request])
    assert [found.token_ids] == expected
    assert len(launched) < 60, "this model falls into a cycle"
