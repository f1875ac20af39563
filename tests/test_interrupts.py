"""Ctrl-C at any moment at which books are kept: a step, a call or a preload has been, or has not been.

What no Python code can close is left out: Ctrl-C between the end of a call and whoever wanted what it returns, or at
the first instruction of what was to handle it.
"""

from __future__ import annotations

import gc
import random
import signal
import threading

import pytest
import torch
from common import baseline_tokens, every_moment, tiny_llama

import kv_strategies
from kv_strategies import Request, Runner, build
from kv_strategies.step.upstream import with_cache

MODEL = tiny_llama(num_heads=2, num_kv_heads=1)
BOOKS = tuple(f"{kv_strategies.__path__[0]}/{name}" for name in ("paged.py", "prefix.py", "generate.py", "tiers"))
LOCKS = tuple(f"{kv_strategies.__path__[0]}/{name}" for name in ("strategy.py", "generate.py", "step/interrupts.py"))
SMALL = {"num_blocks": 15, "block_size": 4}
REQUESTS = [Request(list(range(1, n)), max_new_tokens=8, request_id=n) for n in (8, 20, 27)]
NAMES = ["paged", "prefix+offload"]


@pytest.fixture(autouse=True)
def frozen():
    """What was there before is not looked through at every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def small(name: str):
    return build(name, MODEL, **SMALL, **({"resident": "kv", "host_bytes": 1 << 20} if "offload" in name else {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_runner_loses_nothing(name):
    """Submit, prefill in chunks, decode, preempt: all requests are there or none, and go on to the right tokens."""
    expected = {n.request_id: tokens for n, tokens in zip(REQUESTS, baseline_tokens(MODEL, REQUESTS), strict=True)}
    strategy = small(name)
    runners = [Runner(MODEL, strategy, max_num_seqs=3, max_batch_tokens=17)]

    def work():
        runners[0].submit(REQUESTS)
        for _ in range(6):  # none comes to its end
            runners[0].step()

    num_preemptions = 0
    for _ in every_moment(work, step=41, of=BOOKS):
        strategy.check_integrity()
        runner = runners.pop()
        assert runner.num_running + runner.num_waiting in (0, 3)
        events = []
        while runner.num_running or runner.num_waiting:
            events += runner.step()
        found = {event.request_id: event.result.token_ids for event in events if event.result is not None}
        assert found in ({}, expected)
        num_preemptions += runner.num_preemptions
        assert strategy.stats()["blocks_used"] == 0
        strategy.reset()
        runners.append(Runner(MODEL, strategy, max_num_seqs=3, max_batch_tokens=17))
    assert num_preemptions


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what a finalizer raises, Python prints
@pytest.mark.parametrize("name", NAMES)
def test_a_call_of_generate_gives_all_back(name):
    strategy, ids = small(name), torch.tensor([list(range(1, 20))])
    expected = MODEL.generate(ids, max_new_tokens=4, do_sample=False)

    def call():
        return MODEL.generate(ids, max_new_tokens=4, do_sample=False, **with_cache(strategy.cache(ids)))

    for _ in every_moment(call, step=7, of=BOOKS):
        gc.collect()
        strategy.check_integrity()
        assert strategy.stats()["blocks_used"] == 0
        assert torch.equal(call(), expected)
        gc.collect()
        strategy.reset()


def _is_free(lock) -> bool:
    """Asked by another thread: the one that was interrupted could enter again."""
    entered = threading.Event()

    def enter():
        with lock:
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    return entered.wait(10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "step"),
    [("stats", 1), ("check_integrity", 1), ("preload", 1), ("save", 1), ("generate", 5), ("cancel", 1)],
)
def test_no_lock_is_left_behind(name, step, tmp_path):
    strategy, ids = small("prefix"), torch.tensor([list(range(1, 20))])
    strategy.preload(list(range(1, 9)))
    work = {
        "preload": lambda: strategy.preload(list(range(1, 9))),
        "save": lambda: strategy.save(tmp_path / "saved"),
        "generate": lambda: MODEL.generate(ids, max_new_tokens=2, **with_cache(strategy.cache(ids))),
        "cancel": lambda: Runner(MODEL, strategy).cancel(0),
    }.get(name) or getattr(strategy, name)
    for _ in every_moment(work, step=step, of=LOCKS):
        assert _is_free(strategy.lock)
        gc.collect()


def test_a_preload_that_raises_keeps_nothing():
    strategy, prompt, told = small("prefix"), list(range(1, 17)), []

    def preload():
        told.append(strategy.preload(prompt))

    for _ in every_moment(preload, of=BOOKS[:2]):
        strategy.check_integrity()
        assert strategy.stats()["blocks_pinned"] == (4 if told else 0)
        if told:
            strategy.forget(prompt)
        assert strategy.stats()["blocks_used"] == 0
        told.clear()


def test_an_alarm_comes_between_steps_as_well():
    """As does whatever another signal raises: a limit of time, an orderly end on SIGTERM."""

    def late(signum, frame):
        raise TimeoutError

    expected, rng = baseline_tokens(MODEL, REQUESTS), random.Random(0)
    strategy = small("prefix+offload")
    runner = Runner(MODEL, strategy, max_num_seqs=3, max_batch_tokens=17)
    before = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)}
    try:
        for number in (signal.SIGALRM, signal.SIGTERM):
            signal.signal(number, late)
        for _ in range(40):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.02))
            try:
                runner.generate(REQUESTS)
            except TimeoutError:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            strategy.check_integrity()
            assert strategy.stats()["blocks_used"] == 0
            assert [signal.getsignal(number) for number in before] == [late, late, before[signal.SIGINT]]
        assert [result.token_ids for result in runner.generate(REQUESTS)] == expected
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
