"""Many kernels compiled at once, before anybody waits for one.

Triton compiles a kernel when it is first launched, and launches follow each other. Yet of the seconds that each takes
most are spent in LLVM and ptxas, where threads do not wait for each other. So who knows what is going to be launched
does it twice:

    first    launches run nothing: what they lack is compiled by a pool of threads
    then     for good: a launch waits for its kernel, while threads compile those of later ones

What a launch that runs nothing should have written is left as the allocator gave it: any numbers. Code around launches
that is run so must bear that, and must not keep any of it.

Triton's `AsyncCompileMode` hands what is to be compiled to a pool, and `JITFunction.run` runs nothing where it is told
`warmup`. Neither is documented: `can_compile_ahead` looks first.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

#: Compiling threads at most: they take turns at Python with the thread that launches, and more of them win nothing.
MAX_THREADS = 15

#: Held while `JITFunction.run` is replaced.
_REPLACING = threading.Lock()


def can_compile_ahead() -> bool:
    """Whether this Triton compiles in threads, and does not already."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode, active_mode  # noqa: F401
        from triton.runtime.jit import JITFunction
    except ImportError:
        return False
    return "warmup" in inspect.signature(JITFunction.run).parameters and active_mode.get() is None


@contextmanager
def compiled_ahead() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Gives `launch(work)`, which calls `work()`, whose launches run nothing, and has threads compile the kernels that
    they are of. A later launch within the block waits until its kernel is there. Leaving the block waits for nothing.

    What other threads launch meanwhile runs. A kernel that cannot be compiled says why at its first launch for good.
    """
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    def launch(work: Callable[[], object]) -> None:
        with _running_nothing():
            work()

    pool = ThreadPoolExecutor(min(max(1, len(os.sched_getaffinity(0)) - 1), MAX_THREADS))
    token = active_mode.set(AsyncCompileMode(pool))
    try:
        yield launch
    finally:
        active_mode.reset(token)
        pool.shutdown(wait=False)


@contextmanager
def _running_nothing() -> Iterator[None]:
    """Launches of this thread do what they have to do ahead, and no more."""
    from triton.runtime.jit import JITFunction

    thread = threading.get_ident()

    def run(self: JITFunction, *arguments, warmup: bool, **options):
        return original(self, *arguments, warmup=warmup or threading.get_ident() == thread, **options)

    with _REPLACING:
        original, JITFunction.run = JITFunction.run, run
        try:
            yield
        finally:
            JITFunction.run = original
