"""The embedded model in float32 on natural text: both doors give the tokens of DynamicCache, preempted or not.

A sample of what `make bench SUITE=equality` runs whole (64 prompts of 1 to 3000 tokens, 128 new tokens each).
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kv_strategies import Request, Runner, build
from kv_strategies.models import load_model
from kv_strategies.models.text import prompts
from kv_strategies.step.upstream import with_cache

LENGTHS = [1, 2, 15, 16, 17, 31, 63, 100, 257, 480]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def model_and_prompts():
    model, tokenizer = load_model(dtype=torch.float32, device="cpu")
    model.generation_config.eos_token_id = None
    return model, prompts(tokenizer, LENGTHS, seed=11)


@pytest.fixture(scope="module")
def expected(model_and_prompts):
    """Each prompt alone, through the native cache."""
    model, ragged = model_and_prompts
    return [generate(model, [prompt], DynamicCache(config=model.config))[0] for prompt in ragged]


def generate(model, ragged: list[list[int]], cache) -> list[list[int]]:
    columns = max(map(len, ragged))
    ids = torch.tensor([[0] * (columns - len(prompt)) + prompt for prompt in ragged])
    mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in ragged])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **with_cache(cache), **options)[:, columns:].tolist()


@pytest.mark.upstream
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_generate(model_and_prompts, expected, block_size):
    model, ragged = model_and_prompts
    strategy = build("paged", model, num_blocks=6000 // block_size, block_size=block_size)
    for rows in (slice(0, 5), slice(5, 8), slice(8, 10)):
        assert generate(model, ragged[rows], strategy.cache()) == expected[rows]


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("name", "options", "preempts"),
    [
        ("paged", {"block_size": 16, "num_blocks": 200}, False),
        ("paged", {"block_size": 7, "num_blocks": 90}, True),
        ("paged", {"block_size": 1, "num_blocks": 520}, True),
        ("contiguous", {"max_length": 512, "num_blocks": 10}, False),
    ],
)
def test_runner(model_and_prompts, expected, name, options, preempts):
    model, ragged = model_and_prompts
    strategy = build(name, model, **options)
    runner = Runner(model, strategy, max_num_seqs=10, max_batch_tokens=200)
    results = runner.generate([Request(prompt, max_new_tokens=NEW_TOKENS) for prompt in ragged])
    strategy.check_integrity()
    assert [result.token_ids for result in results] == expected
    assert (runner.num_preemptions > 0) == preempts


def test_paged_wastes_under_four_percent(model_and_prompts):
    """Of the places in the blocks that a ragged batch holds; `stats` says what the allocator gave."""
    model, _ = model_and_prompts
    strategy = build("paged", model, num_blocks=700)
    lengths = [int(1 + 2999 * i / 63) for i in range(64)]
    places = sum(-(-length // 16) * 16 for length in lengths)
    assert 1 - sum(lengths) / places < 0.04, "the batch itself would waste more"
    tables = [strategy.open_table(()) for _ in range(6)]
    strategy.reserve(list(zip(tables, lengths[::12], strict=True)))
    stats = strategy.stats()
    assert stats["tokens_stored"] == sum(lengths[::12])
    assert 1 - stats["tokens_stored"] / stats["token_places"] < 0.04
    planes = [plane for store in strategy.placement.stores.values() for plane in store.planes.values()]
    assert stats["kv_bytes"] == sum(plane.untyped_storage().nbytes() for plane in planes)
