"""What serving asks of the runner beside right tokens: when they are told, in a simulation of a device that is late."""

from __future__ import annotations

import pytest
import torch
from common import baseline_tokens, tiny_llama

from kv_strategies import Request, Runner, build
from kv_strategies import runner as runner_module

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
