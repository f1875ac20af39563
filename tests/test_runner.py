"""The runner: random schedules against the native cache, one request at a time; and what it refuses."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from common import VOCAB, baseline_tokens, random_requests, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_strategies import STRATEGIES, Request, Runner, build
from kv_strategies import runner as runner_module
from kv_strategies.step import graphs
from kv_strategies.step.plan import Plan
from kv_strategies.step.sampling import SamplingParams, sample

MODEL = tiny_llama(num_layers=1)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    block_size=st.sampled_from([1, 2, 3, 7, 16, 61]),
    spare_tokens=st.integers(0, 150),
    max_num_seqs=st.integers(3, 9),
    chunk=st.integers(1, 60),
    shortest_first=st.sampled_from([None, 1e-4, 1.0]),
)
def test_any_schedule_gives_the_tokens_of_the_native_cache(
    seed, block_size, spare_tokens, max_num_seqs, chunk, shortest_first
):
    """Small pools preempt, small chunks split prompts, arrivals and cancellations come between steps."""
    rng = random.Random(seed)
    requests = random_requests(rng, rng.randint(1, 6), longest=30, max_new=8)
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    strategy = build("paged", MODEL, num_blocks=-(-(longest + spare_tokens) // block_size), block_size=block_size)
    sizes = {"max_num_seqs": max_num_seqs, "max_batch_tokens": max_num_seqs + chunk}
    runner = Runner(MODEL, strategy, **sizes, shortest_first=shortest_first)
    for index, request in enumerate(requests):
        request.request_id = index
    cancelled = rng.randrange(len(requests)) if rng.random() < 0.3 else None
    pending, tokens = list(requests), {}
    while pending or runner.num_running or runner.num_waiting:
        if pending and rng.random() < 0.5:
            runner.submit([pending.pop(0)])
        if cancelled is not None and rng.random() < 0.1:
            runner.cancel(cancelled)
        for event in runner.step():
            if event.token_id is None:
                assert event.result.finish_reason == "cancelled" and event.request_id == cancelled
            else:
                tokens.setdefault((event.request_id, event.sample_index), []).append(event.token_id)
            if event.result is not None and event.result.token_ids:
                assert event.result.token_ids == tokens[event.request_id, event.sample_index]
        strategy.check_integrity()
    assert strategy.stats()["blocks_free"] == strategy.pool.num_blocks
    expected = iter(baseline_tokens(MODEL, requests))
    for request in requests:
        for index in range(request.n):
            whole, got = next(expected), tokens.get((request.request_id, index), [])
            assert got == (whole[: len(got)] if request.request_id == cancelled else whole)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_serves_the_runner(name):
    rng = random.Random(1)
    requests = random_requests(rng, 8)
    strategy = build(name, MODEL, num_blocks=64) if name != "baseline" else build(name, MODEL)
    runner = Runner(MODEL, strategy, max_num_seqs=8)
    results = runner.generate(requests)
    strategy.check_integrity()
    if name in ("baseline", "contiguous", "paged", "prefix"):
        assert [result.token_ids for result in results] == baseline_tokens(MODEL, requests)
    assert [result.request_id for result in results] == [i for i, r in enumerate(requests) for _ in range(r.n)]
    for result, request in zip(results, [r for r in requests for _ in range(r.n)], strict=True):
        assert result.finish_reason == ("stop" if result.token_ids[-1] in request.stop_token_ids else "length")
        assert result.timings.ttft > 0 and len(result.timings.itl) == len(result.token_ids) - 1


def test_preemption_is_invisible_in_the_tokens():
    requests = [Request([i + 1] * 20, max_new_tokens=20, temperature=0.7, seed=i) for i in range(6)]
    strategy = build("paged", MODEL, num_blocks=14, block_size=4)
    runner = Runner(MODEL, strategy, max_num_seqs=6)
    results = runner.generate(requests)
    assert runner.num_preemptions > 0
    assert [result.token_ids for result in results] == baseline_tokens(MODEL, requests)


def replaying_runner(model, strategy, monkeypatch, **options) -> Runner:
    """A runner that replays graphs. Without a GPU these run their step again, over the same memory and with the bounds
    of their kind, through a GPU's kernels in the interpreter, which read lengths where a GPU does.
    """
    if model.device.type == "cuda":
        return Runner(model, strategy, cuda_graphs=True, **options)
    from kv_strategies.kernels.blocks import gpu, triton_store

    def record(work, stream, memory):
        held = work()
        return lambda: [kept.copy_(new) for kept, new in zip(held, work(), strict=True)], held

    def copy(parts, device):
        tokens, *scores = parts
        return [tokens if tokens is None else tokens.clone(), *scores], None  # the next replay is ahead

    strategy.kernels = strategy.kernels._replace(store_kv=triton_store.store_kv, attention=gpu.attention)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "_warm_up", lambda work, stream: work())
    monkeypatch.setattr(graphs, "_record", record)
    monkeypatch.setattr(Plan, "once", lambda plan, name, make: make())  # a graph computes it again
    monkeypatch.setattr(runner_module, "start_copy", copy)
    runner = Runner(model, strategy, **options)
    runner._graphs, runner._verifying = runner._capture(), runner._capture(all_logits=True)
    runner._lookahead = True
    return runner


@pytest.mark.parametrize(
    ("name", "num_heads", "num_kv_heads", "block_size"),
    [
        ("prefix", 2, 2, 16),
        ("prefix", 4, 2, 1),
        ("prefix", 4, 1, 7),
        pytest.param("prefix+int8", 4, 2, 7, marks=pytest.mark.gpu),  # the interpreter rounds scales otherwise
        ("prefix+window", 4, 2, 7),
    ],
)
def test_short_prefills_replay_a_graph(name, num_heads, num_kv_heads, block_size, monkeypatch, device):
    """Behind a past of any length, or none, and however much padding there is."""
    rng = random.Random(num_heads)
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "num_layers": 1}
    model = tiny_llama(**sizes).to(device)
    options = {"window": 24, "sinks": 2} if "window" in name else {}
    past = [rng.randrange(VOCAB) for _ in range(90)]
    requests = [Request(past, max_new_tokens=2)]
    for shared, new in [(89, 1), (0, 3), (60, 5), (0, 17), (90, 8), (56, 15), (88, 32)] * 2:
        prompt = past[:shared] + [rng.randrange(VOCAB) for _ in range(new)]
        requests.append(Request(prompt, max_new_tokens=2, n=1 + (new == 5), temperature=new % 2, seed=new))
    strategies = [build(name, model, num_blocks=400 // block_size, block_size=block_size, **options) for _ in range(2)]
    plain = Runner(model, strategies[0], cuda_graphs=False)
    expected = [plain.generate([request]) for request in requests]
    monkeypatch.setattr(graphs, "PREFILL_SIZES", (8, 32))
    monkeypatch.setattr(graphs, "_SMALLEST_BUCKET", 8)
    runner = replaying_runner(model, strategies[1], monkeypatch, max_num_seqs=2, max_batch_tokens=70)
    for request, results in zip(requests, expected, strict=True):
        got = runner.generate([request])
        assert [result.token_ids for result in got] == [result.token_ids for result in results]
        strategies[1].check_integrity()
    kinds = {kind for kind, _ in runner._graphs._graphs}
    assert {kind[:3] for kind in kinds} == {(1, 0, 1), (2, 0, 2), (0, 1, 8), (0, 1, 32)}, "decode steps, and prefills"
    assert len({kind.bucket for kind in kinds if kind.num_tokens == 32}) > 1


@pytest.mark.parametrize("name", ["prefix", "window", "evict"])
def test_prompts_beside_decoding_rows_replay_a_graph(name, monkeypatch, device):
    """One or several at once, some of them in chunks, behind a past or none; greedy and sampled."""
    rng = random.Random(5)
    model = tiny_llama(num_heads=4, num_kv_heads=2, num_layers=1).to(device)
    options = {"window": {"window": 12, "sinks": 2}, "evict": {"score": "knorm", "keep": 9}}.get(name, {})
    strategies = [build(name, model, num_blocks=60, block_size=4, **options) for _ in range(2)]
    lengths = [(5, 9), (3, 6), (9, 3), (30, 2), (11, 4), (4, 2)]
    start = [rng.randrange(VOCAB) for _ in range(8)]
    requests = [
        Request((start + [rng.randrange(VOCAB) for _ in range(new)])[-length:], max_new_tokens=new, request_id=i,
                temperature=float(i == 2), seed=i)
        for i, (length, new) in enumerate(lengths)
    ]  # fmt: skip
    arrivals = [1, 2, 1, 2]  # so many at once, two steps between

    def tokens(runner: Runner) -> dict[int, list[int]]:
        found, coming = {request.request_id: [] for request in requests}, iter(requests)
        for number in itertools.count():
            if number % 2 == 0 and number // 2 < len(arrivals):
                runner.submit(list(itertools.islice(coming, arrivals[number // 2])))
            for event in runner.step():
                found[event.request_id].append(event.token_id)
            if number // 2 >= len(arrivals) and not (runner.num_running or runner.num_waiting):
                return found

    sizes = {"max_num_seqs": 6, "max_batch_tokens": 24}
    expected = tokens(Runner(model, strategies[0], cuda_graphs=False, **sizes))
    monkeypatch.setattr(graphs, "PREFILL_SIZES", (8, 32))
    monkeypatch.setattr(graphs, "_SMALLEST_BUCKET", 8)
    runner = replaying_runner(model, strategies[1], monkeypatch, **sizes)
    eager = []
    monkeypatch.setattr(runner, "_forward", lambda *step, ran=runner._forward: eager.append(step) or ran(*step))
    assert tokens(runner) == expected
    runner.warm_up(40)
    eager.clear()
    strategies[1].reset()
    assert tokens(runner) == expected and not eager
    strategies[1].check_integrity()


@settings(max_examples=100, deadline=None)
@given(num_decoding=st.integers(0, 300), num_tokens=st.integers(0, 9000), max_batch_tokens=st.integers(301, 9000))
def test_a_cut_prompt_leaves_a_graph_no_padding(num_decoding, num_tokens, max_batch_tokens):
    """Where that costs the step little: as much as it may have, and no graph between."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        sizes = {"max_num_seqs": 300, "max_batch_tokens": max_batch_tokens}
        held = replaying_runner(MODEL, build("paged", MODEL, num_blocks=8), monkeypatch, **sizes)._graphs
        found, places = held.num_fitting(num_decoding, num_tokens), held._places(num_decoding)
        largest = max(shape.num_tokens for shape in held.shapes(512) if shape.num_prompts)
    assert places >= num_decoding and 9 * num_tokens <= 10 * found <= 10 * num_tokens
    within = [size - places for size in graphs.PREFILL_SIZES if 0.9 * num_tokens <= size - places <= num_tokens]
    assert found == max((size for size in within if size + places <= largest), default=num_tokens)
    assert largest == next((size for size in graphs.PREFILL_SIZES if size >= max_batch_tokens), 2048)


def test_chunks_fill_graphs(monkeypatch, device):
    """Of 32 tokens, two of them places for the row that decodes beside; the last has what is left."""
    monkeypatch.setattr(graphs, "PREFILL_SIZES", (8, 32))
    model = tiny_llama(num_layers=1).to(device)
    runner = replaying_runner(
        model, build("paged", model, num_blocks=40), monkeypatch, max_num_seqs=2, max_batch_tokens=33
    )
    chunks, schedule = [], runner._schedule
    monkeypatch.setattr(runner, "_schedule", lambda: chunks.append(schedule()) or chunks[-1])
    runner.submit([Request([1, 2], max_new_tokens=20)])
    runner.step()
    runner.submit([Request([3] * 100, max_new_tokens=1, request_id="long")])
    while runner.num_running or runner.num_waiting:
        runner.step()
    assert [sum(n for _, n in prefilling) for decoding, prefilling in chunks if decoding and prefilling] == [
        30,
        30,
        30,
        10,
    ]


def test_long_prompts_keep_the_librarys_attention(monkeypatch):
    """In steps of many tokens; how long rows are that decode beside them makes no difference."""
    held = replaying_runner(MODEL, build("paged", MODEL, num_blocks=8), monkeypatch)._graphs

    def shape_of(num_new: int, past: int, decoding: int = 0) -> graphs.Shape | None:
        blocks, rows = np.zeros(1, np.int32), [(decoding, 1)] * bool(decoding) + [(past + num_new, num_new)]
        *beside, prompt = [graphs.Row(blocks, num_tokens, new) for num_tokens, new in rows]
        return held._shape_of(beside, [prompt], num_new)

    assert shape_of(1000, 30_000) == (0, 1, 1024, 32768) and shape_of(1100, 2000) == (0, 1, 1280, 8192)
    assert shape_of(1100, 2000, 30_000) == (8, 4, 1280, 32768)
    assert shape_of(1100, 3000) is shape_of(2049, 0) is None


def test_prefills_that_stream_or_are_timed_are_not_captured(monkeypatch, device):
    model = tiny_llama(num_layers=1).to(device)
    strategy = build("offload", model, num_blocks=40, resident="kv", host_bytes=1 << 20)
    runner = replaying_runner(model, strategy, monkeypatch)
    for _ in range(3):
        runner.generate([Request([1, 2, 3], max_new_tokens=2)])
    assert [kind[:3] for kind, _ in runner._graphs._graphs] == [(1, 0, 1)], "the decode step alone"


def test_a_first_token_does_not_wait_for_the_next_launch(monkeypatch):
    """Where steps are launched ahead; a second request comes while the first decodes."""
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=40))
    runner._lookahead = True
    launched = []
    monkeypatch.setattr(runner, "_launch", lambda *step, launch=runner._launch: launched.append(step) or launch(*step))
    requests = [Request([i, 2, 3], max_new_tokens=3 + i, request_id=i) for i in range(2)]
    runner.submit(requests[:1])
    assert (runner.step(), len(runner.step()), len(launched)) == ([], 1, 1)
    runner.submit(requests[1:])
    tokens = {}
    while runner.num_running or runner.num_waiting:
        for event in runner.step():
            tokens.setdefault(event.request_id, []).append(event.token_id)
    assert tokens[1] == baseline_tokens(MODEL, requests)[1]


def test_samples_share_the_blocks_of_their_prompt():
    strategy = build("paged", MODEL, num_blocks=64, block_size=4)
    runner = Runner(MODEL, strategy, max_num_seqs=8)
    runner.submit([Request(list(range(1, 42)), max_new_tokens=3, temperature=1.0, seed=5, n=8)])
    runner.step()
    assert strategy.stats()["blocks_used"] == 11, "41 tokens, once"
    runner.step()
    assert strategy.stats()["blocks_used"] == 10 + 8, "each sample copied the last block and no other"
    runner.cancel(0)
    assert strategy.stats()["blocks_used"] == 0


def test_stopping_a_stream_cancels_the_rest():
    strategy = build("paged", MODEL, num_blocks=64)
    runner = Runner(MODEL, strategy)
    stream = runner.stream([[1, 2, 3], [4, 5]])
    next(stream)
    assert strategy.stats()["blocks_used"] > 0
    stream.close()
    assert strategy.stats()["blocks_used"] == 0 and runner.num_running == 0


def test_requests_that_can_never_run_are_refused_at_once():
    strategy = build("paged", MODEL, num_blocks=4, block_size=8)
    runner = Runner(MODEL, strategy, max_num_seqs=4)
    good = Request([1, 2], max_new_tokens=2, request_id="good")

    def refused(message, *requests):
        with pytest.raises(ValueError, match=message):
            runner.generate([good, *requests])
        assert runner.num_waiting == runner.num_running == 0, "nothing may be started"

    refused("'bad': the prompt is empty", Request([], request_id="bad"))
    refused(f"token id {VOCAB} is outside the vocabulary", [1, VOCAB])
    refused("token id -1 is outside", [-1, 3])
    refused("max_new_tokens must be at least 1, got 0", Request([1], max_new_tokens=0))
    refused("max_new_tokens must be at least 1, got -4", Request([1], max_new_tokens=-4))
    refused(r"exceed the pool of 32 tokens; with this prompt at most 3 new", Request([1] * 30, max_new_tokens=9))
    refused("the prompt alone does not fit", Request([1] * 33, max_new_tokens=1))
    refused("exceed the model's context of 512 tokens", Request([1] * 600, max_new_tokens=1))
    refused("'good': this request id is in use", Request([3], request_id="good"))
    refused("n must be from 1 to max_num_seqs = 4", Request([3], n=5))
    refused("needs temperature >= 0", Request([3], temperature=-1.0))
    refused("the salt must be a str, got int", Request([3], salt=7))
    assert len(runner.generate([good])) == 1


def test_a_request_id_in_use_is_refused_while_it_runs():
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=8))
    runner.submit([Request([1, 2], request_id="a")])
    with pytest.raises(ValueError, match="'a': this request id is in use"):
        runner.submit([Request([3], request_id="b"), Request([3], request_id="a")])
    assert runner.num_waiting == 1


def test_a_runner_needs_its_own_model_and_room_to_prefill():
    strategy = build("paged", MODEL, num_blocks=8)
    with pytest.raises(ValueError, match="built for another model"):
        Runner(tiny_llama(), strategy)
    with pytest.raises(ValueError, match="max_batch_tokens must exceed max_num_seqs"):
        Runner(MODEL, strategy, max_num_seqs=8, max_batch_tokens=8)


def test_reset_waits_for_requests_to_end():
    strategy = build("paged", MODEL, num_blocks=8)
    runner = Runner(MODEL, strategy)
    runner.submit([[1, 2, 3]])
    runner.step()
    with pytest.raises(RuntimeError, match="1 block tables are in use"):
        strategy.reset()
    runner.cancel(0)
    strategy.reset()


def test_sampling_draws_from_the_softmax():
    """The noise is a hash: frequencies must still be those of the distribution, and rows independent of the batch."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]])
    rows = 20_000
    params = [SamplingParams(temperature=0.5, seed=i) for i in range(rows)]
    drawn = sample(logits.expand(rows, -1), params, [3] * rows)
    frequency = torch.bincount(drawn, minlength=5) / rows
    torch.testing.assert_close(frequency, (logits[0] / 0.5).softmax(0), atol=0.015, rtol=0)
    alone = torch.cat([sample(logits, [params[i]], [3]) for i in range(20)])
    assert torch.equal(alone, drawn[:20])


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]]).expand(300, -1)
    for kept, options in (({0, 2}, {"top_k": 2}), ({0}, {"top_p": 0.5}), ({0, 2}, {"top_p": 0.7}), ({0}, {"top_k": 1})):
        params = [SamplingParams(temperature=3.0 if "top_k" in options else 1.0, seed=i, **options) for i in range(300)]
        assert set(sample(logits, params, [0] * 300).tolist()) == kept
