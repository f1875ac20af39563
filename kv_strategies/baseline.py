"""Baseline: the native `DynamicCache`, untouched. The oracle that every strategy is compared with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .step.requests import Event, Output, Request
from .step.sampling import sample, warp
from .step.scores import logprobs, shape
from .step.upstream import with_cache

if TYPE_CHECKING:
    from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessorList


class Baseline:
    """Looks like a `Strategy` to users and benchmarks; holds nothing between calls."""

    name = "baseline"

    def __init__(self, model: LlamaForCausalLM):
        self.model = model

    def cache(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, salt: str = ""
    ) -> DynamicCache:
        """What `generate()` would make by itself."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def installed(self, salt: str = "") -> AbstractContextManager[Baseline]:
        """Nothing to install: calls that bring no cache get this one."""
        return nullcontext(self)

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """One request after the other, one sample after the other: what a runner must reproduce, without batching."""
        submitted = time.perf_counter()
        for request in sorted(requests, key=lambda request: -request.priority):
            for index, processors in enumerate(request.processors()):
                yield from self._run(request, index, processors, submitted)

    def _run(
        self, request: Request, sample_index: int, processors: LogitsProcessorList, submitted: float
    ) -> Iterator[Event]:
        output = Output(request, sample_index, time.perf_counter())
        cache, event = self.cache(), None
        params = [request.sampling(sample_index)]
        input_ids = torch.from_numpy(request.token_ids)[None].to(self.model.device)
        num_logits = 1 if request.prompt_logprobs is None else 0
        while event is None or event.result is None:
            if request.deadline is not None and time.perf_counter() > submitted + request.deadline:
                yield output.finish("deadline")
                return
            logits = self.model(
                input_ids=input_ids, **with_cache(cache), use_cache=True, logits_to_keep=num_logits
            ).logits[0]
            if len(logits) > 1:
                scored = logprobs(logits[:-1], input_ids[0, 1:], request.prompt_logprobs)
                output.prompt_logprobs += [scored.row(row, request.prompt_logprobs) for row in range(len(logits) - 1)]
            logits, num_drawn = logits[-1:], len(output.token_ids)
            shaping = request.shaping(
                num_drawn, processors, lambda: [*request.token_ids.tolist(), *output.token_ids], logits.shape[-1]
            )
            if shaping is not None:
                logits = shape(logits, {0: shaping})
            tokens = sample(logits, params, [num_drawn])
            entry = None
            if request.logprobs is not None:
                entry = logprobs(warp(logits, params), tokens, request.logprobs).row(0, request.logprobs)
            input_ids = tokens[:, None]
            event = output.receive(int(tokens), time.perf_counter(), entry)
            yield event

    def stats(self) -> dict[str, object]:
        return {"strategy": self.name}

    def check_integrity(self) -> None:
        pass

    def reset(self) -> None:
        pass
