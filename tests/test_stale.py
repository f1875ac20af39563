"""Blocks come with what others have left in them: whatever that is, NaN included, nobody computes with it."""

from __future__ import annotations

import pytest
import torch
from common import tiny_llama

from kv_strategies import Request, Runner, build
from kv_strategies import runner as runner_module
from kv_strategies.kernels.blocks import gpu, triton_store, triton_topn

HISTORY = list(range(1, 14))  # three full blocks and one token
REQUESTS = [Request([*HISTORY, *tail], max_new_tokens=3) for tail in ([], [20], [30, 31, 32, 33])]
CASES = {
    "paged": {},
    "prefix": {},  # the last two rows begin alike: a prefill behind a hit, and decode steps with a cascade
    "prefix+int8": {},
    "prefix+int4": {},
    "prefix+fp8": {},
    "window": {"window": 6, "sinks": 2},
    "window+int8": {"window": 6, "sinks": 2},
    "offload": {},
    "offload top": {"top_n": 4},
    "offload top+int8": {"top_n": 4},
}


def poison(strategy) -> None:
    """All free blocks hold bytes that are NaN in every dtype; of int8, the scales are."""
    free = list(strategy.pool._free)
    assert len(free) == strategy.pool.num_blocks
    num_bytes = strategy.placement.read_blocks(free[:1]).shape[1]
    strategy.placement.write_blocks(free, torch.full((len(free), num_bytes), 0xFF, dtype=torch.uint8))
    assert strategy.placement.read_blocks(free[-1:]).view(torch.float32).isnan().all()


@pytest.mark.parametrize("kernels", ["the device's", "Triton's"])
@pytest.mark.parametrize("case", CASES)
def test_stale_blocks_are_never_read(case, kernels, monkeypatch, device):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, seen = tiny_llama(num_layers=1, num_heads=2, num_kv_heads=1).to(device), []
    draw = runner_module.sample
    monkeypatch.setattr(
        runner_module, "sample", lambda logits, *args: seen.append(logits.clone()) or draw(logits, *args)
    )

    def run(is_poisoned: bool) -> torch.Tensor:
        seen.clear()
        strategy = build(case.replace(" top", ""), model, num_blocks=40, block_size=4, **CASES[case])
        if kernels == "Triton's":
            strategy.kernels = strategy.kernels._replace(
                store_kv=triton_store.store_kv, attention=gpu.attention, topn_attention=triton_topn.topn_attention
            )
        if is_poisoned:
            poison(strategy)
        runner = Runner(model, strategy, cuda_graphs=False)
        runner.generate(REQUESTS[:1])  # the others find its blocks
        runner.generate(REQUESTS[1:])
        strategy.check_integrity()
        return torch.cat(seen)

    clean, found = run(False), run(True)
    assert found.isfinite().all()
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-5)
