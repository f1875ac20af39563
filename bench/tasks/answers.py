"""Ways to have samples answered: by the native cache, by a strategy behind the runner, or the question hidden.

A way takes samples of one task and gives token ids, [turns][samples]. Where the question is hidden, a context is fed
before the question is known, as when a document is loaded once and asked about later: what a strategy drops, it drops
blindly. Every turn goes on from a copy of that cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.systems import Capacity, Native, Ours
from bench.tasks.story import Sample

Way = Callable[[Sequence[Sample]], list[list[list[int]]]]


def native(model, rows: int, cache: str | None = None) -> Way:
    """By a native cache, `rows` at a time: DynamicCache, which is exact, or what `generate()` knows by that name."""
    generate = Native(model, cache)

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return [row for some in _batches(prompts, rows) for row in generate(some, new_tokens).token_ids]

    return lambda samples: [answer(*turn) for turn in _turns(samples)]


def shown(model, strategy, rows: int) -> Way:
    """Every turn is a request of its own, its question behind the context."""
    runner = Ours(model, strategy, Capacity([[1] * rows]))
    return lambda samples: [runner(*turn).token_ids for turn in _turns(samples)]


def hidden(model, strategy, rows: int) -> Way:
    """The context first, whole; then the questions."""
    return lambda samples: [
        [row for some in turn for row in some]
        for turn in zip(*(_hidden(model, strategy, some) for some in _batches(samples, rows)), strict=True)
    ]


@torch.inference_mode()
def _hidden(model, strategy, samples: Sequence[Sample]) -> list[list[list[int]]]:
    from kv_strategies.step.upstream import with_cache

    context, mask = _padded([sample.context for sample in samples], model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, last = strategy.cache(), context.shape[1] - 1
    # A single column says that a prompt has ended: what a strategy drops behind a prompt, it drops there.
    for begin, end in ((0, last), (last, last + 1)):
        model(
            context[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            logits_to_keep=1,
            use_cache=True,
            **with_cache(cache),
        )
    answers = []
    for turn in zip(*(sample.turns for sample in samples), strict=True):
        rest, rest_mask = _padded([each.rest for each in turn], model.device)
        ids, seen = torch.cat((context, rest), dim=1), torch.cat((mask, rest_mask), dim=1)
        out = model.generate(
            ids,
            attention_mask=seen,
            max_new_tokens=max(each.new_tokens for each in turn),
            do_sample=False,
            pad_token_id=0,
            **with_cache(copy.copy(cache)),
        )
        answers.append(out[:, ids.shape[1] :].tolist())
    return answers


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, columns] int64 token ids, padded on the left, and which of them are tokens."""
    columns = max(map(len, rows))
    ids = torch.tensor([[0] * (columns - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


def _turns(samples: Sequence[Sample]) -> Iterator[tuple[list[list[int]], int]]:
    """Of every turn the prompts, and new tokens enough for all of them."""
    for turn in zip(*(sample.turns for sample in samples), strict=True):
        prompts = [[*sample.context, *each.rest] for sample, each in zip(samples, turn, strict=True)]
        yield prompts, max(each.new_tokens for each in turn)


def _batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def right(samples: Sequence[Sample], way: Way, decode: Callable[[list[int]], str]) -> list[bool]:
    """Of every sample, whether all its turns were answered right."""
    said = [[decode(row) for row in turn] for turn in way(samples)]
    return [
        all(turn.question.is_right(text) for turn, text in zip(sample.turns, texts, strict=True))
        for sample, texts in zip(samples, zip(*said, strict=True), strict=True)
    ]
