"""Where the contents of idle blocks go when a block is given to others: the contract, and the null object."""

from __future__ import annotations

from collections.abc import Iterable


class LowerTiers:
    """Where the contents of idle blocks go when a block is given to others. Here: nowhere, they are computed again.

    A key names the contents of one block, all layers, K and V.
    """

    num_places = 0  # blocks that can be kept at once

    def demote(self, key: bytes, block: int, tokens: bytes = b"") -> None:
        """Keep a copy of `block`, which holds `tokens`, under `key`. It may be overwritten as soon as this returns."""

    def num_promotable(self, wanted: Iterable[tuple[bytes, bytes]]) -> int:
        """How many of the first (key, tokens) of `wanted` are kept, and faster fetched than computed again."""
        return 0

    def promote(self, key: bytes, block: int) -> bool:
        """Fill `block` with what is kept under `key`, which is then forgotten. False where it has been lost."""
        return False

    def discard(self, key: bytes) -> None:
        """Forget `key`, if it is kept."""

    def check_integrity(self) -> None:
        """Raises AssertionError where a place is lost, or taken twice (a bug of ours)."""

    def stats(self) -> dict[str, object]:
        return {}

    def clear(self) -> None:
        """Forget everything."""
