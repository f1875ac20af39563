"""Prompts that begin alike and come together: the first is computed, the others wait a step and find it.

    a step       [ system prompt, question 1 ][ another prompt ]        questions 2 and 3 wait, others go ahead of them
    the next     [ question 2 ][ question 3 ] ...

A block is found from the step after that in which it is computed. Without the wait, requests sent at once behind one
system prompt would compute it as often as a step has room for, and hold it as often in memory. SGLang orders its queue
by the same thought (in-batch prefix caching).
"""

from __future__ import annotations

from collections.abc import Sequence

from .base import NoSharing
from .sequences import ActiveSequence
from .strategy import Strategy

MIN_TOKENS_SPARED = 32  # fewer are computed again sooner than a step is waited for
MOST_LOOKED_AT = 256  # waiting sequences, so that a long queue of prompts all alike costs a step no time


class Underway:
    """What the prompts of one step compute that others could take over from the next step on."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._shares = not isinstance(strategy.sharing, NoSharing)
        self._beginnings: dict[int, set[tuple[str, bytes]]] = {}  # so many tokens -> of which salts and prompts
        self._num_held = 0  # at the head of the queue: what they wait for only becomes more in the course of a step

    def add(self, seq: ActiveSequence, num_tokens: int) -> None:
        """The step computes so many more tokens of this sequence, for which its table has room by now."""
        size = self._strategy.block_size
        end = seq.table.num_seen
        full = (end - num_tokens) // size * size
        spared = full + -(-MIN_TOKENS_SPARED // size) * size
        if self._shares and spared <= min(end, len(seq.prompt)):
            beginning = (seq.request.salt, seq.prompt[:spared].tobytes())
            self._beginnings.setdefault(spared, set()).add(beginning)

    def first_free(self, waiting: Sequence[ActiveSequence], budget: int) -> int | None:
        """Which of the queue is to start next: the first that would find no more by waiting. It goes ahead of others
        only where that costs them no more than the step: as urgent as they are, and computed whole with this budget,
        in tokens. None: nobody.
        """
        for index in range(self._num_held, min(len(waiting), MOST_LOOKED_AT)):
            seq = waiting[index]
            if index and not (self._may_pass(waiting[index - 1], seq) and len(seq.prompt) <= budget):
                return None
            if not self._would_find_more(seq):
                return index
            self._num_held = index + 1
        return None

    @staticmethod
    def _may_pass(held: ActiveSequence, seq: ActiveSequence) -> bool:
        if held.output.token_ids or seq.output.token_ids:
            return False  # preempted: what it gave up is for itself
        is_whole = len(seq.prompt) <= seq.request.chunk and not seq.is_scoring
        return is_whole and held.request.priority == seq.request.priority

    def _would_find_more(self, seq: ActiveSequence) -> bool:
        """For the same tokens nobody waits twice: they may not be there to be found."""
        if not self._beginnings or seq.suspended is not None or seq.is_scoring:
            return False  # its blocks are brought back, or all of its tokens are wanted
        known = self._strategy.compaction.num_sharable(len(seq.prompt), len(seq.prompt))
        for spared, beginnings in self._beginnings.items():
            if seq.num_awaited < spared <= known and (seq.request.salt, seq.prompt[:spared].tobytes()) in beginnings:
                seq.num_awaited = spared
                return True
        return False
