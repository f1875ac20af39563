"""Memory that runs out, wherever it does: the answer is right, later, or somebody is told what would fit."""

from __future__ import annotations

import warnings

import pytest
import torch
from common import tiny_llama
from test_runner import replaying_runner

from kv_strategies import Request, Runner, build
from kv_strategies.kernels.blocks import gpu, triton_decode, triton_prefill, triton_store
from kv_strategies.step import graphs
from kv_strategies.step.fused import FusedStack
from kv_strategies.step.upstream import with_cache

REQUESTS = [Request(list(range(1, 9)), max_new_tokens=3), Request(list(range(7, 40)), max_new_tokens=5)]


@pytest.fixture(autouse=True)
def exact():
    torch.backends.cuda.matmul.allow_tf32 = False


class RunsOut:
    """Stands in for a function: the n-th of the calls that count finds no memory, all others work."""

    def __init__(self, monkeypatch, owner, name: str, at: int, counts=lambda: True):
        function, self.calls = getattr(owner, name), 0

        def call(*args, **options):
            self.calls += counts()
            if self.calls == at and counts():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
            return function(*args, **options)

        monkeypatch.setattr(owner, name, call)


def tokens_of(results) -> list[list[int]]:
    return [result.token_ids for result in results]


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_step_that_cannot_be_captured_runs_without_a_graph(at, monkeypatch, device):
    """Out of memory in the warm-up of a capture (odd calls) or inside of it (even ones); others are captured still."""
    model = tiny_llama(num_layers=1).to(device)
    expected = tokens_of(Runner(model, build("paged", model, num_blocks=64, block_size=4)).generate(REQUESTS))
    monkeypatch.setattr(graphs, "_SMALLEST_BUCKET", 32)
    strategy = build("paged", model, num_blocks=64, block_size=4)
    runner = replaying_runner(model, strategy, monkeypatch, max_num_seqs=2, max_batch_tokens=70)
    capturing = []
    for name in ("_warm_up", "_record"):
        monkeypatch.setattr(graphs, name, flagged(getattr(graphs, name), capturing))
    step = RunsOut(monkeypatch, graphs, "forward", at, lambda: bool(capturing))
    with pytest.warns(UserWarning, match="no memory left to capture a step of [0-9]+ tokens as a CUDA graph"):
        for _ in range(3):  # what is captured when it was met twice among them
            assert tokens_of(runner.generate(REQUESTS)) == expected
    num_calls = step.calls
    with warnings.catch_warnings():  # what runs without is tried no more, and what is captured is replayed
        warnings.simplefilter("error")
        assert tokens_of(runner.generate(REQUESTS)) == expected
    assert step.calls == num_calls >= at
    found = [graph is None for graph in runner._graphs._graphs.values()]
    assert found.count(True) == 1 < len(found)
    strategy.check_integrity()


def flagged(function, flags: list):
    def call(*args):
        flags.append(True)
        try:
            return function(*args)
        finally:
            flags.pop()

    return call


@pytest.mark.gpu
def test_gpu_generate_goes_on_without_a_graph(monkeypatch, device):
    model = tiny_llama().to(device)
    ids = torch.tensor([REQUESTS[1].token_ids], device=device)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    strategy = build("paged", model, num_blocks=64, block_size=4)
    monkeypatch.setattr(graphs, "_SMALLEST_BUCKET", 32)
    RunsOut(monkeypatch, FusedStack, "__call__", 1, torch.cuda.is_current_stream_capturing)
    with pytest.warns(UserWarning, match="no memory left to capture"):
        out = model.generate(ids, max_new_tokens=30, do_sample=False, **with_cache(strategy.cache()))
    assert torch.equal(out, expected)
    for _ in range(2):
        out = model.generate(ids, max_new_tokens=40, do_sample=False, **with_cache(strategy.cache()))
        assert torch.equal(out[:, : expected.shape[1]], expected)
    steps = strategy.door.graphs(strategy)._steps.values()
    assert [step._is_refused for step in steps] == [True, False] and list(steps)[1]._replay is not None


@pytest.mark.parametrize(("kernel", "at"), [(triton_decode, 1), (triton_decode, 3), (triton_prefill, 1)])
def test_a_workspace_without_memory_costs_a_step(kernel, at, monkeypatch, device):
    """No row counts as computed, nothing is published, and the next step is right."""
    model = tiny_llama(num_layers=1).to(device)
    strategy = build("prefix", model, num_blocks=64, block_size=4)
    strategy.kernels = strategy.kernels._replace(store_kv=triton_store.store_kv, attention=gpu.attention)
    expected = tokens_of(Runner(model, strategy, cuda_graphs=False).generate(REQUESTS))
    strategy.reset()
    kept = RunsOut(monkeypatch, kernel, "workspace", at)
    runner = Runner(model, strategy, cuda_graphs=False)
    runner.submit(REQUESTS)
    events = []
    with pytest.raises(torch.OutOfMemoryError):
        while runner.num_running or runner.num_waiting:
            events += runner.step()
    strategy.check_integrity()
    while runner.num_running or runner.num_waiting:
        events += runner.step()
    assert kept.calls > at
    found = {event.request_id: event.result.token_ids for event in events if event.result}
    assert found == dict(enumerate(expected))
    assert tokens_of(runner.generate(REQUESTS)) == expected
    strategy.check_integrity()


@pytest.mark.parametrize("name", ["paged", "offload", "prefix+int8", "prefix+offload"])
def test_a_pool_without_memory_says_how_much_it_takes(name, device):
    model, gone = tiny_llama().to(device), 1 << 40
    options = {"resident": "kv", "host_bytes": 1 << 60} if name == "prefix+offload" else {"num_blocks": gone}
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    with pytest.raises(
        torch.OutOfMemoryError, match=r"no memory for a pool of .* blocks of 4 tokens, .* GiB: give a sm"
    ):
        build(name, model, **{"num_blocks": 8, "block_size": 4, **options})
    if device.type == "cuda":
        assert torch.cuda.memory_allocated() == before
    assert len(Runner(model, build(name, model, num_blocks=20, block_size=4)).generate(REQUESTS)) == 2
