"""Off the normal paths: a step is a transaction, everything has an owner, what is accepted is finished.

Each test is a fault that was seen to give a wrong answer, to lose a request, or to stop a runner for good.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from common import VOCAB, baseline_tokens, random_requests, tiny_llama
from transformers import DynamicCache

import kv_strategies
from kv_strategies import Request, Runner, build
from kv_strategies.kernels import FAST
from kv_strategies.paged import OutOfBlocks
from kv_strategies.speculative import PromptLookup
from kv_strategies.step.upstream import with_cache
from kv_strategies.strategy import Strategy

MODEL = tiny_llama()
HOME = kv_strategies.__path__[0]
NAMES = ["paged", "prefix", "window", "prefix+offload", "prefix+window+int8"]
SMALL = {"num_blocks": 60, "block_size": 4}


def options_of(name: str) -> dict:
    return SMALL | ({"window": 8, "sinks": 2, "rebase_at": 28} if "window" in name else {})


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, VOCAB) for _ in range(length)]


class Fault(RuntimeError):
    """As if a device were out of memory."""


class FailsOnce:
    """Stands in for a method of a class: raises at the n-th call, works otherwise."""

    def __init__(self, monkeypatch, owner, name: str, at: int):
        self.method, self.at, self.calls = getattr(owner, name), at, 0
        monkeypatch.setattr(owner, name, lambda *args, **options: self(*args, **options))

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == self.at:
            raise Fault
        return self.method(*args, **options)


def drain(runner: Runner) -> list:
    """Step until all is done, over any number of faults."""
    events = []
    for _ in range(2000):
        if not (runner.num_running or runner.num_waiting):
            return events
        try:
            events += runner.step()
        except Fault:
            runner.strategy.check_integrity()
    raise AssertionError("the runner does not come to an end")


def tokens_of(events) -> dict:
    return {(e.request_id, e.sample_index): e.result.token_ids for e in events if e.result is not None}


# --- A. state advances when the work is done


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [1, 2, 5, 8, 13, 21, 34])
@pytest.mark.parametrize(
    "method", ["attend", "reserve", "sample", "append", "allocate", "fork", "has_room", "publish", "copy", "draw"]
)
def test_a_step_that_raises_is_as_if_it_had_not_been(name, at, method, monkeypatch):
    from kv_strategies import runner as runner_module
    from kv_strategies.paged import BlockPool, BlockTable

    requests = random_requests(random.Random(at), 7, longest=30)
    for index, request in enumerate(requests):
        request.request_id = index
    expected = {(r.request_id, r.sample_index): r.token_ids for r in whole(name, requests)}
    strategy = build(name, MODEL, **options_of(name))
    runner = Runner(MODEL, strategy, max_num_seqs=6, max_batch_tokens=17)
    owner = {
        "attend": (Strategy, "attend"),
        "reserve": (Strategy, "reserve"),
        "sample": (runner_module, "sample"),
        "draw": (Runner, "_draw"),
        "append": (BlockTable, "append"),
        "allocate": (BlockPool, "allocate_run"),
        "fork": (BlockTable, "fork"),
        "has_room": (Strategy, "has_room"),
        "publish": (type(strategy.sharing), "publish"),
        "copy": (type(strategy.placement), "copy_blocks"),
    }[method]
    fault = FailsOnce(monkeypatch, *owner, at)
    runner.submit(requests)
    assert tokens_of(drain(runner)) == expected, f"after {fault.calls} calls"
    strategy.check_integrity()
    monkeypatch.undo()
    again = Runner(MODEL, strategy, max_num_seqs=6).generate(requests)  # nothing wrong was published
    assert {(r.request_id, r.sample_index): r.token_ids for r in again} == expected


class OutOfMemory(Fault):
    """Inside, a device has no memory left from the n-th call of torch that the package makes, for `burst` of them."""

    def __init__(self, at: int, burst: int):
        self.left, self.burst = at, burst

    def _watch(self, frame, event, arg):
        if event != "c_call" or not frame.f_code.co_filename.startswith(HOME):
            return
        owner = getattr(arg, "__self__", None)
        home = getattr(arg, "__module__", None) or type(owner).__module__
        if isinstance(owner, torch.Tensor) or home.startswith("torch"):
            self.left -= 1
            if -self.burst < self.left <= 0:
                raise Fault

    def __enter__(self):
        sys.setprofile(self._watch)

    def __exit__(self, *error):
        sys.setprofile(None)


@pytest.mark.parametrize("guesses", [None, PromptLookup(3)])
@pytest.mark.parametrize("name", ["prefix", "offload"])
def test_memory_that_ends_at_any_operation(name, guesses):
    """Also where what undoes a step, or reads its tokens, finds none."""
    model = tiny_llama(num_heads=2, num_kv_heads=1)
    stem = prompt(13)
    asks = [{"n": 2, "temperature": 0.8, "seed": 1}, {"logprobs": 2}, {"prompt_logprobs": 1, "min_new_tokens": 2}, {}]
    requests = [
        Request(stem[: 13 - i] + prompt(5 * i, i), max_new_tokens=4, request_id=i, **ask) for i, ask in enumerate(asks)
    ]
    options = {"num_blocks": 16, "block_size": 4}
    expected = {}
    for at in itertools.count(0, 89):
        strategy = build(name, model, **options)
        runner = Runner(model, strategy, max_num_seqs=5, max_batch_tokens=17, speculate=guesses)
        runner.submit(requests)
        events, memory = [], OutOfMemory(at or 10**9, 1 + at % 7)
        while runner.num_running or runner.num_waiting:
            try:
                with memory:
                    events += runner.step()
            except Fault:
                strategy.check_integrity()
        found = tokens_of(events + runner.step())
        expected = expected or found
        assert found == expected, at
        strategy.check_integrity()
        assert strategy.stats()["blocks_used"] == 0
        if at and memory.left > 0:
            break
    assert at > 1000 and len(expected) == 5


def whole(name: str, requests):
    """What a runner gives that is never disturbed."""
    return Runner(MODEL, build(name, MODEL, **options_of(name)), max_num_seqs=6, max_batch_tokens=17).generate(requests)


@pytest.mark.parametrize("at", range(1, 9))
def test_beams_that_cannot_fork_give_all_blocks_back(at, monkeypatch):
    from kv_strategies.paged import BlockTable

    strategy, ids = build("paged", MODEL, **SMALL), torch.tensor([prompt(9)])
    FailsOnce(monkeypatch, BlockTable, "fork", at)
    with pytest.raises(Fault):
        MODEL.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False, **with_cache(strategy.cache(ids)))
    strategy.check_integrity()
    assert strategy.stats()["blocks_used"] == 0


@pytest.mark.parametrize("name", ["paged", "prefix"])
def test_cached_tokens_are_those_that_were_there_when_the_request_came(name):
    """Not those that it has computed itself before a preemption, nor what its samples share."""
    strategy = build(name, MODEL, **SMALL)
    runner = Runner(MODEL, strategy)
    runner.submit([Request(prompt(30), max_new_tokens=6, n=2), Request(prompt(25, 1), max_new_tokens=6)])
    events = runner.step()
    for _ in range(3):
        with strategy.lock:
            runner._preempt(runner._running[-1])
        events += runner.step()
    events += drain(runner)
    assert [event.result.num_cached_tokens for event in events if event.result is not None] == [0, 0, 0]
    strategy.check_integrity()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_rebase_that_raises_computes_the_row_again(at, monkeypatch):
    strategy = build("window", MODEL, **options_of("window"))
    runner = Runner(MODEL, strategy)
    requests = [Request(prompt(20, i), max_new_tokens=50, request_id=i) for i in range(2)]
    expected = {(r.request_id, 0): r.token_ids for r in whole("window", requests)}
    FailsOnce(monkeypatch, Strategy, "_turn_keys", at)
    runner.submit(requests)
    assert tokens_of(drain(runner)) == expected


@pytest.mark.parametrize("name", ["paged", "prefix", "window"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_generate_again_with_the_same_cache(name, given, at, monkeypatch):
    strategy = build(name, MODEL, **SMALL)
    ids = torch.tensor([prompt(30)])
    expected = MODEL.generate(ids, max_new_tokens=5, do_sample=False)
    Runner(MODEL, strategy).generate([prompt(30)[:13]])
    cache = strategy.cache(ids) if given else strategy.cache()
    FailsOnce(monkeypatch, Strategy, "attend", at)
    failed = False
    for _ in range(2):
        try:
            out = MODEL.generate(ids, max_new_tokens=5, do_sample=False, **with_cache(cache))
            break
        except Fault:
            failed = True
        except ValueError as error:  # the prompt was cached before the fault: the cache cannot take it again
            assert "give it a new one" in str(error) and at > 2
            out = expected
            break
    assert failed and torch.equal(out, expected)
    del cache
    strategy.check_integrity()
    assert [r.token_ids for r in Runner(MODEL, strategy).generate([Request(prompt(30), max_new_tokens=5)])] == (
        baseline_tokens(MODEL, [Request(prompt(30), max_new_tokens=5)])
    )


@pytest.mark.parametrize("length", [1, 2, 20])
def test_a_call_that_fails_behind_the_layers_is_not_continued_wrongly(length, monkeypatch):
    strategy = build("paged", MODEL, **SMALL)
    ids, cache = torch.tensor([prompt(length)]), strategy.cache()
    FailsOnce(monkeypatch, type(MODEL.lm_head), "forward", MODEL.config.num_hidden_layers * 7 + 1)
    strategy.fused = False
    with pytest.raises(Fault):
        MODEL.generate(ids, max_new_tokens=3, do_sample=False, **with_cache(cache))
    with pytest.raises(ValueError, match="begins again at position 0"):
        MODEL.generate(ids, max_new_tokens=3, do_sample=False, **with_cache(cache))


def test_a_failed_queueing_leaves_nothing_queued():
    runner = Runner(MODEL, build("paged", MODEL, **SMALL))
    with pytest.raises(ValueError, match="seed takes a whole number"):
        runner.submit([Request([1, 2], request_id="a"), Request([1], seed="7")])
    assert runner.num_waiting == 0
    assert len(runner.generate([Request([1, 2], request_id="a", max_new_tokens=2)])) == 1


def test_events_of_a_call_that_raised_are_gone(monkeypatch):
    runner = Runner(MODEL, build("paged", MODEL, **SMALL))
    FailsOnce(monkeypatch, Strategy, "attend", 7)
    with pytest.raises(Fault):
        runner.generate([Request(prompt(4), max_new_tokens=9), Request(prompt(5), max_new_tokens=1)])
    assert not runner.num_running and not runner.num_waiting
    assert len(runner.generate([Request(prompt(3), max_new_tokens=2)])) == 1 and runner.step() == []
    assert runner.strategy.stats()["blocks_used"] == 0


# --- B. everything has one owner


def test_events_reach_who_asked_for_the_request():
    runner = Runner(MODEL, build("paged", MODEL, **SMALL))
    a, b = Request(prompt(5), max_new_tokens=6, request_id="a"), Request(prompt(7), max_new_tokens=9, request_id="b")
    expected = baseline_tokens(MODEL, [a, b])
    runner.submit([a])
    assert [r.token_ids for r in runner.generate([b])] == expected[1:]
    assert tokens_of(drain(runner) + runner.step()) == {("a", 0): expected[0]}


def test_nested_and_interleaved_calls_lose_nothing():
    runner = Runner(MODEL, build("paged", MODEL, **SMALL))
    asked = [Request(prompt(4 + i, i), max_new_tokens=10, request_id=i) for i in range(4)]
    expected = baseline_tokens(MODEL, asked)
    outer = []
    for event in runner.stream(asked[:1]):
        outer.append(event.token_id)
        if len(outer) == 3:
            assert [r.token_ids for r in runner.generate(asked[1:2])] == expected[1:2]
    assert outer == expected[0]
    streams = [runner.stream([request]) for request in asked[2:]]
    found = [[], []]
    while streams:
        for index, stream in list(enumerate(streams)):
            event = next(stream, None)
            if event is None:
                streams.remove(stream)
            else:
                found[event.request_id - 2].append(event.token_id)
                assert index < 2
    assert found == expected[2:]


def test_leaving_a_stream_gives_everything_back():
    runner = Runner(MODEL, build("prefix", MODEL, **SMALL))
    for _ in runner.stream([Request(prompt(9, i), max_new_tokens=20, n=2) for i in range(3)]):
        break
    gc.collect()
    assert not runner.num_running and not runner.num_waiting and runner.strategy.stats()["blocks_used"] == 0


def asking(at_work: Callable[[], object]) -> Callable:
    """A logits processor that does something else as well when it is first called."""
    left = [at_work]

    def process(input_ids, scores):
        if left:
            left.pop()()
        return scores

    return process


@pytest.mark.parametrize(
    ("what", "reasons"),
    [
        ("drop a stream", "length length"), ("close a stream", "length length"), ("cancel a", "cancelled length"),
        ("cancel b", "length cancelled"), ("submit", "length length"), ("step", "error length"),
        ("generate", "error length"), ("reset", "error length"), ("check", "length length"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:request 'a' ends with an error")
def test_what_is_asked_for_in_the_middle_of_a_step(what, reasons):
    """By a logits processor, or by the garbage collector, which closes streams whenever it finds them."""
    strategy = build("prefix", MODEL, **SMALL)
    runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=17)
    streams = [runner.stream([Request(prompt(9, 3), max_new_tokens=50, request_id="stream")])]
    next(streams[0])

    def drop():
        circle = [streams.pop()]
        circle.append(circle)
        del circle
        gc.collect()

    work = {
        "drop a stream": drop,
        "close a stream": lambda: streams.pop().close(),
        "cancel a": lambda: runner.cancel("a"),
        "cancel b": lambda: runner.cancel("b"),
        "submit": lambda: runner.submit([Request(prompt(20, 2), request_id="c")]),
        "step": runner.step,
        "generate": lambda: runner.generate([prompt(20, 2)]),
        "reset": strategy.reset,
        "check": strategy.check_integrity,
    }[what]
    requests = [Request(prompt(20, i), max_new_tokens=6, request_id="ab"[i]) for i in range(2)]
    expected = baseline_tokens(MODEL, requests)
    requests[0].logits_processor = asking(work)
    runner.submit(requests)
    found = {}
    while not {"a", "b"} <= found.keys():
        found |= {event.request_id: event.result for event in runner.step() if event.result is not None}
    assert f"{found['a'].finish_reason} {found['b'].finish_reason}" == reasons
    for name, tokens in zip("ab", expected, strict=True):
        assert found[name].token_ids == tokens[: len(found[name].token_ids)]
    streams.clear()
    drain(runner)
    strategy.check_integrity()
    assert strategy.stats()["blocks_used"] == 0


def test_a_dropped_runner_gives_its_blocks_back():
    strategy = build("paged", MODEL, **SMALL)
    runner = Runner(MODEL, strategy)
    runner.submit([Request(prompt(30), max_new_tokens=60)])
    runner.step()
    del runner
    gc.collect()
    strategy.check_integrity()
    assert strategy.stats()["blocks_free"] == 60
    assert len(Runner(MODEL, strategy).generate([Request(prompt(100), max_new_tokens=100)])) == 1


@pytest.mark.parametrize("name", ["paged", "prefix", "offload", "prefix+offload", "window+int8"])
def test_generate_in_threads(name):
    """Threads wait for each other, a forward at a time."""
    strategy = build(name, MODEL, num_blocks=200, block_size=4)
    prompts = [torch.tensor([prompt(25, i % 3)]) for i in range(12)]
    one = strategy if name == "window+int8" else None
    expected = []
    for ids in prompts:
        cache = one.cache() if one else DynamicCache(config=MODEL.config)
        expected.append(MODEL.generate(ids, max_new_tokens=8, do_sample=False, **with_cache(cache)).tolist())
    found, errors = [None] * len(prompts), []

    def call(index: int) -> None:
        try:
            cache = strategy.cache(prompts[index]) if index % 2 else strategy.cache()
            out = MODEL.generate(prompts[index], max_new_tokens=8, do_sample=False, **with_cache(cache))
            found[index] = out.tolist()
        except Exception as error:
            errors.append(error)

    for begin in range(0, len(prompts), 4):
        threads = [threading.Thread(target=call, args=(begin + i,)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not errors and found == expected
    gc.collect()
    strategy.check_integrity()


def test_one_runner_in_threads():
    runner = Runner(MODEL, build("prefix", MODEL, **SMALL))
    asked = [[Request(prompt(6 + i, i), max_new_tokens=9, request_id=(t, i)) for i in range(3)] for t in range(3)]
    expected = [baseline_tokens(MODEL, requests) for requests in asked]
    found = [None] * 3

    def call(index: int) -> None:
        found[index] = [r.token_ids for r in runner.generate(asked[index])]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == expected


def test_a_request_that_cannot_have_its_blocks_is_refused_at_submission():
    strategy = build("paged", MODEL, **SMALL)
    ids = torch.tensor([prompt(100)])
    cache = strategy.cache()
    MODEL.generate(ids, max_new_tokens=60, do_sample=False, **with_cache(cache))
    runner = Runner(MODEL, strategy)
    with pytest.raises(ValueError, match=r"needs 30 blocks at once, and 20 of 60 .*; 40 are held"):
        runner.submit([Request(prompt(60), max_new_tokens=60)])
    del cache
    assert len(runner.generate([Request(prompt(60), max_new_tokens=60)])) == 1


def test_what_is_promised_nobody_else_is_given():
    """A call of generate() that would take what an accepted request needs is the one that is refused."""
    strategy = build("paged", MODEL, **SMALL)
    runner = Runner(MODEL, strategy)
    request = Request(prompt(40), max_new_tokens=100, request_id="long")
    runner.submit([request])
    runner.step()
    cache = strategy.cache()
    with pytest.raises(OutOfBlocks, match="promised to accepted requests"):
        MODEL.generate(torch.tensor([prompt(120)]), max_new_tokens=9, do_sample=False, **with_cache(cache))
    found = tokens_of(drain(runner) + runner.step())
    assert found == {("long", 0): baseline_tokens(MODEL, [request])[0]}
    MODEL.generate(torch.tensor([prompt(120)]), max_new_tokens=9, do_sample=False, **with_cache(strategy.cache()))


@pytest.mark.parametrize("is_running", [False, True])
def test_what_is_promised_is_not_preloaded(is_running):
    """All of the prompt is cached, idle or in use by the runner itself, and nothing would have to be allocated."""
    strategy = build("prefix", MODEL, num_blocks=20, block_size=4)
    runner = Runner(MODEL, strategy, max_num_seqs=1)
    requests = [Request(prompt(41), max_new_tokens=4, request_id=0), Request(prompt(50, 1), 10, request_id=1)]
    expected = baseline_tokens(MODEL, requests)
    events = []
    if is_running:
        runner.submit(requests)
        events += runner.step()
    else:
        runner.generate(requests[:1])
        runner.submit(requests[1:])
    with pytest.raises(OutOfBlocks, match="promised to accepted requests"):
        strategy.preload(prompt(41)[:40])
    assert strategy.stats()["blocks_pinned"] == 0
    assert tokens_of(events + drain(runner)) == {(i, 0): expected[i] for i in ([0, 1] if is_running else [1])}
    strategy.preload(prompt(41)[:40])


def test_two_runners_on_one_pool_finish():
    strategy = build("paged", MODEL, **SMALL)
    runners = [Runner(MODEL, strategy) for _ in range(2)]
    asked = [[Request(prompt(20 + i, i), max_new_tokens=60, request_id=i) for i in range(4)] for _ in runners]
    for runner, requests in zip(runners, asked, strict=True):
        runner.submit(requests)
    events = [[], []]
    for _ in range(3000):
        for index, runner in enumerate(runners):
            if runner.num_running or runner.num_waiting:
                events[index] += runner.step()
    expected = baseline_tokens(MODEL, asked[0])
    for found in events:
        assert tokens_of(found) == {(i, 0): tokens for i, tokens in enumerate(expected)}


def test_who_holds_blocks_is_said():
    strategy = build("paged", MODEL, **SMALL)
    kept = strategy.cache()
    MODEL.generate(torch.tensor([prompt(200)]), max_new_tokens=2, do_sample=False, **with_cache(kept))
    with pytest.raises(OutOfBlocks, match=r"51 are held by 1 rows of generate\(\) caches.*201 tokens.*kept output"):
        MODEL.generate(torch.tensor([prompt(100)]), max_new_tokens=2, do_sample=False, **with_cache(strategy.cache()))


# --- D. input is checked where it enters


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([prompt(5)]),
        np.array([prompt(5)], dtype=np.int32),
        prompt(5),
        tuple(prompt(5)),
        torch.tensor(prompt(5)),
    ],
)
def test_every_form_of_a_prompt(ids):
    expected = baseline_tokens(MODEL, [Request(prompt(5), max_new_tokens=4)])
    results = Runner(MODEL, build("paged", MODEL, **SMALL)).generate(
        [Request(ids, max_new_tokens=4.0, n=1.0, seed=np.uint32(3))]
    )
    assert [r.token_ids for r in results] == expected


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": torch.tensor([[1, 2], [3, 4]])}, {"token_ids": [1.5, 2.0]}, {"token_ids": "text"},
        {"token_ids": None}, {"token_ids": [[1], [2, 3]]}, {"token_ids": [True, False]}, {"token_ids": []},
        {"token_ids": [VOCAB]}, {"token_ids": [-1]}, {"token_ids": [2**70]}, {"max_new_tokens": 2.5},
        {"max_new_tokens": 0}, {"max_new_tokens": None}, {"seed": 1.5}, {"seed": "7"}, {"n": 1.5}, {"n": 0},
        {"n": 1000}, {"top_k": 2.5}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")},
        {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": -1.0}, {"temperature": "hot"},
        {"salt": 3}, {"salt": None}, {"stop_token_ids": "ab"}, {"stop_token_ids": [1.5]}, {"stop_token_ids": 2.5},
        {"request_id": []}, {"request_id": (1, [2])}, {"max_new_tokens": 10**400}, {"temperature": 10**400},
        {"n": 10**400},
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_nothing_started(change):
    runner = Runner(MODEL, build("paged", MODEL, **SMALL))
    with pytest.raises(ValueError, match="request"):
        runner.submit([Request([1, 2]), Request(**({"token_ids": [1, 2]} | change))])
    assert runner.num_waiting == 0 and runner.step() == []


def broken(input_ids, scores):
    raise KeyError("state")


@pytest.mark.parametrize(
    "given",
    [
        {"logits_processor": broken},
        {"logits_processor": [lambda ids, scores: scores, broken]},
        {"logits_processor": lambda: None},
        *({"logits_processor": lambda ids, scores, form=form: form(scores)} for form in (
            lambda s: None, lambda s: s[0], lambda s: s[:, :5], lambda s: s[:, :1], lambda s: s.tolist(),
            lambda s: torch.cat([s, s]), lambda s: s[0, 0],
        )),
        {"stop": "ab"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["prefix", "baseline"])
def test_what_a_request_brings_along_fails_it_alone(name, given):
    """Its logits processors, and a tokenizer that does not know its tokens."""

    class Tokenizer:
        def decode(self, ids, **options):
            raise IndexError("no such token")

    strategy = build(name, MODEL, **(SMALL if name == "prefix" else {}))
    runner = Runner(MODEL, strategy, tokenizer=Tokenizer())
    others = [Request(prompt(20, i), max_new_tokens=5, request_id=i) for i in range(2)]
    expected = baseline_tokens(MODEL, others)
    with pytest.warns(RuntimeWarning, match="request 'bad' ends with an error: .* has failed"):
        results = runner.generate([others[0], Request(prompt(30), 5, request_id="bad", **given), others[1]])
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert [results[0].token_ids, results[2].token_ids] == expected
    strategy.check_integrity()


def test_processors_that_cannot_be_copied_are_refused_for_samples():
    class Locked:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, input_ids, scores):
            return scores

    runner = Runner(MODEL, build("paged", MODEL, **SMALL))
    with pytest.raises(ValueError, match=r"request 7: 2 samples need 2 copies .* cannot be copied \(TypeError"):
        runner.submit([Request([1, 2]), Request([1, 2], n=2, request_id=7, logits_processor=Locked())])
    assert runner.num_waiting == 0
    assert len(runner.generate([Request([1, 2], logits_processor=Locked())])) == 1


@pytest.mark.parametrize(
    "option",
    [
        {"max_num_seqs": 2.5}, {"max_num_seqs": None}, {"max_num_seqs": True}, {"max_num_seqs": 0},
        {"max_batch_tokens": float("nan")}, {"max_batch_tokens": "2048"}, {"max_batch_tokens": 64},
        {"cuda_graphs": 1}, {"target_itl": float("nan")}, {"tokenizer": 5}, {"warm_up": "yes"},
    ],
)  # fmt: skip
def test_options_of_a_runner_are_checked(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Runner(MODEL, build("paged", MODEL, **SMALL), **option)
    assert Runner(MODEL, build("paged", MODEL, **SMALL), max_num_seqs=2.0).generate([[1, 2, 3]])


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("paged", {"num_blocks": 2**70}), ("paged", {"num_blocks": 10**400}), ("paged", {"block_size": 1e300}),
        ("window", {"window": 2**70}), ("offload", {"host_bytes": 10**400}), ("contiguous", {"max_length": -1}),
    ],
)  # fmt: skip
def test_sizes_that_there_are_not(name, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        build(name, MODEL, **({"num_blocks": 4} | option))


@pytest.mark.parametrize("ids", [[1.5] * 8, [[1, 2], [3, 4]], None, 3, ["a"] * 8, [2**70] * 8, [True] * 8, {}])
def test_what_is_preloaded_and_forgotten_is_checked(ids):
    strategy = build("prefix", MODEL, **SMALL)
    for asked in (strategy.preload, strategy.forget):
        with pytest.raises(ValueError, match="token_ids"):
            asked(ids)
    assert strategy.stats()["blocks_used"] == 0


@pytest.mark.parametrize("stops", [2, [2], None, (), np.array([2]), np.int64(2)])
def test_stop_tokens_in_every_form(stops):
    request = Request(prompt(5), max_new_tokens=30, stop_token_ids=stops)
    runner = Runner(MODEL, build("paged", MODEL, **SMALL))
    assert [r.token_ids for r in runner.generate([request])] == baseline_tokens(MODEL, [request])


@pytest.mark.parametrize("temperature", [1e-45, 3e-38, 1e-31])
@pytest.mark.parametrize("top_k", [0, 2**70])
def test_the_smallest_temperatures_mean_greedy(temperature, top_k):
    greedy = baseline_tokens(MODEL, [Request(prompt(9), max_new_tokens=20)])
    request = Request(prompt(9), max_new_tokens=20, temperature=temperature, seed=5, top_k=top_k)
    assert [r.token_ids for r in Runner(MODEL, build("paged", MODEL, **SMALL)).generate([request])] == greedy


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_no_numbers_end_their_request_alone(temperature):
    model = tiny_llama()
    model.model.embed_tokens.weight.data[7] = torch.nan
    requests = [
        Request([1, 2, 3], max_new_tokens=3, temperature=temperature, seed=1),
        Request([5, 7, 5], max_new_tokens=3),
    ]
    strategy = build("prefix", model, **SMALL)
    results = Runner(model, strategy).generate(requests)
    assert results[1].finish_reason == "error" and results[1].token_ids == []
    assert results[0].finish_reason != "error" or 7 in results[0].token_ids
    assert strategy.stats()["blocks_used"] == 0
    assert Runner(model, build("baseline", model)).generate(requests)[1].finish_reason == "error"


def test_built_in_inference_mode_and_used_outside():
    with torch.inference_mode():
        strategy = build("prefix", MODEL, **SMALL)
    ids = torch.tensor([prompt(12)])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = MODEL.generate(ids, max_new_tokens=5, do_sample=False, **with_cache(strategy.cache(ids)))
            assert torch.equal(out, MODEL.generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("name", ["paged", "window", "int8", "prefix+offload"])
def test_default_dtype_and_device_of_the_user(name):
    options = SMALL | ({"window": 8, "sinks": 2} if name == "window" else {})
    requests = [Request(prompt(20 + i, i), max_new_tokens=6) for i in range(3)]
    expected = [r.token_ids for r in Runner(MODEL, build(name, MODEL, **options)).generate(requests)]
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        strategy = build(name, MODEL, **options)
        assert [r.token_ids for r in Runner(MODEL, strategy).generate(requests)] == expected
        assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
        with torch.no_grad():
            ids = torch.tensor([prompt(9)], device="cpu")
            positions = torch.arange(9, device="cpu")[None]
            MODEL(ids, position_ids=positions, **with_cache(strategy.cache(ids)))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_defaults_of_the_user_from_before_the_package_was_imported():
    """What modules make when they are imported is not of the user's default dtype or device either."""
    script = """
import torch
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
from common import tiny_llama
from kv_strategies import Request, Runner, build
torch.set_default_device(None)
torch.set_default_dtype(torch.float32)
model = tiny_llama()
for name in ("paged", "int8", "prefix+offload"):
    runner = Runner(model, build(name, model, num_blocks=40))
    print(runner.generate([Request(range(30), max_new_tokens=4)])[0].token_ids)
"""
    folder = os.path.dirname(__file__)
    told = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    model = tiny_llama()
    for line, name in zip(told.stdout.splitlines(), ("paged", "int8", "prefix+offload"), strict=True):
        runner = Runner(model, build(name, model, num_blocks=40))
        assert json.loads(line) == runner.generate([Request(range(30), max_new_tokens=4)])[0].token_ids


def test_a_second_turn_may_hide_what_came_behind_an_early_end():
    """Rows that ended are padded while others go on; the second turn masks that padding."""
    model = tiny_llama()
    ids = torch.tensor([prompt(6, 1), prompt(6, 2)])
    first = model.generate(ids, max_new_tokens=8, do_sample=False)
    second = torch.cat([first, torch.tensor([prompt(5, 3), prompt(5, 4)])], dim=1)
    mask = torch.ones_like(second)
    mask[0, 10:14] = 0
    outs = []
    for cache in (DynamicCache(config=model.config), build("paged", model, **SMALL).cache()):
        model.generate(ids, max_new_tokens=8, do_sample=False, **with_cache(cache))
        kept = second[:, :] if cache.get_seq_length() == 13 else second
        outs.append(model.generate(kept, attention_mask=mask, max_new_tokens=5, do_sample=False, **with_cache(cache)))
    assert torch.equal(*outs)


def test_train_mode_is_refused_through_both_doors():
    model = tiny_llama()
    runner = Runner(model, build("paged", model, **SMALL))
    model.train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        runner.generate([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        model(torch.tensor([[1, 2]]), **with_cache(build("paged", model, **SMALL).cache()))


# --- what a cache is to Python


def test_caches_are_true_fork_and_refuse_to_be_pickled():
    strategy = build("prefix", MODEL, **SMALL)
    cache = strategy.cache()
    assert cache and bool(strategy.cache(torch.tensor([[1, 2]])))
    ids = torch.tensor([prompt(11)])
    with torch.no_grad():
        MODEL(ids, **with_cache(cache))
    used = strategy.stats()["blocks_used"]
    twin = copy.deepcopy(cache)
    assert strategy.stats()["blocks_used"] == used, "tables are forked, nothing is copied"
    longer = torch.cat([ids, torch.tensor([[5, 6]])], dim=1)
    outs = [
        MODEL.generate(longer, max_new_tokens=4, do_sample=False, **with_cache(c))
        for c in (cache, twin, copy.copy(twin))
    ]
    assert torch.equal(outs[0], outs[1])
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(cache)
    assert strategy.kernels is FAST


def test_what_a_tokenizer_gives_is_a_prompt():
    from transformers import BatchEncoding

    strategy = build("prefix", MODEL, **SMALL)
    given = BatchEncoding(
        {"input_ids": torch.tensor([prompt(9)]), "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    )
    out = MODEL.generate(**given, max_new_tokens=3, do_sample=False, **with_cache(strategy.cache(given)))
    assert torch.equal(out, MODEL.generate(**given, max_new_tokens=3, do_sample=False))
    with pytest.raises(TypeError, match="return_tensors='pt'"):
        strategy.cache([1, 2, 3])


def test_the_runner_stops_where_generate_does():
    model = tiny_llama(eos_token_id=baseline_tokens(MODEL, [Request(prompt(5), max_new_tokens=6)])[0][3])
    ids = torch.tensor([prompt(5)])
    native = model.generate(ids, max_new_tokens=20, do_sample=False)[0, 5:].tolist()
    strategy = build("paged", model, **SMALL)
    assert Runner(model, strategy).generate([Request(prompt(5), max_new_tokens=20)])[0].token_ids == native
    assert (
        len(Runner(model, strategy).generate([Request(prompt(5), max_new_tokens=20, stop_token_ids=())])[0].token_ids)
        == 20
    )
