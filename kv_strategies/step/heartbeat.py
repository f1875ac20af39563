"""Heartbeats: which rank has failed, ended or was killed, known to all others within seconds.

Processes that compute together wait for each other without end when one of them dies (NCCL), or get an error that does
not say which (gloo). So every rank counts up a number in the process group's key-value store, from a thread of its own,
and looks at the numbers of the others: one that stands still belongs to a rank that is gone. A rank that meets an error
writes it down, too. Whoever reads of one gives up what it waits for.

A thread of Python needs its turn: a process that lets none have one for `PATIENCE` seconds counts as gone.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

#: Seconds without a sign of life after which a rank is gone.
PATIENCE = 10.0
_INTERVAL = 0.5  # between two beats
_ENDING = 20  # seconds that an interpreter has to end, however busy its machine is
_LEFT = b"left"  # in place of the number, by a rank that ends as it should

_holder = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
STORE_LOST = f"{_holder} is gone, which held the key-value store of the ranks"

_log = logging.getLogger(__name__)


class RankError(RuntimeError):
    """Ranks that hold a model together cannot go on. The message says which, and why."""


class Heartbeat:
    """The sign of life of one rank, and those of the others.

    Args:
        store: for this alone, as a client serves one thread at a time.
        position: how much of what rank 0 said has been read here; what all have read is deleted.
        give_up: called from the thread when another rank is gone: ends what this one waits for. It must not wait.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, position: Callable[[], int], give_up: Callable[[], None]
    ):
        self._store, self._rank, self._size = store, rank, size
        self._position, self._give_up = position, give_up
        self.left: set[int] = set()  # ranks that have ended
        self._failure: str | None = None
        self._num_deleted = self._num_working = 0
        self._told = threading.Event()  # of a failure
        self._ended = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="kv-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def check(self) -> None:
        """Raises RankError where a rank is known to be gone."""
        if self._failure is not None:
            raise RankError(self._failure)

    def await_cause(self) -> str | None:
        """Why working together has just failed: as soon as a rank is found gone, or None when it is none of them."""
        self._told.wait(PATIENCE + 4 * _INTERVAL)
        return self._failure

    def fail(self, message: str) -> None:
        """Tell all ranks. What is told first is what stays."""
        with suppress(RuntimeError):  # the store may be gone with the rank that held it
            self._store.compare_set("failed", "", message)
        self._failure = self._failure or message
        self._told.set()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within, this rank may wait for others."""
        self.check()
        self._num_working += 1
        try:
            yield
        finally:
            self._num_working -= 1

    # --- in the thread

    def _run(self) -> None:
        seen = {rank: (b"", time.monotonic()) for rank in range(self._size) if rank != self._rank}
        beat = 0
        while self._failure is None and not self._ended.wait(_INTERVAL):
            beat += 1
            try:
                self._beat(beat)
                found = self._look(seen)
            except RuntimeError as error:
                found = f"{STORE_LOST} ({error})"
            if found is not None and not self._ended.is_set():
                self._mourn(found)

    def _beat(self, beat: object) -> None:
        self._store.set(f"alive/{self._rank}", f"{beat} {self._position()}")

    def _look(self, seen: dict[int, tuple[bytes, float]]) -> str | None:
        """What has happened to another rank, if anything."""
        if self._store.check(["failed"]):
            return self._store.get("failed").decode()
        now, positions = time.monotonic(), [self._position()]
        for rank, (before, since) in seen.items():
            key = f"alive/{rank}"
            value = self._store.get(key) if self._store.check([key]) else b"0 0"
            beat, position = value.split()
            positions.append(int(position))
            if beat == _LEFT:
                self.left.add(rank)
                if self._num_working and self._position() > positions[-1]:
                    return f"rank {rank} of {self._size} has ended, and rank {self._rank} has not"
            elif value != before:
                seen[rank] = value, now
            elif now - since > PATIENCE:
                return f"rank {rank} of {self._size} is gone: no sign of life for {now - since:.0f} s"
        if self._rank == 0:
            while self._num_deleted < min(positions):
                self._store.delete_key(f"said/{self._num_deleted}")
                self._num_deleted += 1
        return None

    def _mourn(self, found: str) -> None:
        self._failure = found
        self._told.set()
        _log.error("%s", found)
        self._give_up()
        deadline = time.monotonic() + PATIENCE
        while self._num_working and time.monotonic() < deadline:
            time.sleep(_INTERVAL)
        if self._num_working:  # it waits for what nobody will bring, and cannot be told
            _log.critical("this rank could not be woken: it ends")
            os._exit(1)

    def _leave(self) -> None:
        self._ended.set()
        if self._failure is not None:  # gloo ends with the process, and waits for a peer that stands still, alive
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_ENDING)
        self._thread.join(PATIENCE)
        with suppress(RuntimeError):
            self._beat(_LEFT.decode())
