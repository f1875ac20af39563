"""What a request may ask for beside tokens: as `generate()` gives it, through several strategies and under pressure."""

from __future__ import annotations

import asyncio
import random
import time
from itertools import combinations

import pytest
import torch
from common import VOCAB, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runner import replaying_runner
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
)

from kv_strategies import Request, Runner, build
from kv_strategies.models import load_model
from kv_strategies.step.stop import completes

MODEL = tiny_llama(num_layers=1)


class Recorder(LogitsProcessor):
    """Remembers what it was called with, as a constrained decoder does: once a token, in order."""

    def __init__(self):
        self.seen = None

    def __call__(self, input_ids, scores):
        row = input_ids[0].tolist()
        assert self.seen is None or row[:-1] == self.seen, "a token was left out, or came twice"
        self.seen = row
        return scores


def processors(rng: random.Random) -> list:
    allowed = rng.sample(range(VOCAB), 20)
    made = [
        RepetitionPenaltyLogitsProcessor(1.0 + rng.random()),
        NoBadWordsLogitsProcessor([[rng.randrange(VOCAB)], [rng.randrange(VOCAB) for _ in range(2)]]),
        PrefixConstrainedLogitsProcessor(lambda _, ids: allowed[len(ids) % 3 :], 1),
    ]
    return [*rng.sample(made, rng.randint(0, 3)), Recorder()] if rng.random() < 0.7 else []


def shaped_requests(rng: random.Random, count: int) -> list[Request]:
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(count)]
    return [
        Request(
            rng.choice(prompts),
            max_new_tokens=(most := rng.randint(1, 10)),
            temperature=rng.choice([0.0, 0.0, 0.7]),
            top_k=rng.choice([0, 7]),
            top_p=rng.choice([1.0, 0.8]),
            seed=rng.randrange(1000),
            n=rng.choice([1, 1, 3]),
            stop_token_ids=rng.sample(range(VOCAB), 12),
            min_new_tokens=rng.randint(0, most),
            logits_processor=rng.choice([list, tuple, LogitsProcessorList])(processors(rng)),
            logprobs=rng.choice([None, 0, 3, VOCAB + 5]),
            prompt_logprobs=rng.choice([None, 0, 2]),
            priority=rng.randrange(3),
        )
        for _ in range(count)
    ]


def generated(model, request: Request) -> tuple[list[int], list[dict[int, float]]]:
    """The oracle of a greedy request: tokens and log probabilities of `generate()`."""
    ids = torch.tensor([request.token_ids], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=request.max_new_tokens,
        min_new_tokens=request.min_new_tokens,
        eos_token_id=list(request.stop_token_ids),
        pad_token_id=0,
        logits_processor=LogitsProcessorList(p for p in request.logits_processor if not isinstance(p, Recorder)),
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    chosen = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)[0].tolist()
    told = []
    for token, value, scores in zip(tokens, chosen, out.scores, strict=True):
        top = scores[0].log_softmax(-1).topk(min(request.logprobs or 0, VOCAB))
        entry = {token: value} | dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        told.append({token: value for token, value in entry.items() if value != -torch.inf})
    return tokens, told


def same(found: list, expected: list) -> bool:
    """Whether log probabilities are equal to rounding. Of two likely ones that are equal either may be named."""
    return len(found) == len(expected) and all(
        (a is None and b is None)
        or (len(a) == len(b) and all(abs(a[token] - b[token]) < 1e-4 for token in a.keys() & b.keys()))
        for a, b in zip(found, expected, strict=True)
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["paged", "prefix", "contiguous", "prefix+offload"]),
    spare=st.integers(0, 100),
    chunk=st.integers(1, 60),
    ahead=st.booleans(),
)
def test_any_request_gets_what_generate_gives(seed, name, spare, chunk, ahead):
    """Small pools preempt, small chunks split prompts, steps are launched ahead or not. Sampled rows are compared with
    the native cache, one at a time, under the same processors.
    """
    rng = random.Random(seed)
    requests = shaped_requests(rng, rng.randint(1, 6))
    size = 512 if name == "contiguous" else 4
    tokens = 6 * 512 if name == "contiguous" else 48 + spare
    options = {"resident": "kv", "host_bytes": 1 << 16} if "offload" in name else {}
    options |= {} if name == "contiguous" else {"block_size": size}
    strategy = build(name, MODEL, num_blocks=tokens // size, **options)
    runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=4 + chunk)
    runner._lookahead = ahead
    results = runner.generate(requests)
    strategy.check_integrity()
    for request in requests:  # the recorders begin anew
        for processor in request.logits_processor:
            processor.__dict__.pop("seen", None)
            processor.seen = None
    alone = Runner(MODEL, build("baseline", MODEL)).generate(requests)
    for found, expected in zip(results, sorted(alone, key=lambda r: (r.request_id, r.sample_index)), strict=True):
        request = requests[found.request_id]
        assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)
        if request.logprobs is not None:
            assert same(found.logprobs, expected.logprobs)
        if request.prompt_logprobs is not None:
            assert same(found.prompt_logprobs, expected.prompt_logprobs)
        if request.temperature == 0:
            tokens, told = generated(MODEL, request)
            assert found.token_ids == tokens
            assert found.logprobs is None if request.logprobs is None else same(found.logprobs, told)


@pytest.mark.parametrize("name", ["paged", "prefix"])
def test_steps_that_replay_graphs_give_the_same(name, monkeypatch, device):
    """Logits lie where the graph left them: those who ask read them before the next step."""
    model = tiny_llama(num_layers=1).to(device)
    rng = random.Random(5)
    requests = shaped_requests(rng, 6)
    alone = Runner(model, build("baseline", model)).generate(requests)
    for request in requests:
        request.logits_processor = [p for p in request.logits_processor if not isinstance(p, Recorder)]
    runner = replaying_runner(model, build(name, model, num_blocks=100), monkeypatch, max_num_seqs=3)
    found = runner.generate(requests)
    for result, expected in zip(found, sorted(alone, key=lambda r: (r.request_id, r.sample_index)), strict=True):
        assert result.token_ids == expected.token_ids
        assert result.logprobs == expected.logprobs or same(result.logprobs, expected.logprobs)
    assert runner._graphs._graphs


def test_log_probabilities_come_with_the_events():
    runner = Runner(MODEL, build("prefix", MODEL, num_blocks=20))
    request = Request([1, 2, 3], max_new_tokens=4, logprobs=1, prompt_logprobs=0)
    events = list(runner.stream([request]))
    assert [event.logprobs for event in events] == events[-1].result.logprobs
    assert all(event.token_id in event.logprobs for event in events)
    with torch.inference_mode():
        expected = MODEL(torch.tensor([request.token_ids])).logits[0].log_softmax(-1)
    assert same(events[-1].result.prompt_logprobs, [None, {2: expected[0, 2].item()}, {3: expected[1, 3].item()}])


@pytest.fixture(scope="module")
def default():
    return load_model(dtype=torch.float32, device="cpu")


class TestStopStrings:
    @pytest.mark.parametrize("text", ["Hello, wörld", "日本語と🙂 end", "a  b\n\nc", "naïve 🙂🙂"])
    def test_any_part_of_any_text_is_found_where_it_ends(self, default, text):
        """Also where it begins in the prompt, and where a character takes several tokens."""
        tokenizer = default[1]
        ids = tokenizer(text).input_ids
        for start, stop in combinations(range(len(text) + 1), 2):
            string = text[start:stop]
            counts = [tokenizer.decode(ids[:n]).count(string) for n in range(len(ids) + 1)]
            for end in range(2, len(ids) + 1):
                num_prompt = random.Random(end).randrange(1, end)
                found = completes(tokenizer, [string], ids[:num_prompt], ids[num_prompt:end])
                assert found == (counts[end] > counts[end - 1])

    @pytest.mark.parametrize(
        ("text", "stop"), [("a aa ab aba", ["aa"]), ("\n\n\nx", ["\n\n"]), ("🙂日 🙂🙂", ["🙂🙂", "日"])]
    )
    def test_what_overlaps_itself_is_found_where_generate_finds_it(self, default, text, stop):
        tokenizer, rng = default[1], random.Random(0)
        alphabet, criteria = tokenizer(list(text)).input_ids, StopStringCriteria(tokenizer, stop)
        outcomes = set()
        for _ in range(200):
            row = [token for letter in rng.choices(alphabet, k=rng.randint(2, 6)) for token in letter]
            num_prompt = rng.randrange(1, len(row))
            found = completes(tokenizer, stop, row[:num_prompt], row[num_prompt:])
            assert found == bool(criteria(torch.tensor([row]), None)[0])
            outcomes.add(found)
        assert outcomes == {True, False}

    def test_the_runner_stops_where_generate_does(self, default):
        model, tokenizer = default
        text = "The capital of France is"
        ids = tokenizer(text, return_tensors="pt")
        for stop in ([" Par"], ["is a", ","], "the"):
            out = model.generate(**ids, max_new_tokens=12, do_sample=False, stop_strings=stop, tokenizer=tokenizer)
            runner = Runner(model, build("paged", model, num_blocks=8))
            (found,) = runner.generate([Request(ids.input_ids, max_new_tokens=12, stop=stop)])
            assert found.token_ids == out[0, ids.input_ids.shape[1] :].tolist()
            stops = [stop] if isinstance(stop, str) else stop
            assert found.finish_reason == (
                "stop" if any(s in tokenizer.decode(found.token_ids) for s in stops) else "length"
            )


def test_the_urgent_start_first_and_are_preempted_last():
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=12, block_size=4), max_num_seqs=2)
    requests = [Request([i + 1] * 10, max_new_tokens=20, priority=p) for i, p in enumerate([0, 2, 1, 2])]
    ends = [event.request_id for event in runner.stream(requests) if event.result is not None]
    assert runner.num_preemptions > 0 and ends == [1, 3, 2, 0]


@pytest.mark.parametrize("name", ["paged", "baseline"])
def test_a_deadline_ends_a_request_with_what_it_has(name, monkeypatch):
    strategy = build(name, MODEL, **({} if name == "baseline" else {"num_blocks": 100}))
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    late = Request([1, 2], max_new_tokens=400, deadline=25, n=2, request_id="late")
    never = Request([3, 4], max_new_tokens=30, request_id="never")
    results = Runner(MODEL, strategy, max_num_seqs=3).generate([late, never])
    assert [(r.request_id, r.finish_reason) for r in results] == [("late", "deadline")] * 2 + [("never", "length")]
    assert all(len(r.token_ids) < 30 for r in results[:2]) and results[0].token_ids
    strategy.check_integrity()
    monkeypatch.undo()
    waiting = Runner(MODEL, strategy).generate([Request([1], n=3, deadline=1e-9)])
    assert [(r.finish_reason, r.token_ids) for r in waiting] == [("deadline", [])] * 3


def test_what_is_cancelled_says_so():
    strategy = build("paged", MODEL, num_blocks=100)
    runner = Runner(MODEL, strategy, max_num_seqs=3)
    runner.submit([Request([1, 2], n=2, request_id="a"), Request([3], n=3, request_id="b")])
    first = [*runner.step(), *runner.step()]
    runner.cancel("a")
    runner.cancel("b")
    runner.cancel("nobody")
    ended = {(e.request_id, e.sample_index): e.result for e in runner.step()}
    assert {key: (r.finish_reason, len(r.token_ids)) for key, r in ended.items()} == {
        ("a", 0): ("cancelled", 2), ("a", 1): ("cancelled", 2),
        ("b", 0): ("cancelled", 0), ("b", 1): ("cancelled", 0), ("b", 2): ("cancelled", 0),
    }  # fmt: skip
    assert len(first) == 4 and runner.step() == [] and strategy.stats()["blocks_used"] == 0


def test_the_baseline_says_that_it_has_no_steps():
    runner = Runner(MODEL, build("baseline", MODEL))
    for call in (lambda: runner.submit([[1]]), runner.step, lambda: runner.cancel("a")):
        with pytest.raises(ValueError, match="use generate or stream; leaving a stream cancels it"):
            call()


def test_async_streams_run_side_by_side_and_end_early():
    strategy = build("paged", MODEL, num_blocks=200)
    runner = Runner(MODEL, strategy)
    expected = runner.generate([Request([i, 2], max_new_tokens=15) for i in range(3)])

    async def consume(i):
        request = Request([i, 2], max_new_tokens=15)  # as others, number 0 of its call
        return [event.token_id async for event in runner.astream([request])]

    async def leave_early():
        events = runner.astream([Request([9], max_new_tokens=100, request_id="left")])
        async for _ in events:
            break
        await events.aclose()

    async def be_cancelled():
        task = asyncio.create_task(consume(40))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def all_of_them():
        *found, _, _ = await asyncio.gather(*map(consume, range(3)), leave_early(), be_cancelled())
        return found

    assert asyncio.run(all_of_them()) == [result.token_ids for result in expected]
    assert runner.num_running == runner.num_waiting == 0 and strategy.stats()["blocks_used"] == 0


def test_the_end_of_sequence_is_the_generation_configs_of_the_moment():
    model = tiny_llama(num_layers=1)
    runner = Runner(model, build("paged", model, num_blocks=20))
    (found,) = runner.generate([Request([1, 2, 3], max_new_tokens=20)])
    model.generation_config.eos_token_id = [found.token_ids[3], VOCAB + 7]
    (stopped,) = runner.generate([Request([1, 2, 3], max_new_tokens=20)])
    assert stopped.finish_reason == "stop" and stopped.token_ids[-1] == found.token_ids[3]
    (held,) = runner.generate([Request([1, 2, 3], max_new_tokens=20, min_new_tokens=20)])
    assert found.token_ids[3] not in held.token_ids[:19]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_new_tokens": 9}, "min_new_tokens must be from 0 to max_new_tokens = 8, got 9"),
        ({"logprobs": -1}, "count tokens beside the chosen one"),
        ({"logprobs": True}, "logprobs takes a whole number or none"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs takes a whole number or none"),
        ({"deadline": 0}, "deadline must be more than 0 seconds"),
        ({"deadline": float("nan")}, "deadline takes a number"),
        ({"priority": "high"}, "priority takes a whole number"),
        ({"logits_processor": [RepetitionPenaltyLogitsProcessor]}, "must be callable with input_ids and scores"),
        ({"logits_processor": 3}, "logits_processor takes a list, got int"),
        ({"stop": [""]}, "stop takes text, or a list of texts, none of them empty"),
        ({"stop": 7}, "stop takes a list, got int"),
        ({"stop": "x"}, "stop strings need a tokenizer"),
    ],
)
def test_what_a_request_cannot_ask_for(given, message):
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=8))
    with pytest.raises(ValueError, match=f"request 'a': .*{message}"):
        runner.generate([Request([1], max_new_tokens=8, request_id="a", **given)])
    assert runner.num_waiting == 0
