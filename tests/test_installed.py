"""A strategy under code that calls `generate()` by itself."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
from common import VOCAB, tiny_llama
from transformers import DynamicCache, GenerationConfig, pipeline

from kv_strategies import build
from kv_strategies.models import load_model
from kv_strategies.step.upstream import CACHE, cache_of, with_cache

MODEL = tiny_llama(num_layers=1)
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def caches(model, *args, **kwargs):
    """The cache that a call has used."""
    return cache_of(model.generate(*args, return_dict_in_generate=True, **OPTIONS, **kwargs))


@pytest.mark.parametrize("name", ["paged", "prefix", "prefix+window", "int8", "offload", "baseline"])
def test_a_pipeline_runs_unchanged(name):
    model, tokenizer = load_model(dtype=torch.float32, device="cpu")
    tokenizer.padding_side = "left"
    texts = ["In the beginning God created", "The capital of France is Paris, and that of Germany is"]
    told = {"max_new_tokens": 4, "do_sample": False, "batch_size": 2, "return_full_text": False}
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = generator(texts, **told)
    strategy = build(name, model) if name == "baseline" else build(name, model, num_blocks=32)
    with strategy.installed():
        assert generator(texts, **told) == expected
        assert generator(texts, **told) == expected
    assert generator(texts, **told) == expected
    if name == "prefix":  # 5 tokens and 12: what is padded has no full block to skip
        assert strategy.stats()["prompt_tokens"] > 0
    if name != "baseline":
        strategy.check_integrity()
        assert strategy.stats()["blocks_used"] == 0


def test_what_others_have_computed_is_skipped():
    strategy = build("prefix", MODEL, num_blocks=40, block_size=4)
    ids = torch.arange(2, 40)[None] % VOCAB
    expected = MODEL.generate(ids, **OPTIONS)
    for call in (
        lambda: MODEL.generate(ids, **OPTIONS),
        lambda: MODEL.generate(inputs=ids, **OPTIONS),
        lambda: MODEL.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **OPTIONS),
    ):
        with strategy.installed(), strategy.installed(salt="another tenant"), strategy.installed():
            assert torch.equal(call(), expected)
    assert strategy.stats()["hit_tokens"] == 2 * 36
    with strategy.installed("another tenant"):
        MODEL.generate(ids, **OPTIONS)
    assert strategy.stats()["hit_tokens"] == 2 * 36


def test_a_call_that_asks_for_its_own_cache_gets_it():
    strategy, ids, own = build("paged", MODEL, num_blocks=40), torch.tensor([[1, 2, 3]]), DynamicCache()
    with strategy.installed():
        assert caches(MODEL, ids).strategy is strategy
        assert caches(MODEL, ids, **with_cache(None)).strategy is strategy
        assert caches(MODEL, ids, past_key_values=None).strategy is strategy
        assert caches(MODEL, ids, **with_cache(own)) is own
        assert caches(MODEL, ids, use_cache=False) is None
        assert type(caches(MODEL, ids, cache_implementation="static")).__name__ == "StaticCache"
        given = GenerationConfig(use_cache=False)
        assert caches(MODEL, ids, given) is None and caches(MODEL, ids, generation_config=given) is None


def test_padding_that_upstream_finds_by_itself_and_prompts_that_are_no_tokens():
    strategy = build("prefix", MODEL, num_blocks=40, block_size=2)
    padded = torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]])
    embeds = {"inputs_embeds": MODEL.get_input_embeddings()(padded)}
    for call in (lambda: MODEL.generate(padded, **OPTIONS), lambda: MODEL.generate(**embeds, **OPTIONS)):
        expected = call()
        with strategy.installed():
            assert torch.equal(call(), expected)
    strategy.check_integrity()


def test_strategies_nest_and_leave_in_any_order_and_after_errors():
    ids = torch.tensor([[1, 2, 3]])
    first, second = (build("paged", MODEL, num_blocks=20) for _ in range(2))
    outer, inner = first.installed(), second.installed()
    with pytest.raises(KeyError), first.installed():
        raise KeyError
    assert "generate" not in vars(MODEL)
    outer.__enter__()
    inner.__enter__()
    assert caches(MODEL, ids).strategy is second
    assert next(iter(inspect.signature(MODEL.generate).parameters)) == "inputs"
    outer.__exit__(None, None, None)  # as two threads may
    assert caches(MODEL, ids).strategy is second
    inner.__exit__(None, None, None)
    assert "generate" not in vars(MODEL) and isinstance(caches(MODEL, ids), DynamicCache)
    MODEL.generate = plain = lambda *args, **kwargs: type(MODEL).generate(MODEL, *args, **kwargs)
    try:
        with first.installed():
            assert caches(MODEL, ids).strategy is first
        assert MODEL.generate is plain
    finally:
        del MODEL.generate


def test_threads_install_side_by_side():
    strategies, errors = [build("prefix", MODEL, num_blocks=40, block_size=4) for _ in range(3)], []
    prompts = [torch.tensor([[i + 1] * 9]) for i in range(3)]
    expected = [MODEL.generate(ids, **OPTIONS) for ids in prompts]

    def work(i: int) -> None:
        try:
            for _ in range(5):
                with strategies[i].installed():
                    assert torch.equal(MODEL.generate(prompts[i], **OPTIONS), expected[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and "generate" not in vars(MODEL)
    for strategy in strategies:
        strategy.check_integrity()
        assert strategy.stats()["blocks_used"] == 0
    assert sum(strategy.stats()["hit_tokens"] for strategy in strategies) > 0, f"found by {CACHE}="
