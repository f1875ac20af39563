"""A copy between device and host that fails, in whichever lane: nothing is lost, and the next request is right."""

from __future__ import annotations

import random

import pytest
import torch
from common import VOCAB, baseline_tokens, tiny_llama

from kv_strategies import Request, Runner, build
from kv_strategies.tiers import host, stream
from kv_strategies.tiers.rates import Rates
from kv_strategies.tiers.transfer import Lane

MODEL = tiny_llama(num_heads=2, num_kv_heads=1)
CASES = {
    "offload": {},
    "offload, all streamed": {"resident": "none"},
    "offload, preempted rows go to the host": {"resident": "kv", "host_bytes": 1 << 20, "num_blocks": 14},
    "prefix+offload, idle blocks go to the host": {"resident": "kv", "host_bytes": 1 << 20, "num_blocks": 14},
}
POINTS = {
    "the lane that copies": (Lane, "copy"),
    "marks": (Lane, "mark"),
    "waits": (Lane, "wait"),
    "what is fetched": (stream.LayerStream, "_fetch_ahead"),
    "what is appended": (stream, "copy_slots"),
    "a block through the bounce": (host, "copy_row"),
}


@pytest.mark.filterwarnings("ignore:a block could not be copied between tiers")  # and they go on
@pytest.mark.parametrize("at", [1, 9, 30])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("case", CASES)
def test_a_copy_that_fails_costs_time(case, point, at, monkeypatch, device):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, rng = MODEL.to(device), random.Random(at)
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (9, 20, 17)]
    requests = [Request(prompt, max_new_tokens=12) for prompt in [*prompts, prompts[1]]]
    expected = baseline_tokens(model, requests)
    monkeypatch.setattr(Rates, "seconds_saved", lambda *args, **options: 1.0)  # a fetch always pays
    strategy = build(case.partition(",")[0], model, **{"num_blocks": 40, "block_size": 4, **CASES[case]})
    runner = Runner(model, strategy, max_num_seqs=3, max_batch_tokens=17)
    owner, name = POINTS[point]
    method, calls = getattr(owner, name), []

    def copies(*args, **options):
        calls.append(name)
        if len(calls) == at:
            raise RuntimeError("CUDA error: as if the link had failed")
        return method(*args, **options)

    monkeypatch.setattr(owner, name, copies)
    runner.submit(requests)
    events, failures = [], 0
    while runner.num_running or runner.num_waiting:
        try:
            events += runner.step()
        except RuntimeError:
            failures += 1
            strategy.check_integrity()
    assert failures <= 1
    assert {event.request_id: event.result.token_ids for event in events if event.result} == dict(enumerate(expected))
    assert [result.token_ids for result in runner.generate(requests)] == expected
    strategy.check_integrity()
    assert strategy.stats()["blocks_used"] == 0
