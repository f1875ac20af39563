"""Decode steps as CUDA graphs: the whole step is one launch, whatever the model's Python costs.

A graph has fixed shapes and addresses, so there is one for each (batch size, context bucket) that occurs, made when it
first occurs. Smaller batches are padded with rows that read and store nothing; the bucket bounds the grid of the
attention kernel. Steps in which rows share blocks have graphs of their own, whatever the groups are: the kernels read
these from the device, and one more bucket bounds what each row reads by itself.

`DecodeGraphs` holds whole steps of the runner, `StackGraphs` the decoder stack alone for `generate()`, which keeps what
is around it to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import AttendingCache
from .paged import BlockTable
from .plan import Group, Plan, PlanBuffer
from .sampling import greedy

if TYPE_CHECKING:
    from .fused import FusedStack

_SMALLEST_BUCKET = 1024  # tokens


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
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
        self._buffers: dict[tuple[int, int], PlanBuffer] = {}  # the graphs read their memory
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, rows: Sequence[tuple[BlockTable, int]], slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One step over rows of one query each. The likeliest tokens are the newest of their slots when it has run.

        Returns:
            logits [B, V] and the likeliest tokens [B], both valid until the next step.
        """
        num_rows = next(size for size in self._sizes if size >= len(rows))
        shape = num_rows, _bucket(max(table.num_tokens for table, _ in rows))
        if shape not in self._buffers:
            self._buffers[shape] = _buffer(self._last_token.device, *shape, rows, {"slots": num_rows})
        buffer = self._buffers[shape]
        extra = {"slots": [*slots, *[len(self._last_token) - 1] * (num_rows - len(rows))]}
        bounds = _bounds(buffer.fill(rows, extra), shape[1])
        captured = self._graphs.get((num_rows, *bounds))
        if captured is None:
            captured = self._graphs[num_rows, *bounds] = self._capture(buffer, num_rows, bounds)
            buffer.fill(rows, extra)
        captured.graph.replay()
        return captured.logits[: len(rows)], captured.tokens[: len(rows)]

    def _capture(self, buffer: PlanBuffer, num_rows: int, bounds: tuple[int, int]) -> _Graph:
        from .runner import forward

        device = self._last_token.device
        plan = _bounded(buffer.fill([], {"slots": [len(self._last_token) - 1] * num_rows}), *bounds)
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
        return _Graph(graph, logits, tokens)


class StackGraphs:
    """The decode steps of `generate()` through one stack. The first of a kind runs as it is, the second is captured."""

    def __init__(self, stack: FusedStack):
        self.stack = stack
        self._buffers: dict[tuple[int, int], PlanBuffer] = {}  # the graphs read their memory
        self._steps: dict[tuple[int, int, int], StackStep] = {}

    def step(self, rows: Sequence[tuple[BlockTable, int]]) -> StackStep:
        """What stands in for the stack in a step over rows of one query each, its plan filled in."""
        shape = len(rows), _bucket(max(table.num_tokens for table, _ in rows))
        if shape not in self._buffers:
            self._buffers[shape] = _buffer(self.stack.device, *shape, rows)
        plan = self._buffers[shape].fill(rows)
        bounds = _bounds(plan, shape[1])
        if (len(rows), *bounds) not in self._steps:
            self._steps[len(rows), *bounds] = StackStep(self.stack, bounds)
        step = self._steps[len(rows), *bounds]
        step.follow(plan)
        return step


class StackStep:
    """One decode step of so many rows and so long contexts at most: called as the stack is."""

    def __init__(self, stack: FusedStack, bounds: tuple[int, int]):
        self.plan: Plan | None = None
        self._stack, self._bounds = stack, bounds
        self._is_warm = False
        self._replay: Callable[[], object] | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None

    def follow(self, plan: Plan) -> None:
        """Take the plan of the next step, which lies where those before it lay."""
        self.plan = _bounded(plan, *self._bounds)

    def __call__(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], past_key_values, **kwargs
    ) -> Tensor:
        """See `FusedStack`. The result is valid until the next step."""
        if not self._is_warm:  # kernels compile
            self._is_warm = True
            return self._stack(hidden_states, position_embeddings=position_embeddings, past_key_values=past_key_values)
        given = (hidden_states, *(part.expand(len(hidden_states), -1, -1) for part in position_embeddings))
        if self._replay is None:
            cache = AttendingCache(past_key_values.strategy)  # of no call: the graph serves all of them
            cache.plan = self.plan
            with torch.inference_mode(False), torch.no_grad():  # what is kept serves all modes
                self._inputs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in given]
                self._replay, self._output = _record(
                    lambda: self._stack(self._inputs[0], position_embeddings=self._inputs[1:], past_key_values=cache)
                )
        for own, tensor in zip(self._inputs, given, strict=True):
            own.copy_(tensor)
        self._replay()
        return self._output


def _record(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """What repeats `work` on the same memory, and where its result will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    return graph.replay, output


def _buffer(device: torch.device, num_rows: int, bucket: int, rows, extra: dict[str, int] | None = None) -> PlanBuffer:
    """The memory of all plans of so many rows and so long contexts at most, `rows` among them."""
    return PlanBuffer(device, num_rows, num_rows, -(-bucket // rows[0][0].pool.block_size), extra)


def _bucket(num_tokens: int) -> int:
    """Tokens that a row may have without another graph: the next power of two."""
    return max(_SMALLEST_BUCKET, 1 << (num_tokens - 1).bit_length())


def _bounds(plan: Plan, bucket: int) -> tuple[int, int]:
    """Most tokens of a row of the step, and most that one reads by itself where rows share some (0: none does)."""
    return bucket, _bucket(max(plan.private_lens)) if plan.row_groups else 0


def _bounded(plan: Plan, bucket: int, private: int) -> Plan:
    """The plan of decode rows with bounds that hold for all steps of a kind."""
    num_rows = plan.num_tokens
    return replace(
        plan,
        query_lens=[1] * num_rows,
        row_lens=[bucket] * num_rows,
        row_groups=[Group(0, num_rows, bucket - private)] if private else [],
        num_decodes=num_rows,
    )


def _batch_sizes() -> list[int]:
    return [1, 2, 4, *range(8, 64, 8), *range(64, 1024, 16)]
