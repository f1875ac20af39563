"""A disk below host memory: idle blocks in one nameless file, each with a checksum.

What fails is forgotten and computed again: a block that is truncated or altered, and all that a full or broken disk
could not take, after one warning.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor


class Disk:
    """Blocks in one file, in places of equal size. It has no name, is open to no other user, and dies with its
    owner; so checksums are in memory.

    Written by a thread beside the model's work, in the order asked for. What fails is forgotten, and after the first
    failure to write nothing more is written.

    Raises:
        ValueError: the folder cannot be written, or the budget is smaller than a block.
    """

    def __init__(self, folder: str | Path, num_bytes: int, block_bytes: int):
        if num_bytes < block_bytes:
            raise ValueError(
                f"disk_bytes must hold at least one block: {block_bytes} bytes are needed, got {num_bytes}"
            )
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (lives as long as this)
        except OSError as error:
            raise ValueError(f"disk_path {str(folder)!r} cannot be written: {error.strerror}") from error
        self.num_damaged, self.num_places = 0, num_bytes // block_bytes
        self._file = _File(file, folder, block_bytes)
        self._free = list(range(self.num_places))
        self._kept: OrderedDict[bytes, _OnDisk] = OrderedDict()
        self._held: bytes | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-disk")
        # What is being written keeps the file open, not this; so this may end in the writer's own thread, and waits
        # for nobody.
        weakref.finalize(self, self._writer.shutdown, wait=False, cancel_futures=True)

    @property
    def takes_blocks(self) -> bool:
        """Whether `write` may be called: the disk works, and there is a place or something to drop for one."""
        return not self._file.is_broken and len(self._free) + len(self._kept) > (self._held in self._kept)

    @contextmanager
    def holding(self, key: bytes) -> Iterator[None]:
        """Meanwhile `write` drops others than this block."""
        self._held = key
        try:
            yield
        finally:
            self._held = None

    def write(self, key: bytes, tokens: bytes, data: Tensor) -> Future:
        """Start to write a block [bytes]; the future gives the seconds it took. The data must stay until then."""
        self.discard(key)
        if not self._free:
            self._drop(next(kept for kept in self._kept if kept != self._held))
        entry = _OnDisk(tokens, self._free[-1])
        try:
            written = self._writer.submit(_write, self._file, entry, data)
        except Exception:  # no thread can be started
            self._file.is_broken = True
            raise
        self._free.pop()
        self._kept[key] = entry
        return written

    def read(self, key: bytes, target: Tensor) -> float | None:
        """Take a block [bytes] off the disk. Returns the seconds it took, or None where it is damaged or was lost."""
        entry = self._kept[key]
        begin, view, count = time.perf_counter(), memoryview(target.numpy()), 0
        with suppress(OSError):
            while count < len(view):
                got = os.preadv(self._file.handle, [view[count:]], entry.place * len(view) + count)
                if not got:
                    break
                count += got
        is_sound = count == len(view) and _checksum(view) == entry.checksum
        if not is_sound and entry.checksum:
            self.num_damaged += 1
            warnings.warn(
                f"a block in {self._file.folder} is truncated or altered; it is computed again",
                RuntimeWarning,
                stacklevel=3,
            )
        self._drop(key)
        return time.perf_counter() - begin if is_sound else None

    def find(self, key: bytes) -> bytes | None:
        """The tokens of a block that is there, which becomes the most recently used."""
        entry = self._kept.get(key)
        if entry is None or not entry.checksum:
            return None
        self.touch(key)
        return entry.tokens

    def touch(self, key: bytes) -> None:
        """What is there, or being written, becomes the most recently used."""
        if key in self._kept:
            self._kept.move_to_end(key)

    def discard(self, key: bytes) -> None:
        if key in self._kept:
            self._drop(key)

    def clear(self) -> None:
        for key in list(self._kept):
            self._drop(key)

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    @property
    def num_blocks(self) -> int:
        return sum(bool(entry.checksum) for entry in self._kept.values())

    def check_integrity(self) -> None:
        """Raises AssertionError where a place is lost, or taken twice (a bug of ours)."""
        places = [*self._free, *(entry.place for entry in self._kept.values())]
        assert sorted(places) == list(range(self.num_places)), "a place on disk is lost, or taken twice"
        assert self._held is None, "a block on disk is held for nobody"

    def _drop(self, key: bytes) -> None:
        """Forget a block; a write to its place that is under way ends before the next one there begins."""
        self._free.append(self._kept.pop(key).place)


@dataclass
class _OnDisk:
    tokens: bytes
    place: int
    checksum: bytes = b""  # empty until written, and where writing failed


class _File:
    """Open as long as anybody reads or writes it."""

    def __init__(self, file: BinaryIO, folder: str | Path, block_bytes: int):
        self.handle, self.folder, self.block_bytes, self.is_broken = file.fileno(), folder, block_bytes, False
        weakref.finalize(self, file.close)


def _write(file: _File, entry: _OnDisk, data: Tensor) -> float:
    """In the writer's thread."""
    if file.is_broken:
        return 0.0
    begin, view, offset = time.perf_counter(), memoryview(data.numpy()), entry.place * file.block_bytes
    checksum = _checksum(view)
    try:
        while view:
            written = os.pwrite(file.handle, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        file.is_broken = True
        warnings.warn(
            f"the disk tier in {file.folder} takes no more blocks ({error.strerror}); those it "
            "cannot take are computed again when they are needed",
            RuntimeWarning,
            stacklevel=2,
        )
        return 0.0
    entry.checksum = checksum
    return time.perf_counter() - begin


def _checksum(data) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
