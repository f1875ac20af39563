"""What serving asks of the runner beside right tokens: when they are told, in a simulation of a device that is late."""

from __future__ import annotations

import pytest
from common import baseline_tokens, tiny_llama
from test_runner import replaying_runner

from kv_strategies import Request, Runner, build
from kv_strategies import runner as runner_module
from kv_strategies.step import graphs

MODEL = tiny_llama(num_layers=1)


class Device:
    """Runs one launched step after the other, each for as long as `seconds(num_decoding, num_tokens)` says, on a clock
    that goes on only where the host waits.
    """

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch, seconds):
        self.now = self.end = 0.0
        self.steps: list[tuple[int, int, float]] = []  # rows that decode, tokens of prompts, seconds
        launch = runner._launch

        def launch_later(decoding, prefilling):
            if decoding or prefilling:
                work = len(decoding), sum(num_tokens for _, num_tokens in prefilling)
                self.steps.append((*work, seconds(*work)))
                self.end = max(self.end, self.now) + self.steps[-1][-1]
            return launch(decoding, prefilling)

        monkeypatch.setattr(runner, "_lookahead", True)
        monkeypatch.setattr(runner, "_launch", launch_later)
        monkeypatch.setattr(runner_module, "time", self)
        monkeypatch.setattr(runner_module, "start_copy", lambda parts, device: (parts, Ready(self, self.end)))

    def perf_counter(self) -> float:
        return self.now


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


@pytest.mark.parametrize("patience", [2, 1000])
def test_nobody_waits_for_a_capture_to_be_told_a_first_token(patience, monkeypatch, device):
    """Steps that decode meanwhile run without a graph; where they become many, because a request waits for the seat of
    another, they are captured after all.
    """
    model = tiny_llama(num_layers=1).to(device)
    monkeypatch.setattr(graphs, "_MOST_POSTPONED", patience)
    requests = [Request([7, i], max_new_tokens=new, request_id=i) for i, new in enumerate((12, 6, 9))]
    strategy = build("paged", model, num_blocks=40)
    runner = replaying_runner(model, strategy, monkeypatch, max_num_seqs=2)
    eager = []
    monkeypatch.setattr(
        runner, "_forward", lambda *step, forward=runner._forward: eager.append(len(step[2])) or forward(*step)
    )
    tokens, is_captured = {i: [] for i in range(3)}, []
    runner.submit(requests)
    while runner.num_running or runner.num_waiting:
        is_awaited, before = not all(tokens.values()), len(runner._graphs._graphs)
        for event in runner.step():
            tokens[event.request_id].append(event.token_id)
        if len(runner._graphs._graphs) > before:
            is_captured.append(is_awaited)
    assert list(tokens.values()) == baseline_tokens(model, requests)
    assert is_captured == [patience == 2, False], "steps of two rows, then of one"
    assert eager.count(2) == 2 if patience == 2 else eager.count(2) > 2
