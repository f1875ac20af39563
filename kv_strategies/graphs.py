"""Decode steps as CUDA graphs: the whole step is one launch, whatever the model's Python costs.

A graph has fixed shapes and addresses, so there is one for each (batch size, context bucket) that occurs, made when it
first occurs. Smaller batches are padded with rows that read and store nothing; the bucket bounds the grid of the
attention kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .paged import BlockTable
from .plan import PlanBuffer
from .sampling import greedy

_SMALLEST_BUCKET = 1024  # tokens


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    buffer: PlanBuffer  # the graph reads its memory
    logits: Tensor  # [num_rows, V]
    tokens: Tensor  # [num_rows] the likeliest ones


class DecodeGraphs:
    """Captures and replays decode steps.

    Args:
        cache: the cache whose plan the captured layers read.
        last_token: [S + 1] the newest token of each slot, read and written by every step; the last slot belongs to
            padding rows.
    """

    def __init__(self, model, cache, last_token: Tensor, max_num_seqs: int):
        self._model, self._cache, self._last_token = model, cache, last_token
        self._sizes = sorted({size for size in _batch_sizes() if size < max_num_seqs} | {max_num_seqs})
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, rows: Sequence[tuple[BlockTable, int]], slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One step over rows of one query each. The likeliest tokens are the newest of their slots when it has run.

        Returns:
            logits [B, V] and the likeliest tokens [B], both valid until the next step.
        """
        num_rows = next(size for size in self._sizes if size >= len(rows))
        longest = max(table.num_tokens for table, _ in rows)
        bucket = max(_SMALLEST_BUCKET, 1 << (longest - 1).bit_length())
        captured = self._graphs.get((num_rows, bucket))
        if captured is None:
            captured = self._graphs[num_rows, bucket] = self._capture(num_rows, bucket, rows[0][0].pool.block_size)
        padding = [len(self._last_token) - 1] * (num_rows - len(rows))
        captured.buffer.fill(rows, {"slots": [*slots, *padding]})
        captured.graph.replay()
        return captured.logits[: len(rows)], captured.tokens[: len(rows)]

    def _capture(self, num_rows: int, bucket: int, block_size: int) -> _Graph:
        from .runner import forward

        device = self._last_token.device
        buffer = PlanBuffer(device, num_rows, num_rows, -(-bucket // block_size), {"slots": num_rows})
        plan = buffer.fill([], {"slots": [len(self._last_token) - 1] * num_rows})
        plan = replace(plan, query_lens=[1] * num_rows, row_lens=[bucket] * num_rows, num_decodes=num_rows)
        slots = buffer.tensors["slots"]

        def step() -> tuple[Tensor, Tensor]:
            logits = forward(self._model, self._cache, plan, self._last_token[slots], 0)
            tokens = greedy(logits)
            self._last_token[slots] = tokens
            return logits, tokens

        self._cache.plan = plan
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()  # compile kernels and fill caches; the padding rows read and store nothing
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits, tokens = step()
        return _Graph(graph, buffer, logits, tokens)


def _batch_sizes() -> list[int]:
    return [1, 2, 4, *range(8, 64, 8), *range(64, 1024, 16)]
