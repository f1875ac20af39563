"""Shared prefixes: a folder of blocks, for all processes of one user on one host.

    folder/    .lock    .writing    4f1c..e2    9a07..31    ...        a file a block, named by the hash of all that its
                                       |                               K and V depend on: a saved prefix cache
                                       +-- identity, salt, tokens,     (`saved.py`) of one block, which also says the
                                           K and V, checksums          tokens before it

Readers take no lock. A file has its name when it is complete, and one that is removed while somebody reads it is there
until he is done. Writers take turns: who holds the lock owns `.writing`, and gives it its name when it is complete. The
lock is the kernel's (flock), which releases it when a process dies; what a killed one has left in `.writing` is written
over by the next.

The longest unused blocks go when the folder is full. Names are not relied on: a file must say the identity, the salt
and all the tokens that it is opened for, and have the checksums of its bytes; one that has not is removed. Files and
folder are this user's alone.

Costs: a thread checks about 1 GB/s, reading and writing; a block that is published is copied to the host, at most
`_UNDER_WAY` bytes of them until they are written. Any local file system will do, /dev/shm best. On NFS it holds where
locks do, between processes of one host; hosts see each other's files late, which costs hits and nothing else.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from . import saved

_UNDER_WAY = 256 << 20  # bytes read at a time, and bytes that wait to be written
_THREADS = min(8, os.cpu_count() or 1)
_SPARE = 0.1  # of the folder is made free at a time, so that it is looked through seldom


class Name(NamedTuple):
    """What a block is asked for by."""

    digest: bytes  # 256 bits, of all below: where its file is, and nothing that is relied on
    root: bytes  # the digest of its salt
    path: bytes  # the tokens of its row, little-endian int32, of which its own are these bytes:
    begin: int
    end: int

    @property
    def tokens(self) -> bytes:
        return self.path[self.begin : self.end]

    def identity(self, of_all: dict[str, object]) -> dict[str, object]:
        """What the block depends on: what all do, and the tokens before it."""
        return of_all | {"before": self.path[: self.begin].hex()}


class Folder:
    """See the module.

    Args:
        num_bytes: that all files may take together, whoever wrote them.
        token_bytes, block_bytes: of one block.

    Raises:
        ValueError: the folder cannot be made, is open to other users, has no locks, or has no room for one block.
    """

    def __init__(self, path: str | Path, num_bytes: int, token_bytes: int, block_bytes: int):
        self.num_read = self.num_written = self.num_damaged = 0
        self._path, self._num_bytes = Path(path), num_bytes
        self._token_bytes, self._block_bytes = token_bytes, block_bytes
        if num_bytes < block_bytes:
            raise ValueError(f"shared_bytes must hold at least one block of {block_bytes} bytes, got {num_bytes}")
        self._at_once = max(1, _UNDER_WAY // block_bytes)
        _open(self._path)
        self._under_way: set[bytes] = set()
        self._guard, self._is_broken = threading.Lock(), False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-shared")
        weakref.finalize(self, self._writer.shutdown, wait=False)

    # --- reading

    def read(self, identity: dict[str, object], wanted: Iterable[Name]) -> Iterator[list[bytes]]:
        """K and V of the first blocks of `wanted` that are there and sound, some at a time."""
        there = list(takewhile(lambda name: os.path.exists(self._file(name)), wanted))
        for begin in range(0, len(there), self._at_once):
            some = there[begin : begin + self._at_once]
            with ThreadPoolExecutor(min(_THREADS, len(some))) as threads:  # hashing waits for no interpreter's lock
                found = list(threads.map(lambda name: self._read(identity, name), some))
            sound = list(takewhile(lambda data: data is not None, found))
            self.num_read += len(sound)
            self._touch(some[: len(sound)])
            if sound:
                yield sound
            if len(sound) < len(some):
                return

    def _read(self, identity: dict[str, object], name: Name) -> bytes | None:
        """K and V of a block; None where it is gone, or not what it should be."""
        path, record = self._file(name), None
        try:
            with saved.Reader(path, name.identity(identity), self._token_bytes, self._block_bytes) as file:
                if file.roots == [name.root] and file.num_present == 1:
                    ((record,),) = file.batches()
        except OSError:
            return None
        except ValueError:  # another file, or a damaged header
            pass
        if record is not None and (record.parent, record.tokens) == (-1, name.tokens):
            return record.data
        with self._guard:
            self.num_damaged += 1
        warnings.warn(f"{path} is damaged; its block is computed again", RuntimeWarning, stacklevel=2)
        with suppress(OSError):
            path.unlink()
        return None

    def _touch(self, names: Sequence[Name]) -> list[int]:
        """They are used: the first of a path last, so that the folder loses it last. Returns which are not there."""
        gone = []
        for index in reversed(range(len(names))):
            try:
                os.utime(self._file(names[index]))
            except OSError:
                gone.append(index)
        return gone[::-1]

    # --- writing

    def lacking(self, wanted: Sequence[Name]) -> list[int]:
        """Which of the blocks of a path, by their index, are to be given to `write`: those that are not there, the
        first first, as many as may be on their way. Those that are there become the most recently used.
        """
        if self._is_broken:
            return []
        with self._guard:
            room = max(0, self._at_once - len(self._under_way))
            return [index for index in self._touch(wanted) if wanted[index].digest not in self._under_way][:room]

    def write(self, identity: dict[str, object], blocks: Sequence[tuple[Name, bytes]]) -> None:
        """Write blocks, in a thread beside the model's work. After the first failure, which is told, no more is."""
        digests = {name.digest for name, _ in blocks}
        with self._guard:
            self._under_way |= digests
        try:
            self._writer.submit(self._write, identity, blocks, digests)
        except BaseException:  # no thread can be started
            with self._guard:
                self._under_way -= digests
            raise

    def settle(self) -> None:
        """Wait until all is written that was given."""
        self._writer.submit(int).result()

    def _write(self, identity: dict[str, object], blocks: Sequence[tuple[Name, bytes]], digests: set[bytes]) -> None:
        """In the writer's thread."""
        try:
            if not self._is_broken:
                with self._locked() as lock:
                    for name, data in blocks:
                        record = saved.Record(-1, name.tokens, data)
                        pieces = saved.pieces(name.identity(identity), [name.root], 1, [record])
                        self._add(lock, self._file(name), b"".join(pieces))
        except OSError as error:
            self._is_broken = True
            warnings.warn(
                f"{self._path} takes no more blocks of this process ({error.strerror}); those there are read as before",
                RuntimeWarning,
                stacklevel=2,
            )
        finally:
            with self._guard:
                self._under_way -= digests

    def _add(self, lock: int, path: Path, content: bytes) -> None:
        """Write one file under its name, and make room for it before. The lock is held."""
        if path.exists() or len(content) > self._num_bytes:
            return
        # The lock's file has the bytes of all files: at least as many as there are, should this be the last it does.
        total = _number_in(lock)
        if total is None or total + len(content) > self._num_bytes:
            total = self._make_room(len(content))
        os.pwrite(lock, b"%020d" % (total + len(content)), 0)
        beside = self._path / ".writing"
        with suppress(FileNotFoundError):
            beside.unlink()
        try:
            with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(content)
            os.replace(beside, path)
        except OSError:
            with suppress(OSError):
                beside.unlink()
            raise
        self.num_written += 1

    def _make_room(self, size: int) -> int:
        """Remove the longest unused files until there is room for `size` bytes, and for some more where any has to go.
        Returns how many bytes are left.
        """
        files, total = [], 0
        with os.scandir(self._path) as found:
            for entry in found:
                if entry.name[0] != "." and stat.S_ISREG((status := entry.stat(follow_symlinks=False)).st_mode):
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
        if total + size <= self._num_bytes:
            return total
        for _, one, path in sorted(files):
            if total <= (self._num_bytes - size) * (1 - _SPARE):
                break
            with suppress(FileNotFoundError):  # it was damaged, and somebody has noticed
                os.unlink(path)
            total -= one
        return total

    @contextmanager
    def _locked(self) -> Iterator[int]:
        lock = os.open(self._path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _file(self, name: Name) -> Path:
        return self._path / name.digest.hex()

    def stats(self) -> dict[str, object]:
        return {
            "shared_blocks_read": self.num_read,
            "shared_blocks_written": self.num_written,
            "shared_blocks_damaged": self.num_damaged,
        }


def _open(path: Path) -> None:
    """Make the folder where there is none, this user's own.

    Raises:
        ValueError: it cannot be used.
    """
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700, parents=True)
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise ValueError(f"shared_path {str(path)!r} is no folder")
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ValueError(
                f"shared_path {str(path)!r} must be this user's own and closed to others, who could put blocks there: "
                f"it is of user {found.st_uid}, mode {found.st_mode & 0o777:o}. chmod 700 it, or name another"
            )
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # somebody is writing
        except OSError as error:
            raise ValueError(
                f"shared_path {str(path)!r} is on a file system without locks: {error.strerror}"
            ) from error
        finally:
            os.close(lock)
    except OSError as error:
        raise ValueError(f"shared_path {str(path)!r} cannot be used: {error.strerror}") from error


def _number_in(lock: int) -> int | None:
    digits = os.pread(lock, 20, 0)
    return int(digits) if len(digits) == 20 and digits.isdigit() else None
