"""What a command owes its shell: an exit status, and where that is not 0 one line on standard error that says why.

It imports nothing slow, and `work` imports what it needs: Ctrl-C in those first seconds finds `ended` in place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO


def ended(program: str, work: Callable[[], int]) -> int:
    """The exit status of `work`: its own, 1 where it refused or failed or nobody took its output, 130 interrupted.

    Raises:
        SystemExit: as `work`, of whose command line argparse has told already.
    """
    _prepare()
    status, why = 1, None
    with _noting_ctrl_c() as noted:
        try:
            status = work()
        except KeyboardInterrupt:
            status = 130
        except SystemExit as error:
            why = error
        except Exception as error:
            if noted:  # a library went on without what it was importing, until that was needed
                status = 130
            elif isinstance(error, ValueError | RuntimeError | OSError):
                why = error
            else:
                raise
    nameless = isinstance(why, OSError) and why.errno is not None and why.filename is None
    unwritten = _unwritten(sys.stdout, "\n" if nameless else "")  # was it this one? What it did not take may be gone
    if unwritten and (why is None or isinstance(why, SystemExit) or nameless):
        status, why = status or 1, None
        if not isinstance(unwritten, BrokenPipeError):  # who reads no further knows
            why = OSError(f"standard output cannot be written: {unwritten.strerror}")
    if isinstance(why, SystemExit):
        raise why
    if why is not None:
        with contextlib.suppress(OSError):
            print(f"{program}: {' '.join(str(why).split()) or type(why).__name__}", file=sys.stderr)
    _unwritten(sys.stderr)
    return status


@contextlib.contextmanager
def _noting_ctrl_c() -> Iterator[list[int]]:
    """What is yielded is not empty once Ctrl-C was pressed, whoever caught the KeyboardInterrupt."""
    noted = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _prepare() -> None:
    """Streams that take every letter, and are there. One that the shell has closed gives its number to the next file
    that is opened, which would get what is printed.
    """
    for name in ("stdin", "stdout", "stderr"):  # by number: the lowest is given first
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows its code
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _unwritten(stream: TextIO, more: str = "") -> OSError | None:
    """What keeps it from being written. Python would try again at the end, with a status and a message of its own."""
    try:
        stream.write(more)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
