"""Where the contents of idle blocks go when a block is given to others: the contract, and the null object."""

from __future__ import annotations

from collections.abc import Iterable


class Chain:
    """What a block holds, with all that it continues: a tier that compares chains takes no block for another, whatever
    their keys. Each holds the one before it; two that were found equal share what is before them, so that comparing
    a row block by block looks at every block once.
    """

    __slots__ = ("before", "tokens")

    def __init__(self, before: Chain | None, tokens: bytes):
        self.before, self.tokens = before, tokens

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Chain):
            return NotImplemented
        one, two = self, other
        while one is not two:
            if one is None or two is None or one.tokens != two.tokens:
                return False
            one, two = one.before, two.before
        self.before = other.before
        return True

    __hash__ = None


class LowerTiers:
    """Where the contents of idle blocks go when a block is given to others. Here: nowhere, they are computed again.

    A key names the contents of one block, all layers, K and V.
    """

    num_places = 0  # blocks that can be kept at once

    def demote(self, key: bytes, block: int, tokens: Chain | bytes = b"") -> None:
        """Keep a copy of `block`, which holds `tokens`, under `key`. It may be overwritten as soon as this returns."""

    def num_promotable(self, wanted: Iterable[tuple[bytes, Chain | bytes]]) -> int:
        """How many of the first (key, tokens) of `wanted` are kept, and faster fetched than computed again."""
        return 0

    def promote(self, key: bytes, block: int) -> bool:
        """Fill `block` with what is kept under `key`, which is then forgotten. False where it has been lost."""
        return False

    def discard(self, key: bytes) -> None:
        """Forget `key`, if it is kept."""

    def stats(self) -> dict[str, object]:
        return {}

    def clear(self) -> None:
        """Forget everything."""
