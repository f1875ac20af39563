"""One code path on every tested release of Transformers, and nothing that it calls deprecated is used."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from common import VOCAB, tiny_llama
from transformers import DynamicCache

from bench.systems import Capacity, open_system
from kv_strategies import Request, Runner, build
from kv_strategies.step.upstream import CACHE, cache_of, takes_cache, with_cache

pytestmark = pytest.mark.upstream

MODEL = tiny_llama()
RENAMED = CACHE == "cache"
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


@contextmanager
def deprecations() -> Iterator[list[str]]:
    """What is warned of meanwhile as deprecated, by Python's warnings or by the log of Transformers."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    log = logging.getLogger("transformers")
    logging.Logger.warning_once.cache_clear()  # Transformers warns once a process
    log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        log.removeHandler(handler)
        found += [str(one.message) for one in caught if issubclass(one.category, (FutureWarning, DeprecationWarning))]
        found[:] = [message for message in found if "deprecat" in message.lower() or "removed" in message]


def prompt(num_rows: int = 2, num_columns: int = 20) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(1, VOCAB, (num_rows, num_columns))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def through_generate(name: str, told: bool = False, **options) -> None:
    strategy = build(name, MODEL, num_blocks=64)
    for _ in range(2):  # the second finds what the first has published
        given = prompt()
        out = MODEL.generate(
            **given, **with_cache(strategy.cache(*given.values()) if told else strategy.cache()), **OPTIONS | options
        )
    assert torch.equal(out, MODEL.generate(**given, **OPTIONS | options))


def a_second_turn() -> None:
    cache, given = build("paged", MODEL, num_blocks=64).cache(), prompt()
    first = MODEL.generate(**given, **with_cache(cache), **OPTIONS, return_dict_in_generate=True)
    assert cache_of(first) is cache
    mask = torch.cat([given["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
    MODEL.generate(first.sequences, attention_mask=mask, **with_cache(cache), **OPTIONS)


def plain_forwards() -> None:
    for cache in (DynamicCache(config=MODEL.config), build("paged", MODEL, num_blocks=64).cache()):
        with torch.no_grad():
            assert cache_of(MODEL(prompt()["input_ids"], **with_cache(cache), use_cache=True)) is cache


def through_runner(name: str) -> None:
    strategy = build("baseline", MODEL) if name == "baseline" else build(name, MODEL, num_blocks=64)
    Runner(MODEL, strategy).generate([Request([1, 2, 3, 4], max_new_tokens=4), Request([1, 2, 3], max_new_tokens=4)])


def through_the_bench(name: str) -> None:
    open_system(name, MODEL, Capacity([[12, 9]]))([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4]], 4)


CALLS = {
    "forwards": plain_forwards,
    "generate": lambda: through_generate("paged"),
    "generate, prompt told": lambda: through_generate("prefix", told=True),
    "generate, beams": lambda: through_generate("paged", num_beams=3),
    "generate, beams, prompt told": lambda: through_generate("prefix", told=True, num_beams=3),
    "generate, chunked prefill": lambda: through_generate("paged", prefill_chunk_size=8),
    "generate, second turn": a_second_turn,
    "runner": lambda: through_runner("paged"),
    "runner, prefix": lambda: through_runner("prefix+int8"),
    "baseline": lambda: through_runner("baseline"),
    "bench, native": lambda: through_the_bench("baseline"),
    "bench, generate": lambda: through_the_bench("paged, generate()"),
    "bench, runner": lambda: through_the_bench("paged"),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_deprecated_is_used(call):
    with deprecations() as found:
        CALLS[call]()
    assert found == []


def test_what_is_deprecated_would_be_seen():
    log = logging.getLogger("transformers.somewhere")
    for call in (
        lambda: warnings.warn("`a` is deprecated", FutureWarning, stacklevel=1),
        lambda: log.warning_once("`a` will be removed in version 6"),
    ):
        for _ in range(2):
            with deprecations() as found:
                call()
            assert len(found) == 1


def test_users_may_write_the_old_name_and_from_5_24_the_new_one():
    given, strategy = prompt(), build("paged", MODEL, num_blocks=64)
    expected = MODEL.generate(**given, **OPTIONS)
    for name in ("past_key_values", "cache") if RENAMED else ("past_key_values",):
        with deprecations() as found:
            assert torch.equal(MODEL.generate(**given, **{name: strategy.cache()}, **OPTIONS), expected)
            with torch.no_grad():
                MODEL(**given, **{name: strategy.cache()})
        assert bool(found) == (name != CACHE)


@pytest.mark.parametrize("told", [False, True])
def test_what_is_cached_is_not_fed_again(told):
    """generate() slices the prompt by what the cache says; a cache without layers is no cache of linear attention."""
    strategy, given = build("prefix", MODEL, num_blocks=64, block_size=4), prompt()
    fed = []
    handle = MODEL.model.register_forward_pre_hook(  # before: a model with another hook is another model
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    cache = strategy.cache(*given.values()) if told else strategy.cache()
    MODEL.generate(**given, **with_cache(cache), **OPTIONS)
    fed.clear()
    if told:
        MODEL.generate(**given, **with_cache(strategy.cache(*given.values())), **OPTIONS)
    else:
        longer = {
            name: torch.cat([tensor, torch.ones(2, 6, dtype=torch.long)], dim=1) for name, tensor in given.items()
        }
        MODEL.generate(**longer, **with_cache(cache), **OPTIONS)
    handle.remove()
    assert fed == ([4, 1, 1, 1] if told else [3, 1, 1, 1])


def test_a_method_gets_the_cache_whatever_it_is_called():
    class Taker:
        @takes_cache
        def take(self, other, *, cache):
            """What it does."""
            return other, cache

    assert Taker().take(1, **with_cache(2)) == Taker().take(1, cache=2) == (1, 2)
    assert Taker.take.__doc__ == "What it does."
