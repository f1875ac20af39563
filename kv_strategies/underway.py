"""Prompts that begin alike and come together: the first is computed, the others wait a step and find it.

    a step       [ system prompt, question 1 ]                  questions 2 to 64 are next in the queue
    the next     [ question 2 ][ question 3 ] ...

A block is found from the step after that in which it is computed. Without the wait, requests sent at once behind one
system prompt would compute it as often as a step has room for, and hold it as often in memory. Who waits keeps its
turn, so all behind it wait as well; the step is shorter for it. SGLang holds requests back for the same reason.
"""

from __future__ import annotations

from .base import NoSharing
from .sequences import ActiveSequence
from .strategy import Strategy

#: Tokens that are worth a step: reading the weights of 7B once takes an H100 as long as computing some 250.
MIN_TOKENS_SPARED = 256


class Underway:
    """What the prompts of one step compute that others could take over from the next step on."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._shares = not isinstance(strategy.sharing, NoSharing)
        self._beginnings: dict[int, set[tuple[str, bytes]]] = {}  # so many tokens -> of which salts and prompts

    def add(self, seq: ActiveSequence, num_tokens: int) -> None:
        """The step computes so many more tokens of this sequence, for which its table has room by now."""
        size = self._strategy.block_size
        end = seq.table.num_seen
        full = (end - num_tokens) // size * size
        spared = full + -(-MIN_TOKENS_SPARED // size) * size
        if self._shares and spared <= min(end, len(seq.prompt)):
            beginning = (seq.request.salt, seq.prompt[:spared].tobytes())
            self._beginnings.setdefault(spared, set()).add(beginning)

    def spares(self, seq: ActiveSequence) -> bool:
        """Whether a sequence would find more tokens computed if it waited for the next step."""
        if not self._beginnings or seq.suspended is not None or seq.is_scoring:
            return False  # its blocks are brought back, or all of its tokens are wanted
        known = self._strategy.compaction.num_sharable(len(seq.prompt), len(seq.prompt))
        return any(
            spared <= known and (seq.request.salt, seq.prompt[:spared].tobytes()) in beginnings
            for spared, beginnings in self._beginnings.items()
        )
