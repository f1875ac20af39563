"""What a command owes its shell: an exit status, and where that is not 0 one line on standard error that says why.

It imports nothing slow, and `work` imports what it needs: Ctrl-C in those first seconds finds `ended` in place.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TextIO


def ended(program: str, work: Callable[[], int]) -> int:
    """The exit status of `work`: its own, 1 where it refused or failed or nobody took its output, 130 interrupted.

    Raises:
        SystemExit: as `work`, of whose command line argparse has told already.
    """
    _prepare()
    status, why = 1, None
    try:
        status = work()
    except (ValueError, RuntimeError, OSError, SystemExit) as error:
        why = error
    except KeyboardInterrupt:
        status = 130
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
