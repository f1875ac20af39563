"""Load: thousands of requests through a pool of a twentieth of what they would take together."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import pytest
from common import VOCAB, baseline_tokens, tiny_llama

from kv_strategies import Request, Runner, build

NUM_REQUESTS = int(os.environ.get("LOAD_REQUESTS", 10_000))
MODEL = tiny_llama(num_heads=2, num_kv_heads=1)
BLOCK_SIZE = 4


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


@pytest.mark.parametrize(
    ("name", "options"),
    [("paged", {}), ("prefix", {}), ("prefix+offload", {"resident": "kv", "host_bytes": 1 << 21})],
)
def test_many_requests_in_a_small_pool(name, options, record_property):
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 12, 40]))] for _ in range(60)]
    alone = baseline_tokens(MODEL, [Request(prompt, max_new_tokens=40) for prompt in prompts])
    asked = [(rng.randrange(60), rng.choice([1, 2, 4, 6, 6, 40])) for _ in range(NUM_REQUESTS)]
    together = sum(-(-(len(prompts[p]) + n - 1) // BLOCK_SIZE) for p, n in asked)
    num_blocks = together // 20
    strategy = build(name, MODEL, num_blocks=num_blocks, block_size=BLOCK_SIZE, **options)
    runner = Runner(MODEL, strategy, max_num_seqs=1024, max_batch_tokens=2048)
    runner.submit([Request(prompts[p], max_new_tokens=n, request_id=i) for i, (p, n) in enumerate(asked)])

    before, most, steps = 0, 0, 0
    first, found = {}, {}
    while runner.num_running or runner.num_waiting:
        steps += 1
        if steps == 20:  # warm
            gc.collect()
            before = resident_bytes()
        for event in runner.step():
            first.setdefault(event.request_id, steps)
            if event.result is not None:
                assert event.request_id not in found
                found[event.request_id] = event.result.token_ids
        most = max(most, resident_bytes())
    assert found == {i: alone[p][:n] for i, (p, n) in enumerate(asked)}
    assert list(first.values()) == sorted(first.values()) and list(first) == sorted(first), "first come, first served"
    strategy.check_integrity()
    assert strategy.stats()["blocks_used"] == 0
    assert runner.num_preemptions > 0
    assert most - before < 32 << 20, "memory is flat"
    told = {
        "blocks together": together, "blocks": num_blocks, "steps": steps, "preemptions": runner.num_preemptions,
        "longest wait in steps": max(first.values()), "bytes grown": most - before,
    }  # fmt: skip
    for what, count in told.items():
        record_property(what, count)
    print(f"\n{name}: {told}")
