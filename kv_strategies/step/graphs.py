"""Steps as CUDA graphs: the whole step is one launch, whatever the model's Python costs.

A graph has fixed shapes and addresses, so there is one for each (batch size, context bucket) that occurs. Smaller
batches are padded with rows that read and store nothing; the bucket bounds the grid of the attention kernel. Steps in
which rows share blocks have graphs of their own, whatever the groups are: the kernels read these from the device, and
one more bucket bounds what each row reads by itself.

Steps that decode are for graphs, and so are those that prefill a few tokens of one prompt (what is behind a prefix hit,
say), padded with tokens of no row. Others are long enough to hide what launching them costs.

A capture takes memory of its own. Where there is none left, steps of that kind run without a graph, after one warning.

`StepGraphs` holds whole steps of the runner, `StackGraphs` the decoder stack alone for `generate()`, which keeps what
is around it to itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .forward import AttendingCache, Attends, forward
from .fused import FusedStack
from .plan import Group, Plan, PlanBuffer, Row
from .ranks import Ranks
from .sampling import greedy
from .upstream import takes_cache

#: New tokens of the prefills that are for graphs, at most each. More of them take a GPU longer than launching them.
PREFILL_SIZES = (16, 32, 64, 128, 256)
_SMALLEST_BUCKET = 1024  # tokens
#: What torch says where its errors have no class of their own; the last of sizes beyond 64 bits.
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "size calculation overflowed")


@dataclass
class _Graph:
    replay: Callable[[], object]
    logits: Tensor  # [num_rows, V]
    tokens: Tensor  # [num_rows] the likeliest ones


class StepGraphs:
    """Captures and replays steps of the runner: those that decode, and those that prefill a few tokens of one prompt.

    Args:
        block_size: tokens a block.
        last_token: [S + 1] the newest token of each seat, written by every step and read by those that decode; the last
            seat belongs to padding rows.
        max_num_seqs: rows of a step at most.
        prefills: whether prompts may be replayed as well.
        all_logits: whether prefills give the logits of all their tokens, which are no seat's, rather than of the last.
    """

    def __init__(
        self,
        strategy: Attends,
        block_size: int,
        last_token: Tensor,
        max_num_seqs: int,
        *,
        prefills: bool,
        all_logits: bool = False,
    ):
        self._strategy, self._block_size, self._last_token = strategy, block_size, last_token
        self._prefills, self._all_logits = prefills, all_logits
        self._sizes = sorted({size for size in _batch_sizes() if size < max_num_seqs} | {max_num_seqs})
        self._met: set[tuple[int, int, int]] = set()
        self._buffers: dict[tuple[int, int, int], PlanBuffer] = {}  # the graphs read their memory
        self._graphs: dict[tuple[int, int, int, int], _Graph | None] = {}  # None where there is no memory for one
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = _stream(last_token.device)
        self._addresses = strategy.addresses

    def decode(
        self, rows: Sequence[Row], seats: Sequence[int], *, is_urgent: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """One step over rows of one query each. The likeliest tokens are the newest of their seats when it has run.

        Args:
            is_urgent: a first token is on its way, whose telling would wait for a capture: a later step is captured.

        Returns:
            logits [B, V] and the likeliest tokens [B], both valid until the next step. None where there is no graph.
        """
        num_rows = next(size for size in self._sizes if size >= len(rows))
        shape = num_rows, num_rows, _bucket(max(row.num_tokens for row in rows))
        padding = [len(self._last_token) - 1] * (num_rows - len(rows))
        found = self._run(shape, rows, {"seats": [*seats, *padding]}, is_urgent)
        return found and (found[0][: len(rows)], found[1][: len(rows)])

    def prefill(
        self, row: Row, seat: int, token_ids: np.ndarray, *, is_urgent: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """One step over the last tokens of a prompt, the new ones of its row. Returns as `decode` does.

        None where no graph is for it: tokens are many, or it is the first step of its kind. That may also be the last,
        and who waits for it would wait for the capture.
        """
        num_tokens = next((size for size in PREFILL_SIZES if size >= len(token_ids)), None)
        shape = 1, num_tokens, _bucket(row.num_tokens)
        if num_tokens is None or not self._prefills:
            return None
        if shape not in self._met:
            self._met.add(shape)
            return None
        last = [len(token_ids) - 1]
        if self._all_logits:
            seat, last = len(self._last_token) - 1, range(len(token_ids))
        inputs = {"seats": [seat], "input_ids": token_ids, "last": last}
        found = self._run(shape, [row], inputs, is_urgent)
        return found and (found[0][: len(last)], found[1][: len(last)])

    def shapes(self, max_context: int) -> list[tuple[int, int, int]]:
        """The steps that may occur where rows have so many tokens at most: rows, tokens, and tokens of a row's context.
        Largest first: the graphs of all others find room in the memory that they share.
        """
        sizes = [] if self._all_logits else [(size, size) for size in self._sizes]
        sizes += [(1, size) for size in PREFILL_SIZES if self._prefills]
        longest = _bucket(max_context)
        buckets = [longest >> i for i in range((longest // _SMALLEST_BUCKET).bit_length())]
        return sorted(((*size, bucket) for size in sizes for bucket in buckets), key=lambda s: s[1:], reverse=True)

    def warm_up(self, shape: tuple[int, int, int]) -> None:
        """Capture a step of one of these shapes, whose rows share no blocks, unless that is done, and replay it over
        padding. Not where hooks want to be called.
        """
        self._strategy.follow()
        if self._strategy.seen.is_opaque:
            return
        num_rows, num_tokens, _ = shape
        self._met.add(shape)
        padding = {"seats": [len(self._last_token) - 1]}
        self._run(shape, [], padding if num_tokens == num_rows else padding | {"input_ids": [0], "last": [0]})

    def _run(
        self, shape: tuple[int, int, int], rows, inputs: dict[str, Sequence[int]], is_urgent: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """A step of at most so many rows, tokens, and tokens of a row's context."""
        num_rows, num_tokens, bucket = shape
        if self._addresses != self._strategy.addresses:  # what a graph reads lies elsewhere, or other code runs
            torch.cuda.synchronize(self._last_token.device)  # the last step may still run
            self._graphs.clear()
            self._memory = torch.cuda.graph_pool_handle()
            self._addresses = self._strategy.addresses
        if shape not in self._buffers:
            per_token = inputs.keys() if self._all_logits else {"input_ids"}
            sizes = {name: num_tokens if name in per_token else num_rows for name in inputs}
            self._buffers[shape] = _buffer(self._last_token.device, *shape, self._block_size, sizes)
        buffer = self._buffers[shape]
        bounds = _bounds(buffer.fill(rows, inputs), bucket)
        kind = num_rows, num_tokens, *bounds
        if kind not in self._graphs:
            if is_urgent:
                return None
            padding = {name: [0] for name in inputs} | {"seats": [len(self._last_token) - 1]}
            plan = _bounded(buffer.fill([], padding), *bounds)
            self._graphs[kind] = _captured(lambda: self._capture(buffer, plan), num_rows, self._strategy.ranks)
            if self._graphs[kind] is None:  # what is left of it is not captured into again
                self._memory = torch.cuda.graph_pool_handle()
            buffer.fill(rows, inputs)
        graph = self._graphs[kind]
        if graph is None:
            return None
        graph.replay()
        return graph.logits, graph.tokens

    def _capture(self, buffer: PlanBuffer, plan: Plan) -> _Graph:
        cache = AttendingCache(self._strategy)  # of its own: the graph reads this plan
        inputs = buffer.tensors

        def step() -> tuple[Tensor, Tensor]:
            seats = inputs["seats"]
            input_ids = inputs["input_ids"] if "input_ids" in inputs else self._last_token[seats]
            logits = forward(cache, plan, input_ids, inputs.get("last", 0))
            tokens = greedy(logits)
            self._last_token[seats] = tokens.clamp(min=0)  # no embedding is looked up for a row that has failed
            return logits, tokens

        _warm_up(step, self._stream)  # all is padding still, which reads and stores nothing
        replay, (logits, tokens) = _record(step, self._stream, self._memory)
        return _Graph(replay, logits, tokens)


class StackGraphs:
    """The decode steps of `generate()` through one stack. The first of a kind runs as it is, the second is captured."""

    def __init__(self, stack: FusedStack, block_size: int):
        self.stack, self._block_size = stack, block_size
        self._buffers: dict[tuple[int, int], PlanBuffer] = {}  # the graphs read their memory
        self._steps: dict[tuple[int, int, int], StackStep] = {}
        self._stream = _stream(stack.device)

    def step(self, rows: Sequence[Row], distances: Tensor | None = None) -> StackStep:
        """What stands in for the stack in a step over rows of one query each, its plan filled in.

        Args:
            distances: [B] see `Plan`; there in all steps of a strategy, or in none.
        """
        shape = len(rows), _bucket(max(row.num_tokens for row in rows))
        if shape not in self._buffers:
            self._buffers[shape] = _buffer(
                self.stack.device, len(rows), *shape, self._block_size, {"distances": len(rows)}
            )
        buffer = self._buffers[shape]
        plan = buffer.fill(rows, {"distances": [0]})
        if distances is not None:
            plan.distances = buffer.tensors["distances"].copy_(distances)
        bounds = _bounds(plan, shape[1])
        if (len(rows), *bounds) not in self._steps:
            self._steps[len(rows), *bounds] = StackStep(self.stack, bounds, self._stream)
        step = self._steps[len(rows), *bounds]
        step.follow(plan)
        return step


class StackStep:
    """One decode step of so many rows and so long contexts at most: called as the stack is."""

    def __init__(self, stack: FusedStack, bounds: tuple[int, int], stream: torch.cuda.Stream | None):
        self.plan: Plan | None = None
        self._stack, self._bounds, self._stream = stack, bounds, stream
        self._is_warm = self._is_refused = False  # no capture yet; there is no memory for one
        self._replay: Callable[[], object] | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None

    def follow(self, plan: Plan) -> None:
        """Take the plan of the next step, which lies where those before it lay."""
        self.plan = _bounded(plan, *self._bounds)

    @takes_cache
    def __call__(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], cache, **kwargs) -> Tensor:
        """See `FusedStack`. The result is valid until the next step."""
        given = (hidden_states, *(part.expand(len(hidden_states), -1, -1) for part in position_embeddings))
        if self._is_warm and not self._is_refused and self._replay is None:
            capture = partial(self._capture, given, cache.strategy)
            self._is_refused = _captured(capture, len(hidden_states), cache.strategy.ranks) is None
        if self._replay is None:
            self._is_warm = True
            return _warm_up(  # kernels compile
                lambda: self._stack(hidden_states, position_embeddings=position_embeddings, cache=cache),
                self._stream,
            )
        for kept, tensor in zip(self._inputs, given, strict=True):
            kept.copy_(tensor)
        self._replay()
        return self._output

    def _capture(self, given: Sequence[Tensor], strategy: Attends) -> Callable[[], object]:
        own = AttendingCache(strategy)  # of no call: the graph serves all of them
        own.plan = self.plan
        with torch.inference_mode(False), torch.no_grad():  # what is kept serves all modes
            self._inputs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in given]
            self._replay, self._output = _record(
                lambda: self._stack(self._inputs[0], position_embeddings=self._inputs[1:], cache=own),
                self._stream,
            )
        return self._replay


def _captured(capture: Callable[[], Any], num_rows: int, ranks: Ranks) -> Any:
    """What `capture` gives; None where there is no memory for it. Of several ranks, one that stops in the middle has
    left the others in theirs, and raises.
    """
    try:
        return capture()
    except RuntimeError as error:
        if not is_out_of_memory(error) or ranks.size > 1:
            raise
    warnings.warn(
        f"there is no memory left to capture a step of {num_rows} rows as a CUDA graph: such steps run without one. A "
        "smaller pool (num_blocks, memory_fraction) leaves room for it",
        stacklevel=2,
    )
    return None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what it comes from: a capture that was broken off raises errors of its own over it."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY):
            return True
        error = error.__context__
    return False


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """For warm-ups and captures; None on a CPU, which has no graphs."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _warm_up(work: Callable[[], Any], stream: torch.cuda.Stream | None) -> Any:
    """`work()` in the stream of its capture, as it has to be run once before: kernels compile, caches fill, and what a
    kernel keeps for a stream is made, outside of the graph.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = work()
    current.wait_stream(stream)
    return result


def _record(
    work: Callable[[], Any], stream: torch.cuda.Stream | None, memory: tuple[int, int] | None = None
) -> tuple[Callable[[], object], Any]:
    """What repeats `work` on the same memory, and where its result will be. Graphs that never overlap may share it."""
    graph = torch.cuda.CUDAGraph()
    # The stream once more: one that is broken off may leave its own behind.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=memory, stream=stream):
        output = work()
    return graph.replay, output


def _buffer(
    device: torch.device,
    num_rows: int,
    num_tokens: int,
    bucket: int,
    block_size: int,
    extra: dict[str, int] | None = None,
) -> PlanBuffer:
    """The memory of all plans of so many rows, tokens and so long contexts at most."""
    return PlanBuffer(device, num_rows, num_tokens, -(-bucket // block_size), block_size, extra)


def _bucket(num_tokens: int) -> int:
    """Tokens that a row may have without another graph: the next power of two."""
    return max(_SMALLEST_BUCKET, 1 << (num_tokens - 1).bit_length())


def _bounds(plan: Plan, bucket: int) -> tuple[int, int]:
    """Most tokens of a row of the step, and most that one reads by itself where rows share some (0: none does)."""
    return bucket, _bucket(max(plan.private_lens)) if plan.row_groups else 0


def _bounded(plan: Plan, bucket: int, private: int) -> Plan:
    """The plan with bounds that hold for all steps of a kind: one new token a row, or any number of a single row."""
    num_rows = len(plan.context_lens)
    return replace(
        plan,
        query_lens=[plan.num_tokens // num_rows] * num_rows,
        row_lens=[bucket] * num_rows,
        row_groups=[Group(0, num_rows, bucket - private)] if private else [],
        num_decodes=num_rows if plan.num_tokens == num_rows else 0,
        is_replayed=True,
    )


def _batch_sizes() -> list[int]:
    return [1, 2, 4, *range(8, 64, 8), *range(64, 1024, 16)]
