"""Ctrl-C between two things, never in the middle of one; and whatever else a signal is to raise.

Python runs the handler of a signal, which raises KeyboardInterrupt, or TimeoutError for an alarm, wherever the main
thread happens to be: between two lines that only together keep the books of blocks, tree and tiers. No rollback helps
there, as it can be interrupted as well.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)


class uninterrupted(contextlib.ContextDecorator):
    """Until the end of the block, or of the function that it decorates, signals that a Python function handles are only
    noted; then it is called.

    So it is for work that ends soon, or calls `check` now and then; the second of one kind, as of Ctrl-C, does not
    wait. Inside another one it does nothing, and in other threads, which no signal reaches.
    """

    _is_on = False  # in the main thread

    def _recreate_cm(self) -> uninterrupted:
        return type(self)()  # a decorated function may call itself

    def __enter__(self) -> uninterrupted:
        self._noted: dict[int, FrameType | None] = {}
        self._handlers: dict[int, Callable] = {}
        if threading.current_thread() is threading.main_thread() and not uninterrupted._is_on:
            self._handlers = {number: found for number in _SIGNALS if callable(found := signal.getsignal(number))}
            try:
                for number in self._handlers:
                    signal.signal(number, self._note)
            except BaseException:  # raised by one that is not replaced yet
                self._restore(list(self._handlers))
                raise
            uninterrupted._is_on = bool(self._handlers)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handlers:
            uninterrupted._is_on = False
            self._restore(list(self._handlers))
            self.check()

    def lifted(self) -> _Lifted:
        """For a block within, as long as it takes: what was noted is raised, and signals come as they do outside. What
        stands around that block is entered and left without them.
        """
        return _Lifted(self)

    def _restore(self, numbers: list[int]) -> None:
        """All of them, whatever the first ones raise as soon as they are back."""
        try:
            while numbers:
                signal.signal(numbers[-1], self._handlers[numbers[-1]])
                numbers.pop()
        finally:
            if numbers:
                self._restore(numbers)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum in self._noted:
            self._handlers[signum](signum, frame)
        self._noted[signum] = frame

    def check(self) -> None:
        """Here all is in order: raise what has been noted."""
        while self._noted:
            signum, frame = self._noted.popitem()
            self._handlers[signum](signum, frame)


class _Lifted:
    def __init__(self, shield: uninterrupted):
        self._shield = shield

    def __enter__(self) -> None:
        if self._shield._handlers:
            uninterrupted._is_on = False
            self._shield._restore(list(self._shield._handlers))
            self._shield.check()

    def __exit__(self, *error: object) -> None:
        for number in self._shield._handlers:
            signal.signal(number, self._shield._note)
        if self._shield._handlers:
            uninterrupted._is_on = True
