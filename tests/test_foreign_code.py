"""Code that is not ours, in the middle of a step: whatever it raises, others have the tokens that they have alone."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import sys
import threading
import warnings

import pytest
import torch
from common import VOCAB, baseline_tokens, tiny_llama

from kv_strategies import Request, Runner, build, runner
from kv_strategies.batch import Answering, Line
from kv_strategies.step.upstream import with_cache

MODEL = tiny_llama(num_heads=2, num_kv_heads=1)


class Panic(BaseException):
    """As pyo3 raises, whose tokenizers decode."""


def prompt(seed: int, length: int = 7) -> list[int]:
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Failing:
    """A tokenizer, or a logits processor, that raises at its fourth call."""

    def __init__(self, error: type[BaseException]):
        self.error, self.num_calls = error, 0

    def _count(self) -> None:
        self.num_calls += 1
        if self.num_calls == 4:
            raise self.error("no more")

    def decode(self, ids, **options) -> str:
        self._count()
        return "x" * len(ids)

    def __call__(self, input_ids, scores):
        self._count()
        return scores


def run(runner: Runner, raised: list) -> dict[str, object]:
    """All results, however many steps raise."""
    results = {}
    for _ in range(60):
        try:
            results |= {event.request_id: event.result for event in runner.step() if event.result is not None}
        except BaseException as error:
            raised.append(type(error))
        if not runner.num_running + runner.num_waiting:
            results |= {event.request_id: event.result for event in runner.step() if event.result is not None}
            return results
    pytest.fail(f"{runner.num_running} requests never end")


@pytest.mark.parametrize("are_errors", [False, True], ids=["", "warnings are errors"])
@pytest.mark.parametrize("error", [RuntimeError, Panic, SystemExit])
@pytest.mark.parametrize("what", ["tokenizer", "processor"])
def test_what_a_request_brings_along_ends_it_alone(what, error, are_errors, caplog):
    failing = Failing(error)
    brings = {"stop": ["zzz"]} if what == "tokenizer" else {"logits_processor": failing}
    served = Runner(
        MODEL, build("paged", MODEL, num_blocks=64, block_size=4), max_num_seqs=8, max_batch_tokens=64,
        tokenizer=failing if what == "tokenizer" else None,
    )  # fmt: skip
    others = [Request(prompt(seed), max_new_tokens=10, request_id=seed, stop_token_ids=[VOCAB - 1]) for seed in (1, 2)]
    expected = dict(zip((1, 2), baseline_tokens(MODEL, others), strict=True))
    served.submit([Request(prompt(0), max_new_tokens=10, request_id="bad", **brings), *others])
    raised = []
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error" if are_errors else "ignore")
        results = run(served, raised)
    assert {name: result.token_ids for name, result in results.items() if name != "bad"} == expected
    assert raised == ([SystemExit] if error is SystemExit else [])
    if error is not SystemExit or what == "tokenizer":
        assert results["bad"].finish_reason == "error" and 0 < len(results["bad"].token_ids) < 10
    if are_errors and error is not SystemExit:
        assert f"{error.__name__}: no more" in caplog.text
    served.strategy.check_integrity()
    assert served.strategy.stats()["blocks_used"] == 0


def test_prompts_go_on_in_their_turn_after_a_step_that_failed(monkeypatch):
    """However many later ones come meanwhile."""
    forward, failed = runner.forward, []

    def once(*arguments, **options):
        if not failed:
            failed.append(True)
            raise MemoryError
        return forward(*arguments, **options)

    monkeypatch.setattr(runner, "forward", once)
    served = Runner(
        MODEL, build("paged", MODEL, num_blocks=64, block_size=4), max_num_seqs=8, max_batch_tokens=64,
        cuda_graphs=False,
    )  # fmt: skip
    requests = [Request(prompt(seed), max_new_tokens=4, request_id=seed) for seed in range(3)]
    served.submit(requests)
    with pytest.raises(MemoryError):
        served.step()
    first = []
    for number in range(3, 12):
        served.submit([Request(prompt(number), max_new_tokens=4, request_id=number)])
        first += [event.request_id for event in served.step()]
    assert set(first[:3]) == {0, 1, 2}


# --- what the garbage collector finds


def abandon(generator) -> None:
    """Its first row is taken, and nobody refers to it any more but it to itself, as a kept traceback does."""
    next(generator)
    ring = [generator]
    ring.append(ring)


def ended(work, seconds: float = 60) -> bool:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@pytest.fixture
def by_hand():
    """Garbage is collected when the test says so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_an_abandoned_batch_does_not_lock_out_the_next(by_hand):
    class Collecting:
        def decode(self, ids, **options):
            gc.collect()
            return str(ids)

    answering = Answering(
        Runner(MODEL, build("paged", MODEL, num_blocks=64), max_num_seqs=4, max_batch_tokens=64), Collecting(),
        max_new_tokens=3,
    )  # fmt: skip

    def lines(count):
        return [Line(n + 1, "x", b'{"token_ids": [1, 2, %d]}' % (n + 3)) for n in range(count)]

    abandon(answering(lines(12)))
    rows = []
    assert ended(lambda: rows.extend(answering(lines(9))))
    assert sorted(row["line"] for row in rows) == list(range(1, 10))
    assert answering.runner.num_running == answering.runner.num_waiting == 0


def test_an_abandoned_stream_waits_for_nobody(by_hand):
    """It is found in a thread that is at work on another pool, whose thread finds one of this."""
    served = [Runner(MODEL, build("paged", MODEL, num_blocks=64)) for _ in range(2)]
    both, found = threading.Barrier(2), [threading.Event() for _ in served]

    def collect(number):
        def processor(input_ids, scores):
            both.wait()
            streams[1 - number].clear()  # the last reference: its finalizer runs here
            found[number].set()
            assert found[1 - number].wait(20)
            return scores

        return processor

    streams = [[each.stream([Request(prompt(0), max_new_tokens=50)])] for each in served]
    for stream in streams:
        next(stream[0])
    results = [[], []]

    def ask(number):
        request = Request(prompt(number + 1), max_new_tokens=2, logits_processor=once(collect(number)))
        results[number] += served[number].generate([request])

    def once(processor):
        calls = iter([processor])
        return lambda input_ids, scores: next(calls, lambda _, same: same)(input_ids, scores)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for number, each in enumerate(served):
        assert len(results[number][0].token_ids) == 2
        each.step()
        assert each.num_running == each.num_waiting == 0, "the stream's request has ended"
        assert each.strategy.stats()["blocks_used"] == 0


def test_a_cancel_from_another_thread_is_done_behind_the_step():
    served = Runner(MODEL, build("paged", MODEL, num_blocks=64), max_num_seqs=4)
    begun, go_on = threading.Event(), threading.Event()

    def slow(input_ids, scores):
        begun.set()
        assert go_on.wait(60)
        return scores

    served.submit([Request(prompt(0), max_new_tokens=40, request_id="long", logits_processor=slow)])
    step = threading.Thread(target=served.step, daemon=True)
    step.start()
    assert begun.wait(60)
    served.cancel("long")
    go_on.set()
    step.join(60)
    events = served.step()
    assert [event.result.finish_reason for event in events if event.result] == ["cancelled"] and not served.num_running


# --- and caches whose forward ended in its middle


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda cache: cache.reorder_cache(torch.tensor([0])),
        lambda cache: cache.batch_repeat_interleave(1),
        lambda cache: cache.batch_select_indices(torch.tensor([True])),
        lambda cache: cache.compact(),
    ],
    ids=["copy", "reorder", "repeat", "select", "compact"],
)
def test_a_forward_that_never_reached_the_layers_leaves_nothing(change):
    strategy = build("paged", MODEL, num_blocks=64, block_size=4)
    ids, two = torch.tensor([prompt(3, 10)]), torch.tensor([[5, 9]])
    with torch.no_grad():
        expected = MODEL(torch.cat([ids, two], 1)).logits[0, -1]
        cache = strategy.cache()
        MODEL(ids, **with_cache(cache))
        hook = MODEL.model.rotary_emb.register_forward_pre_hook(lambda *_: sys.exit("between plan and layers"))
        with contextlib.suppress(SystemExit):
            MODEL(two, **with_cache(cache))
        hook.remove()
        cache = change(cache) or cache
        assert torch.allclose(MODEL(two, **with_cache(cache)).logits[0, -1], expected, atol=1e-4)
    assert [table.num_tokens for table in cache.tables] == [12]


def test_rows_are_selected_by_number_or_by_mask():
    ids, more = torch.tensor([prompt(seed, 10) for seed in (1, 2, 3)]), torch.tensor([[5], [6], [7]])
    for chosen in ([2, 0], [-1, 1], [True, False, True], [True, True, True]):
        with torch.no_grad():
            cache = build("paged", MODEL, num_blocks=64, block_size=4).cache()
            MODEL(ids, **with_cache(cache))
            cache.batch_select_indices(torch.tensor(chosen))
            rows = torch.arange(3)[torch.tensor(chosen)]
            found = MODEL(more[: len(rows)], **with_cache(cache)).logits
            whole = torch.cat([ids[rows], more[: len(rows)]], 1)
            assert torch.allclose(found[:, -1], MODEL(whole).logits[:, -1], atol=1e-4), chosen


def test_blocks_keep_nothing_of_what_they_were_computed_from():
    """Whoever forgets no_grad has the tokens, and no graph of gradients behind the pool."""
    strategy = build("paged", MODEL, num_blocks=64, block_size=4)
    output = MODEL(torch.tensor([prompt(0, 20)]), **with_cache(strategy.cache()))
    assert all(plane.grad_fn is None for layer in strategy.placement.planes() for plane in layer.values())
    assert torch.allclose(output.logits, MODEL(torch.tensor([prompt(0, 20)])).logits, atol=1e-4)


def test_a_prompt_that_is_compacted_on_its_way_goes_on():
    strategy = build("prefix+evict", MODEL, num_blocks=64, block_size=4, score="knorm", keep=0.5)
    ids, logits = torch.tensor([prompt(0, 40)]), []
    for cache in (strategy.cache(), strategy.cache(ids)):
        with torch.no_grad():
            MODEL(ids[:, :30], **with_cache(cache))
            cache.compact()
            logits.append(MODEL(ids[:, 30:], **with_cache(cache)).logits)
    assert torch.equal(*logits)
