"""Where the contents of idle blocks go when a block is given to others: the contract, and the null object."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar

Found = TypeVar("Found")


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

    A key names the contents of one block, all layers, K and V. What raises leaves everything as it was: a block that
    was to go down may be kept or not, one that was to come up still is.
    """

    num_places = 0  # blocks that can be kept at once
    num_failed = 0  # copies that raised

    def demote(self, key: bytes, block: int, tokens: Chain | bytes = b"") -> bool:
        """Keep a copy of `block`, which holds `tokens`, under `key`. It may be overwritten as soon as this returns.
        False where nothing is kept.
        """
        return False

    def num_promotable(self, wanted: Iterable[tuple[bytes, Chain | bytes]]) -> int:
        """How many of the first (key, tokens) of `wanted` are kept, and faster fetched than computed again."""
        return 0

    def promote(self, key: bytes, block: int) -> bool:
        """Fill `block` with what is kept under `key`, which is then forgotten. False where it has been lost."""
        return False

    def discard(self, key: bytes) -> None:
        """Forget `key`, if it is kept."""

    def attempt(self, copy: Callable[..., Found], *args: object) -> Found | None:
        """One of the above, by those who can do without: None where it fails. Whatever was to be copied is computed
        again when it is needed.
        """
        try:
            return copy(*args)
        except AssertionError:  # a bug of ours
            raise
        except Exception as error:
            self.report(error)
            return None

    def report(self, error: Exception) -> None:
        """Count a copy that has failed; the first gives a warning."""
        self.num_failed += 1
        if self.num_failed == 1:
            warnings.warn(
                f"a block could not be copied between tiers ({type(error).__name__}: {error}); what could not be "
                "copied is computed again when it is needed, here and whenever this happens again",
                RuntimeWarning,
                stacklevel=4,
            )

    def check_integrity(self) -> None:
        """Raises AssertionError where a place is lost, or taken twice (a bug of ours)."""

    def stats(self) -> dict[str, object]:
        return {}

    def clear(self) -> None:
        """Forget everything."""
