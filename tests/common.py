"""What the tests share: tiny random models, random requests, and the oracle."""

from __future__ import annotations

import itertools
import random
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kv_strategies import STRATEGIES, Request, Runner, build, register
from kv_strategies.paged import BlockTable
from kv_strategies.registry import EXCLUSIVE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from codec_raw4 import RAW4
from retention_every_fourth import EVERY_FOURTH

VOCAB = 61

#: Strategies from outside the package: whatever holds of all strategies is tested with them as well.
OUTSIDE = {"raw4": RAW4, "every4": EVERY_FOURTH}
for name, preset in OUTSIDE.items():
    if name not in STRATEGIES:
        register(name, preset)


def can_be_built(parts: Iterable[str]) -> bool:
    """Whether no two of the parts answer the same question, or questions that exclude each other."""
    answered = [STRATEGIES[part].answers for part in parts]
    return len(set(answered)) == len(answered) and not any(set(pair) <= set(answered) for pair in EXCLUSIVE)


def slots(table: BlockTable, start: int, stop: int) -> np.ndarray:
    """Where tokens start..stop - 1 of a table live, block * block_size + offset."""
    size, tokens = table.pool.block_size, np.arange(start, stop)
    return table.blocks[tokens // size].astype(np.int64) * size + tokens % size


def tiny_llama(*, num_heads: int = 4, num_kv_heads: int = 2, num_layers: int = 2, seed: int = 0, **changes):
    """A random Llama whose greedy continuations vary: wide initialisation, no eos."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "hidden_size": 16 * num_heads,
            "intermediate_size": 96,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "vocab_size": VOCAB,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def random_requests(rng: random.Random, count: int, longest: int = 40, max_new: int = 12) -> list[Request]:
    """Requests of every kind: greedy and sampled, one and several samples, repeated prompts."""
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]
    return [
        Request(
            rng.choice(prompts),
            max_new_tokens=rng.randint(1, max_new),
            temperature=rng.choice([0.0, 0.0, 0.8]),
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.9]),
            seed=rng.randrange(1000),
            n=rng.choice([1, 1, 1, 3]),
            stop_token_ids=rng.sample(range(VOCAB), 2),
        )
        for _ in range(count)
    ]


def baseline_tokens(model, requests) -> list[list[int]]:
    """The oracle: each sample alone, through the native cache."""
    return [result.token_ids for result in Runner(model, build("baseline", model)).generate(requests)]


def every_moment(action: Callable[[], object], step: int = 1, of: str | tuple[str, ...] = "") -> Iterator[None]:
    """Runs `action` with Ctrl-C at one moment after the other: at the n-th call or return of anything, builtins
    included, until it ends before that. Yields after each.

    Args:
        step: only every so many moments.
        of: only in the code below these paths.
    """
    num_interrupted = 0
    for at in itertools.count(1, step):
        seen = []

        def watch(frame, event, arg, seen=seen, at=at):
            if not frame.f_code.co_filename.startswith(of):
                return
            seen.append(event)
            if len(seen) == at:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

        try:
            try:
                sys.setprofile(watch)
                action()
            finally:
                sys.setprofile(None)
        except KeyboardInterrupt:
            num_interrupted += 1
        yield
        if len(seen) < at:
            break
    assert num_interrupted > 10
