"""Steps as CUDA graphs: the whole step is one launch, whatever the model's Python costs.

A graph has fixed shapes and addresses, so there is one for each (batch size, context bucket) that occurs. Smaller
batches are padded with rows that read and store nothing; the bucket bounds the grid of the attention kernel. Steps in
which rows share blocks have graphs of their own, whatever the groups are: the kernels read these from the device, and
one more bucket bounds what each row reads by itself.

Steps that decode are for graphs, and so are those with up to `PREFILL_SIZES[-1]` tokens, of prompts as well: what is
behind a prefix hit, or prompts while others decode. A slow host launches the kernels of a layer one by one in some
0.8 ms, in which a GPU computes 1000 tokens. The rows that decode come first, in as many places as there may be:

    [ decoding rows | padding ][ tokens of prompts, at most MAX_PROMPTS | padding ]

Longer ones, and above `_FEW` tokens those of long prompts, hide what launching them costs, and have the library's
attention. A prompt that has to be cut is cut where a graph is full (`num_fitting`). Nobody who waits for a first token
waits for a capture: steps with prompts are captured where a decode step comes next.

A capture takes memory of its own. Where there is none left, steps of that kind run without a graph, after one warning.

`StepGraphs` holds whole steps of the runner, `StackGraphs` the decoder stack alone for `generate()`, which keeps what
is around it to itself.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .forward import AttendingCache, Attends, forward
from .fused import FusedStack
from .plan import Group, Plan, PlanBuffer, Row
from .ranks import Ranks
from .sampling import greedy
from .upstream import takes_cache

#: Tokens of the steps with prompts that are for graphs: whole tiles of products, from 128 on.
PREFILL_SIZES = (16, 32, 64, *range(128, 1024, 128), *range(1024, 2049, 256))
_FEW = 1024  # tokens of a step that a GPU is done with sooner than a host with launching them: graphs at any rate
SHORT_ROW = 4096  # tokens of a prompt's row, over which our attention for graphs loses less than launching costs
_MAX_VERIFIED = 256  # tokens of a step that gives the logits of all of them
#: Prompts in a step that a graph holds, where it is not one alone.
MAX_PROMPTS = 4
_SMALLEST_BUCKET = 1024  # tokens; 8 times as many where prompts are in the step, to which a bound costs little
_PADDING = Row(np.empty(0, dtype=np.int32), num_tokens=0, num_new=1)
#: What torch says where its errors have no class of their own; the last of sizes beyond 64 bits.
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "size calculation overflowed")


@dataclass
class _Graph:
    replay: Callable[[], object]
    logits: Tensor  # [num_rows, V]
    tokens: Tensor  # [num_rows] the likeliest ones


class Shape(NamedTuple):
    """What all steps of a graph fit into."""

    num_decodes: int  # rows of one query
    num_prompts: int  # rows of any number of queries, behind them
    num_tokens: int  # of both
    bucket: int  # tokens of a row's context


class StepGraphs:
    """Captures and replays steps of the runner: those that decode, and those with a few tokens of prompts.

    Args:
        block_size: tokens a block.
        last_token: [S + 1] the newest token of each seat, written by every step and read by those that decode; the last
            seat belongs to padding rows.
        max_num_seqs: rows of a step at most.
        max_batch_tokens: tokens of a step with prompts at most; 0 where these may not be replayed.
        all_logits: for steps of one prompt alone, of which they give the logits of all tokens rather than of the last.
    """

    def __init__(
        self,
        strategy: Attends,
        block_size: int,
        last_token: Tensor,
        max_num_seqs: int,
        *,
        max_batch_tokens: int,
        all_logits: bool = False,
    ):
        self._strategy, self._block_size, self._last_token = strategy, block_size, last_token
        self._all_logits = all_logits
        self._sizes = sorted({size for size in _batch_sizes() if size < max_num_seqs} | {max_num_seqs})
        most = min(max_batch_tokens, _MAX_VERIFIED) if all_logits else max_batch_tokens
        self._prefill_sizes = PREFILL_SIZES[: bisect_left(PREFILL_SIZES, most) + 1] if most else ()
        self._sizes_beside = [0, *(size for size in self._sizes if size in (8, 32, 128, 512, max_num_seqs))]
        self._met: dict[Shape, bool] = {}  # shapes with prompts -> whether they were met more than once
        self._buffers: dict[Shape, PlanBuffer] = {}  # the graphs read their memory
        self._graphs: dict[tuple[Shape, int], _Graph | None] = {}  # None where there is no memory for one
        self._memory = torch.cuda.graph_pool_handle()
        self._logits: Tensor | None = None  # where all graphs leave theirs: one for each would take a gigabyte
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
        self._follow()
        if not is_urgent:
            self._capture_prompts()
        num_rows = next(size for size in self._sizes if size >= len(rows))
        shape = Shape(num_rows, 0, num_rows, _buckets(max(row.num_tokens for row in rows))[-1])
        found = self._run(shape, rows, {"seats": self._padded(seats, num_rows)}, may_capture=not is_urgent)
        return found and (found[0][: len(rows)], found[1][: len(rows)])

    def prefill(
        self,
        decoding: Sequence[Row],
        prompts: Sequence[Row],
        seats: Sequence[int | None],
        token_ids: np.ndarray,
        *,
        is_urgent: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """One step over rows of one query each and over tokens of prompts, the new ones of their rows.

        Args:
            seats: of all rows; None where a prompt goes on, or where no seat is to have the token.
            token_ids: the new tokens of all prompts, one prompt after the other.

        Returns:
            as `decode` does, with the logits of each row's last token, or those of all tokens. None where there is no
            graph: tokens are many, rows share blocks, or it is an early step of its kind, which is captured later; but
            for those that give all logits, which hold up no first token of their own.
        """
        self._follow()
        shape = self._shape_of(decoding, prompts, len(token_ids))
        if shape is None:
            return None
        if (shape, 0) not in self._graphs:
            self._met[shape] = shape in self._met
            if is_urgent or not (self._all_logits and self._met[shape]):
                return None
            self.warm_up(shape)
        num_places, num_rows = shape.num_decodes, shape.num_decodes + shape.num_prompts
        rows = [*decoding, *[_PADDING] * (num_places - len(decoding)), *prompts]
        ends = accumulate((row.num_new for row in prompts), initial=num_places - 1)
        last = [*range(num_places), *list(ends)[1:]]
        if self._all_logits:
            num_rows, last = shape.num_tokens, range(len(token_ids))
        seats = self._padded(self._padded(seats[: len(decoding)], num_places) + seats[len(decoding) :], num_rows)
        input_ids = np.concatenate((np.zeros(num_places, token_ids.dtype), token_ids))
        inputs = {"seats": seats, "input_ids": input_ids, "last": last}
        found = self._run(shape, rows, inputs, may_capture=False)
        return found and tuple(
            torch.cat((part[: len(decoding)], part[num_places : len(last)])) if decoding else part[: len(last)]
            for part in found
        )

    def num_fitting(self, num_decoding: int, num_tokens: int) -> int:
        """Of so many tokens of prompts that a step has room for beside decoding rows, those that fill a graph to its
        end; all of them where that would cost it more than a tenth.
        """
        places = self._places(num_decoding)
        fitting = max((size - places for size in self._prefill_sizes if size - places <= num_tokens), default=0)
        return fitting if 10 * fitting >= 9 * num_tokens else num_tokens

    def _places(self, num_decoding: int) -> int:
        """For the rows that decode, where prompts are in the step."""
        return next(size for size in self._sizes_beside if size >= num_decoding)

    def _shape_of(self, decoding: Sequence[Row], prompts: Sequence[Row], num_tokens: int) -> Shape | None:
        places, num_prompts = self._places(len(decoding)), 1 if len(prompts) == 1 and not decoding else MAX_PROMPTS
        total = next((size for size in self._prefill_sizes if size >= places + num_tokens), None)
        if total is None or len(prompts) > num_prompts:
            return None
        if total > _FEW and max(row.num_tokens for row in prompts) > SHORT_ROW:
            return None
        *_, bucket = _buckets(max(row.num_tokens for row in (*decoding, *prompts)), has_prompts=True)
        return Shape(places, num_prompts, total, bucket)

    def _follow(self) -> None:
        """Forget the graphs where what they read lies elsewhere, or other code runs."""
        if self._addresses != self._strategy.addresses:
            torch.cuda.synchronize(self._last_token.device)  # the last step may still run
            self._graphs.clear()
            self._logits, self._memory = None, torch.cuda.graph_pool_handle()
            self._addresses = self._strategy.addresses

    def _padded(self, seats: Sequence[int | None], size: int) -> list[int]:
        padding = len(self._last_token) - 1
        return [padding if seat is None else seat for seat in seats] + [padding] * (size - len(seats))

    def _capture_prompts(self) -> None:
        """Of the steps with prompts that ran without a graph more than once, capture one."""
        shape = next((shape for shape, is_again in self._met.items() if is_again), None)
        if shape is not None:
            self.warm_up(shape)

    def shapes(self, max_context: int) -> list[Shape]:
        """The steps that may occur where rows have so many tokens at most. Largest first: the graphs of all others find
        room in the memory that they share.
        """
        found: list[Shape] = []
        if not self._all_logits:
            found += [Shape(size, 0, size, bucket) for size in self._sizes for bucket in _buckets(max_context)]
        kinds = [(0, 1)]
        if not self._all_logits:
            kinds += [(places, MAX_PROMPTS) for places in self._sizes_beside]
        for size in self._prefill_sizes:
            buckets = _buckets(max_context, has_prompts=True)
            found += [Shape(*kind, size, bucket) for kind in kinds if kind[0] < size for bucket in buckets]
        return sorted(found, key=lambda shape: (shape.num_tokens, shape.bucket, shape), reverse=True)

    def warm_up(self, shape: Shape) -> None:
        """Capture a step of one of these shapes, whose rows share no blocks, unless that is done, and replay it over
        padding. Not where hooks want to be called.
        """
        self._met.pop(shape, None)
        self._strategy.follow()
        self._follow()
        if self._strategy.seen.is_opaque:
            return
        inputs = {"seats": self._padded([], 1)}
        self._run(shape, [], inputs | {"input_ids": [0], "last": [0]} if shape.num_prompts else inputs)

    def _run(
        self, shape: Shape, rows: Sequence[Row], inputs: dict[str, Sequence[int]], may_capture: bool = True
    ) -> tuple[Tensor, Tensor] | None:
        """A step that fits into the shape."""
        if shape not in self._buffers:
            num_rows = shape.num_decodes + shape.num_prompts
            per_token = inputs.keys() if self._all_logits else {"input_ids"}
            sizes = {name: shape.num_tokens if name in per_token else num_rows for name in inputs}
            self._buffers[shape] = _buffer(self._last_token.device, num_rows, *shape[2:], self._block_size, sizes)
        buffer = self._buffers[shape]
        plan = buffer.fill(rows, inputs)
        private = _private(plan)
        if private and shape.num_prompts:
            return None
        if (shape, private) not in self._graphs:
            if not may_capture:
                return None
            padding = {name: [0] for name in inputs} | {"seats": self._padded([], 1)}
            bounded = _bounded(buffer.fill([], padding), shape, private)
            captured = _captured(lambda: self._capture(buffer, bounded), shape.num_tokens, self._strategy.ranks)
            if captured is None:  # what is left of it is not captured into again
                self._memory = torch.cuda.graph_pool_handle()
            self._graphs[shape, private] = captured
            buffer.fill(rows, inputs)
        graph = self._graphs[shape, private]
        if graph is None:
            return None
        graph.replay()
        return graph.logits, graph.tokens

    def _capture(self, buffer: PlanBuffer, plan: Plan) -> _Graph:
        step = self._step(buffer, plan)
        logits, _ = _warm_up(step, self._stream)  # all is padding still, which reads and stores nothing
        if self._logits is None:
            num_rows = _MAX_VERIFIED if self._all_logits else self._sizes[-1] + MAX_PROMPTS
            self._logits = logits.new_empty(num_rows, logits.shape[1])
        replay, (logits, tokens) = _record(step, self._stream, self._memory)
        return _Graph(replay, logits, tokens)

    def _step(self, buffer: PlanBuffer, plan: Plan) -> Callable[[], tuple[Tensor, Tensor]]:
        cache = AttendingCache(self._strategy)  # of its own: the graph reads this plan
        inputs = buffer.tensors

        def step() -> tuple[Tensor, Tensor]:
            seats, num_decodes = inputs["seats"], plan.num_decodes
            input_ids = self._last_token[seats[:num_decodes]]
            if "input_ids" in inputs:
                input_ids = torch.cat((input_ids, inputs["input_ids"][num_decodes:]))
            logits = forward(cache, plan, input_ids, inputs.get("last", 0))
            tokens = greedy(logits)
            self._last_token[seats] = tokens.clamp(min=0)  # no embedding is looked up for a row that has failed
            return logits if self._logits is None else self._logits[: len(logits)].copy_(logits), tokens

        return step


class Rehearsal(StepGraphs):
    """What `graphs` launch in their warm-up, and nothing captured or kept.

    Args:
        strategy: what serves in place of theirs.
    """

    def __init__(self, graphs: StepGraphs, strategy: Attends):
        vars(self).update(vars(graphs))
        self._strategy, self._last_token = strategy, graphs._last_token.clone()
        self._met, self._buffers, self._graphs, self._logits = {}, {}, {}, None

    def shapes(self, max_context: int) -> list[Shape]:
        """Of those of the graphs enough to launch each kernel: what one is compiled for follows from how many rows and
        tokens there are, and whether a row may be longer than a window; or from how long it may be, whatever there is.
        """
        shortest, longest, buckets = {}, {}, {}
        for shape in super().shapes(max_context):  # the largest first
            longest.setdefault(shape[:-1], shape)
            shortest[shape[:-1]] = shape
            buckets.setdefault(shape[-1], shape)
        return list(dict.fromkeys([*longest.values(), *shortest.values(), *buckets.values()]))

    def _capture(self, buffer: PlanBuffer, plan: Plan) -> _Graph:
        return _Graph(lambda: None, *_warm_up(self._step(buffer, plan), self._stream))


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
        shape = len(rows), _buckets(max(row.num_tokens for row in rows))[-1]
        if shape not in self._buffers:
            self._buffers[shape] = _buffer(
                self.stack.device, len(rows), *shape, self._block_size, {"distances": len(rows)}
            )
        buffer = self._buffers[shape]
        plan = buffer.fill(rows, {"distances": [0]})
        if distances is not None:
            plan.distances = buffer.tensors["distances"].copy_(distances)
        kind = *shape, _private(plan)
        if kind not in self._steps:
            self._steps[kind] = StackStep(self.stack, *kind[1:], self._stream)
        step = self._steps[kind]
        step.follow(plan)
        return step


class StackStep:
    """One decode step of so many rows and so long contexts at most: called as the stack is."""

    def __init__(self, stack: FusedStack, bucket: int, private: int, stream: torch.cuda.Stream | None):
        self.plan: Plan | None = None
        self._stack, self._bucket, self._private, self._stream = stack, bucket, private, stream
        self._is_warm = self._is_refused = False  # no capture yet; there is no memory for one
        self._replay: Callable[[], object] | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None

    def follow(self, plan: Plan) -> None:
        """Take the plan of the next step, which lies where those before it lay."""
        num_rows = len(plan.context_lens)
        self.plan = _bounded(plan, Shape(num_rows, 0, num_rows, self._bucket), self._private)

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


def _captured(capture: Callable[[], Any], num_tokens: int, ranks: Ranks) -> Any:
    """What `capture` gives; None where there is no memory for it. Of several ranks, one that stops in the middle has
    left the others in theirs, and raises.
    """
    try:
        return capture()
    except RuntimeError as error:
        if not is_out_of_memory(error) or ranks.size > 1:
            raise
    warnings.warn(
        f"there is no memory left to capture a step of {num_tokens} tokens as a CUDA graph: such steps run without "
        "one. A smaller pool (num_blocks, memory_fraction) leaves room for it",
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


def _buckets(num_tokens: int, has_prompts: bool = False) -> list[int]:
    """Tokens that a row may have without another graph, up to a row of so many: powers of two, or of four where prompts
    are in the step.
    """
    smallest, factor = (8 * _SMALLEST_BUCKET, 4) if has_prompts else (_SMALLEST_BUCKET, 2)
    buckets = [smallest]
    while buckets[-1] < num_tokens:
        buckets.append(buckets[-1] * factor)
    return buckets


def _private(plan: Plan) -> int:
    """Most tokens that a row reads by itself where rows share some; 0: none does."""
    return _buckets(max(plan.private_lens))[-1] if plan.row_groups else 0


def _bounded(plan: Plan, shape: Shape, private: int) -> Plan:
    """The plan with bounds that hold for all steps of a shape, and of `_private` so large."""
    num_decodes, num_prompts, num_tokens, bucket = shape
    num_rows, prompts = num_decodes + num_prompts, [num_tokens - num_decodes, *[0] * (num_prompts - 1)]
    return replace(
        plan,
        query_lens=[1] * num_decodes + prompts[:num_prompts],
        row_lens=[bucket] * num_rows,
        row_groups=[Group(0, num_rows, bucket - private)] if private else [],
        num_decodes=num_decodes,
        is_replayed=True,
    )


def _batch_sizes() -> list[int]:
    return [1, 2, 4, *range(8, 64, 8), *range(64, 1024, 16)]
