"""Ctrl-C between two things, never in the middle of one.

Python raises KeyboardInterrupt wherever the main thread happens to be: between two lines that only together keep the
books of blocks, tree and tiers. No rollback helps there, as it can be interrupted as well.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType


class uninterrupted(contextlib.ContextDecorator):
    """Until the end of the block, or of the function that it decorates, Ctrl-C is only noted; then it is raised.

    So it is for work that ends soon, or calls `check` now and then; a second Ctrl-C does not wait. In other threads,
    which no Ctrl-C reaches, it does nothing; nor where SIGINT has been given another meaning than a Python function.
    """

    def _recreate_cm(self) -> uninterrupted:
        return type(self)()  # a decorated function may call itself

    def __enter__(self) -> uninterrupted:
        self._noted: tuple[int, FrameType | None] | None = None
        self._previous = None
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):
                signal.signal(signal.SIGINT, self._note)
                self._previous = previous
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self.check()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._noted is not None:
            self._previous(signum, frame)
        self._noted = signum, frame

    def check(self) -> None:
        """Here all is in order: raise what has been noted."""
        noted, self._noted = self._noted, None
        if noted is not None:
            self._previous(*noted)
