"""What serving asks of the runner beside right tokens: when they are told, in a simulation of a device that is late."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from common import VOCAB, baseline_tokens, random_requests, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runner import replaying_runner

from kv_strategies import STRATEGIES, Request, Runner, build
from kv_strategies import runner as runner_module
from kv_strategies.step import graphs

MODEL = tiny_llama(num_layers=1)


class Device:
    """Runs one launched step after the other, each for as long as `seconds(num_decoding, num_tokens)` says, on a clock
    that goes on only where the host waits.
    """

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch, seconds, *, is_ahead: bool = True):
        self.now = self.end = 0.0
        self.steps: list[tuple[int, int, float]] = []  # rows that decode, tokens of prompts, seconds
        launch = runner._launch

        def launch_later(decoding, prefilling):
            if decoding or prefilling:
                work = len(decoding), sum(num_tokens for _, num_tokens in prefilling)
                self.steps.append((*work, seconds(*work)))
                self.end = max(self.end, self.now) + self.steps[-1][-1]
            return launch(decoding, prefilling)

        runner._lookahead, runner._launch = is_ahead, launch_later
        monkeypatch.setattr(runner_module, "time", self)
        monkeypatch.setattr(runner_module, "start_copy", lambda parts, device: (parts, Ready(self, self.end)))

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Ready:
    def __init__(self, device: Device, end: float):
        self.device, self.end = device, end

    def query(self) -> bool:
        return self.device.now >= self.end

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.end)


@pytest.mark.parametrize("is_host_slow", [False, True])
def test_a_first_token_is_told_when_it_is_there(is_host_slow, monkeypatch):
    """Others decode beside it. It waits for no other step, and where it was there before the next launch, not even for
    that.
    """
    requests = [Request([1, 2, 3], max_new_tokens=9, request_id=0), Request([4, 5], max_new_tokens=3, request_id=1)]
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=40))
    device = Device(runner, monkeypatch, lambda num_decoding, num_tokens: 1.0)
    tokens, ends = {}, {}

    def step():
        for event in runner.step():
            tokens.setdefault(event.request_id, []).append(event.token_id)
            ends.setdefault(event.request_id, device.now)

    runner.submit(requests[:1])
    while len(tokens.get(0, [])) < 2:
        step()
    runner.submit(requests[1:])
    step()
    first = device.end  # of the step that computes the prompt
    num_launched = len(device.steps)
    assert device.steps[-1][:2] == (1, 2) and device.now < first
    if is_host_slow:
        device.now = first + 0.5
    step()
    assert ends[1] == device.now == first + 0.5 * is_host_slow
    assert len(device.steps) == num_launched + (not is_host_slow)
    while runner.num_running:
        step()
    assert [tokens[i] for i in range(2)] == baseline_tokens(MODEL, requests)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), decode=st.floats(2e-3, 0.05), is_steady=st.booleans())
def test_who_comes_while_a_step_runs_is_part_of_the_next(seed, decode, is_steady):
    """A step is launched right before the device needs it: where steps take as long as before, never later."""
    rng = random.Random(seed)
    requests = [Request([1, 2, i], max_new_tokens=rng.randint(2, 40), request_id=i) for i in range(6)]
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=100), max_num_seqs=6)

    def seconds(num_decoding, num_tokens):
        return decode * (1 if is_steady else rng.uniform(0.7, 1.5)) + num_tokens * 1e-4

    tokens, waited, joined = {}, 0, []
    with pytest.MonkeyPatch.context() as monkeypatch:
        device = Device(runner, monkeypatch, seconds)
        pending = sorted((rng.uniform(0, 30 * decode), i) for i in range(len(requests)))
        while pending or runner.num_running or runner.num_waiting:
            if not (runner.num_running or runner.num_waiting):
                device.now = max(device.now, pending[0][0])
            came = [pending.pop(0)[1] for at, _ in pending[:] if at <= device.now]
            runner.submit([requests[i] for i in came])
            num_steps, was_early, waited = len(device.steps), waited and device.now < device.end, 0
            before = device.now
            for event in runner.step():
                tokens.setdefault(event.request_id, []).append(event.token_id)
            if len(device.steps) == num_steps and device.now == before + runner_module._GLANCE:
                waited = 1
                assert not came and (device.now < device.end or not is_steady)
            elif came and was_early:
                joined.append(device.steps[num_steps][1] == sum(len(requests[i].token_ids) for i in came))
    assert [tokens[i] for i in range(len(requests))] == baseline_tokens(MODEL, requests)
    assert all(joined)


def test_a_step_is_launched_right_before_the_device_needs_it(monkeypatch):
    """Once it is known how long steps take; not later, and not as soon as there is nothing else to do."""
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=40))
    device = Device(runner, monkeypatch, lambda num_decoding, num_tokens: 0.01)
    runner.submit([Request([1, 2, 3], max_new_tokens=30, request_id=0)])
    leads = []
    while runner.num_running or runner.num_waiting:
        num_steps, lead = len(device.steps), device.end - device.now
        runner.step()
        if len(device.steps) > num_steps:
            leads.append(lead)
    assert len(leads) == 30 and all(0 <= lead <= 2 * runner_module._GLANCE for lead in leads[4:])


def test_no_capture_stands_before_a_first_token(monkeypatch, device):
    """The step that is launched behind it runs without a graph, as do those with prompts; later ones of their kinds are
    captured.
    """
    monkeypatch.setattr(graphs, "_SMALLEST_BUCKET", 32)
    model = tiny_llama(num_layers=1).to(device)
    requests = [Request([7, i], max_new_tokens=28, request_id=i) for i in range(4)]
    runner = replaying_runner(model, build("paged", model, num_blocks=40), monkeypatch, max_num_seqs=4)
    late = SimpleNamespace(query=lambda: False, synchronize=lambda: None)
    copy = runner_module.start_copy  # of tokens that the next replay writes over
    monkeypatch.setattr(runner_module, "start_copy", lambda *parts: (copy(*parts)[0], late))
    captured, eager = [], []

    def capture(*arguments, captured_=graphs._captured):
        captured.append(any(step.has_first for step in runner._in_flight))
        return captured_(*arguments)

    def forward(rows, counts, decoding, prefilling, forward_=runner._forward):
        eager.append(not prefilling)
        return forward_(rows, counts, decoding, prefilling)

    monkeypatch.setattr(graphs, "_captured", capture)
    monkeypatch.setattr(runner, "_forward", forward)
    events = []
    for count, request in enumerate(requests, start=1):  # one joins after the other: steps of 1, 2 and 4 rows
        runner.submit([request])
        while len(events) < 6 * count:
            events += runner.step()
    while runner.num_running:
        events += runner.step()
    tokens = [[event.token_id for event in events if event.request_id == i] for i in range(4)]
    assert tokens == baseline_tokens(model, requests)
    assert not any(captured) and sum(eager) >= 2
    kinds = [kind[:3] for kind, _ in runner._graphs._graphs]
    assert sorted(kinds) == [(1, 0, 1), (2, 0, 2), (4, 0, 4), (4, graphs.MAX_PROMPTS, 16)] and len(captured) == 4


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    decode=st.floats(1e-3, 0.1),
    per_token=st.floats(1e-5, 1e-2),
    tokens_in_target=st.floats(-5, 120),
    is_ahead=st.booleans(),
)
def test_prompts_leave_decoding_rows_their_target(seed, decode, per_token, tokens_in_target, is_ahead):
    """Once it is known what steps cost. Steps in which nobody decodes are whole, and what is least comes through."""
    rng = random.Random(seed)
    target = max(1e-4, decode + tokens_in_target * per_token)
    lengths = [(3, 40), *((rng.randint(1, 250), rng.randint(1, 12)) for _ in range(4))]
    requests = [
        Request([rng.randrange(VOCAB) for _ in range(prompt)], max_new_tokens=new, request_id=i)
        for i, (prompt, new) in enumerate(lengths)
    ]
    runner = Runner(
        MODEL, build("paged", MODEL, num_blocks=100), max_num_seqs=4, max_batch_tokens=96, target_itl=target
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        device = Device(
            runner, monkeypatch, lambda rows, tokens: decode * bool(rows) + tokens * per_token, is_ahead=is_ahead
        )
        pending, tokens = requests[1:], {}
        runner.submit(requests[:1])
        while pending or runner.num_running or runner.num_waiting:
            if pending and len(device.steps) > 5 and rng.random() < 0.3:  # what decoding takes is known
                runner.submit([pending.pop()])
            for event in runner.step():
                tokens.setdefault(event.request_id, []).append(event.token_id)
    assert [tokens[i] for i in range(len(requests))] == baseline_tokens(MODEL, requests)
    beside = [(num_tokens, seconds) for rows, num_tokens, seconds in device.steps if rows and num_tokens]
    assert all(num_tokens <= 6 or seconds <= target * (1 + 1e-6) for num_tokens, seconds in beside)


def test_the_budget_is_used(monkeypatch):
    """A prompt beside a row that decodes: after a few steps each chunk is what the target leaves room for."""
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=100), max_batch_tokens=256, target_itl=0.030)
    device = Device(runner, monkeypatch, lambda rows, tokens: 0.010 * rows + 0.0004 * tokens)
    runner.submit([Request([1], max_new_tokens=40)])
    while len(device.steps) < 4:
        runner.step()
    runner.submit([Request([2] * 400, max_new_tokens=1, request_id="long")])
    while runner.num_running or runner.num_waiting:
        runner.step()
    chunks = [num_tokens for rows, num_tokens, _ in device.steps if rows and num_tokens]
    assert set(chunks[:-1]) == {16, 32, 50} and chunks[:-1] == sorted(chunks[:-1]) and chunks.count(50) > 5


@pytest.mark.parametrize("option", ["target_itl", "shortest_first"])
def test_targets_that_cannot_be_followed_are_refused(option):
    strategy = build("paged", MODEL, num_blocks=8)
    for target in (0, -1.0, float("inf"), float("nan"), "fast", True):
        with pytest.raises(ValueError, match=option):
            Runner(MODEL, strategy, **{option: target})
    with pytest.raises(ValueError, match=f"{option} is for a strategy"):
        Runner(MODEL, build("baseline", MODEL), **{option: 0.1})


#: Seconds a token -> whose first tokens come in which order. Steps of a second have 50 tokens; "long" has 200 and came
#: at 0, the others come when a quarter of it is computed, but for the urgent one.
ORDERS = {
    None: ["urgent", "long", "medium", "short"],
    0.001: ["urgent", "long", "short", "medium"],  # 1 s of lead is more than all of it counts for
    0.01: ["urgent", "short", "long", "medium"],  # 1.5 s for what is left of it, and 1 + 0.1; then 1.1 s, and 1 + 0.45
    1.0: ["urgent", "short", "medium", "long"],
}


@pytest.mark.parametrize("shortest_first, order", ORDERS.items())
def test_short_prompts_go_ahead_of_long_ones(shortest_first, order, monkeypatch):
    lengths = {"long": 200, "medium": 45, "short": 10, "urgent": 5}
    requests = {
        name: Request([i] * length, max_new_tokens=4, request_id=name, priority=int(name == "urgent"))
        for i, (name, length) in enumerate(lengths.items(), start=1)
    }
    runner = Runner(
        MODEL, build("paged", MODEL, num_blocks=100), max_num_seqs=4, max_batch_tokens=50, shortest_first=shortest_first
    )
    device = Device(runner, monkeypatch, lambda rows, tokens: 1.0, is_ahead=False)
    tokens = {}
    runner.submit([requests["urgent"]])
    while runner.num_running or runner.num_waiting:
        if len(device.steps) == 1 and "long" not in tokens:
            runner.submit([requests["long"]])
            tokens["long"] = []
        if len(device.steps) == 2 and "medium" not in tokens:
            runner.submit([requests["medium"], requests["short"]])
            tokens |= {"medium": [], "short": []}
        for event in runner.step():
            tokens.setdefault(event.request_id, []).append((device.now, event.token_id))
    assert sorted(tokens, key=lambda name: tokens[name][0][0]) == order
    found = [[token for _, token in tokens[name]] for name in requests]
    assert found == baseline_tokens(MODEL, list(requests.values()))


def state(runner: Runner) -> dict[str, object]:
    """What a warm-up must leave as it was; memory that is set aside for scores it may add to."""
    strategy = runner.strategy
    strategy.check_integrity()
    planes = [plane for planes in strategy.placement.planes() for plane in planes.values()]
    return {
        "stored": [plane.contiguous().view(torch.uint8).tolist() for plane in planes],
        "stats": {name: value for name, value in strategy.stats().items() if name != "scoring_bytes"},
        "free blocks, in their order": list(strategy.pool._free),
        "seats": list(runner._free_seats),
        "last tokens": runner._last_token[:-1].tolist(),
        "sequences": (runner.num_running, runner.num_waiting),
    }


@pytest.mark.parametrize("name", [*STRATEGIES, "prefix+window+int8"])
def test_a_warm_up_changes_nothing(name, monkeypatch):
    """Before requests and in the middle of them, without graphs; nor does what compiles ahead, though it runs here."""
    monkeypatch.setattr(Runner, "_can_compile_ahead", lambda self: True)
    if name == "baseline":
        return Runner(MODEL, build(name, MODEL), warm_up=True).warm_up(7)
    options = {"window": 24, "sinks": 2} if "window" in name else {}
    tokens = []
    for is_warm in (False, True):
        strategy = build(name, MODEL, num_blocks=8, **options)
        runner = Runner(MODEL, strategy, max_num_seqs=3, max_batch_tokens=30, warm_up=is_warm)
        runner.submit(random_requests(random.Random(3), 6))
        found, told = {}, []
        for number in itertools.count():
            if not (runner.num_running or runner.num_waiting):
                break
            for event in runner.step():
                found.setdefault((event.request_id, event.sample_index), []).append(event.token_id)
            if is_warm and number in (1, 2, 5):
                before = state(runner)
                told.clear()
                runner.warm_up(100, lambda *said, told=told: told.append(said))
                assert state(runner) == before
                assert [said[:2] for said in told] == [(i + 1, len(told)) for i in range(len(told))]
                assert bool(told) == strategy.placement.prefill_capturable
        tokens.append(found)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("name", ["prefix", "evict"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # it reads blocks in which nothing was stored
def test_nothing_is_captured_after_a_warm_up(name, monkeypatch, device):
    monkeypatch.setattr(graphs, "PREFILL_SIZES", (8,))
    monkeypatch.setattr(graphs, "_SMALLEST_BUCKET", 32)
    monkeypatch.setattr(Runner, "_can_compile_ahead", lambda self: True)
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    model = tiny_llama(num_layers=1).to(device)
    requests = [Request([i, *[2] * size], max_new_tokens=5) for i, size in enumerate((3, 7, 40, 3, 44))]
    options = {"max_num_seqs": 3, "max_batch_tokens": 40}

    def tokens(runner: Runner) -> list[list[int]]:
        results = [result for request in requests for result in runner.generate([request])]
        return [result.token_ids for result in [*results, *runner.generate(requests)]]

    expected = tokens(Runner(model, build(name, model, num_blocks=40), cuda_graphs=False, **options))
    runner = replaying_runner(model, build(name, model, num_blocks=40), monkeypatch, **options)
    before = state(runner)
    runner.warm_up(60)
    assert state(runner) == before
    captured = dict(runner._graphs._graphs)
    steps = {(n, 0, n, bucket) for n in (1, 2, 3) for bucket in (32, 64)}
    assert set(captured) == {(kind, 0) for kind in steps | {(0, 1, 8, 256), (0, 4, 8, 256), (3, 4, 8, 256)}}
    runner.warm_up(60)
    assert tokens(runner) == expected
    assert runner._graphs._graphs == captured and None not in captured.values()


@pytest.mark.parametrize("fails", ["at once", "at a launch"])
def test_a_warm_up_goes_on_where_nothing_compiles_ahead(fails, monkeypatch):
    """Its steps run as without, or they would fail as well."""
    active = []

    def launch(work: Callable) -> None:
        raise TypeError("submit() missing 1 required positional argument")

    @contextmanager
    def another_triton():
        if fails == "at once":
            launch(print)
        active.append(fails)
        yield launch
        active.clear()

    monkeypatch.setattr(Runner, "_can_compile_ahead", lambda self: True)
    monkeypatch.setattr("kv_strategies.runner.compiled_ahead", another_triton)
    told = []
    Runner(MODEL, build("paged", MODEL, num_blocks=8)).warm_up(20, lambda *said: told.append((*said, *active)))
    assert [said[:2] for said in told] == [(i + 1, len(told)) for i in range(len(told))] and told
    assert all(len(said) == 3 for said in told)


def test_a_warm_up_is_of_some_tokens():
    runner = Runner(MODEL, build("paged", MODEL, num_blocks=8))
    for max_context in (0, -1, 2.5, "all"):
        with pytest.raises(ValueError, match="max_context"):
            runner.warm_up(max_context)
    with pytest.raises(ValueError, match="warm_up takes true or false"):
        Runner(MODEL, build("paged", MODEL, num_blocks=8), warm_up=4096)
