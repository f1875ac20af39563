"""Warm-up: the steps that will occur, before anybody waits for one.

A kernel is compiled when it first runs, which takes seconds, a library makes a plan for each shape that it meets, and a
graph is captured for each kind of step. So ahead of all requests run

    graphs      of all decode steps and those with few tokens of prompts; of padding, which reads and stores nothing
    forwards    the largest that have no graph, with nothing cached and with as much as there may be:

        [ decoding rows ][ chunk of a prompt ]    [ chunk of a prompt ]    [ short one ]    [ decoding rows ]    [ one ]

Forwards read blocks of the pool, whatever these hold, and store nothing. What they compute nobody looks at.

Compiling takes the most of it, so threads do it, and begin before the first step (`kernels/triton_compile.py`): the
same steps through `FirstLayer`, of graphs those of a `Rehearsal`, launch the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from .forward import AttendingCache, Attends, Seen, forward
from .graphs import StepGraphs
from .plan import NULL_SLOT, PlanBuffer, Row

_SHORT = 256  # tokens of a prompt that are too few for the kernels of a long one
#: What a step is, in words, and what runs it.
Step = tuple[str, Callable[[], object]]


def captures(graphs: Iterable[StepGraphs], max_context: int) -> Iterator[Step]:
    """All steps for which there are graphs, with rows of so many tokens at most."""
    for group in graphs:
        for shape in group.shapes(max_context):
            num_rows = shape.num_decodes + shape.num_prompts
            what = f"graph of {shape.num_tokens} tokens in {num_rows} rows of {shape.bucket} at most"
            yield what, partial(group.warm_up, shape)


def forwards(
    strategy: Attends,
    num_blocks: int,
    block_size: int,
    *,
    max_num_seqs: int,
    max_batch_tokens: int,
    max_context: int,
) -> Iterator[Step]:
    """Forwards of so many rows, tokens, and tokens of a row at most; the largest first."""
    alone, beside = (min(tokens, max_context) for tokens in (max_batch_tokens, max_batch_tokens - max_num_seqs + 1))
    for past in dict.fromkeys((max_context - alone, 0)):
        decoding = (past, 1)
        mixed = (*(max_num_seqs - 1) * (decoding,), (past, beside))
        chunk, short = ((past, alone),), ((past, min(_SHORT, alone)),)
        for rows in dict.fromkeys((mixed, chunk, short, max_num_seqs * (decoding,), (decoding,))):
            what = f"forward of {sum(num_new for _, num_new in rows)} tokens in {len(rows)} rows, behind {past} each"
            yield what, partial(_run, strategy, num_blocks, block_size, rows)


class FirstLayer:
    """A strategy, but that its stack is one layer."""

    def __init__(self, strategy: Attends):
        self._strategy = strategy

    @property
    def seen(self) -> Seen:
        seen = self._strategy.seen
        return seen._replace(stack=seen.stack and seen.stack.first())

    def __getattr__(self, name: str) -> object:
        return getattr(self._strategy, name)


def _run(strategy: Attends, num_blocks: int, block_size: int, rows: Sequence[tuple[int, int]]) -> None:
    """A forward over rows with so many tokens behind them, and so many new ones."""
    planned = []
    for number, (past, num_new) in enumerate(rows):
        # A row has one block all over, neighbours have different ones: what rows share is read by other kernels.
        blocks = np.full(-(-(past + num_new) // block_size), number % num_blocks, dtype=np.int32)
        planned.append(Row(blocks, past + num_new, num_new))
    device, ends = strategy.model.device, list(accumulate(num_new for _, num_new in rows))
    max_blocks = max(len(row.blocks) for row in planned)
    buffer = PlanBuffer(device, len(rows), ends[-1], max_blocks, block_size, {"last": len(rows)})
    plan = buffer.fill(planned, {"last": [end - 1 for end in ends]})
    plan.slot_mapping.fill_(NULL_SLOT)
    input_ids = torch.zeros(ends[-1], dtype=torch.int64, device=device)
    forward(AttendingCache(strategy), plan, input_ids, buffer.tensors["last"])
