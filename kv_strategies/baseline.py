"""Baseline: the native `DynamicCache`, untouched. The oracle that every strategy is compared with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .step.requests import Event, Output, Request
from .step.sampling import sample
from .step.upstream import with_cache

if TYPE_CHECKING:
    from transformers import DynamicCache, LlamaForCausalLM


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

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """One request after the other, one sample after the other: what a runner must reproduce, without batching."""
        for request in requests:
            for index in range(request.n):
                yield from self._run(request, index)

    def _run(self, request: Request, sample_index: int) -> Iterator[Event]:
        output = Output(request, sample_index, time.perf_counter())
        cache, event = self.cache(), None
        input_ids = torch.from_numpy(request.token_ids)[None].to(self.model.device)
        while event is None or event.result is None:
            logits = self.model(input_ids=input_ids, **with_cache(cache), use_cache=True, logits_to_keep=1).logits
            input_ids = sample(logits[:, -1], [request.sampling(sample_index)], [len(output.token_ids)])[:, None]
            event = output.receive(int(input_ids), time.perf_counter())
            yield event

    def stats(self) -> dict[str, object]:
        return {"strategy": self.name}

    def check_integrity(self) -> None:
        pass

    def reset(self) -> None:
        pass
