"""A prefix cache in a file, so that it outlives the process.

    magic | header: what the blocks depend on (JSON) | checksum | block | block | ...
    block = number of the block before it | its tokens | K and V of all layers | checksum

A checksum is of the block and of the checksum of the block that it continues, up to the header's: of all that its K
and V depend on. A block that has come to another place, or from another file, continues something else, and is refused.

Blocks stand after the one they continue, and the most recently used come first, so a pool smaller than the file takes
what is most useful. Every block is checked by itself: what is truncated or altered is refused, with all that continues
it, and the rest is used. The file appears under its name only when it is complete.

Salts are there as digests only. Hashes of blocks are not: they are computed anew from the tokens.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .identity import differences

_MAGIC = b"kv_strategies prefix cache 3\n"
_CHECKSUM_BYTES = 16
_BEING_WRITTEN = ".kv-saving"  # ends the name of an incomplete file
_HEADER_BYTES = 4 << 20  # at most, beside a root for each block
_ROOT_BYTES = 70
_BATCH_BYTES = 256 << 20  # read, checked and copied at a time


class Record(NamedTuple):
    """One block: what it continues, what it holds."""

    parent: int  # number of the block in the file; -1 - r for the r-th root
    tokens: bytes  # little-endian int32
    data: bytes  # K and V of all layers


@dataclass(frozen=True)
class Loaded:
    """What became of the blocks in a file."""

    num_blocks: int = 0  # taken into the cache
    num_known: int = 0  # were there already
    num_damaged: int = 0  # truncated or altered
    num_unreachable: int = 0  # sound, but a block they continue is damaged
    num_left_out: int = 0  # found no free block in the pool

    def __str__(self) -> str:
        counts = {
            "loaded": self.num_blocks,
            "known already": self.num_known,
            "damaged": self.num_damaged,
            "useless without a damaged one": self.num_unreachable,
            "left out for lack of room": self.num_left_out,
        }
        return "blocks of the saved cache: " + ", ".join(f"{n} {what}" for what, n in counts.items() if n)


def write(
    path: Path, identity: dict[str, object], roots: list[bytes], num_blocks: int, records: Iterable[Record]
) -> None:
    """Write `num_blocks` records, none before the one that it continues.

    What has that name is replaced, or what it links to, and keeps its mode; a new file is open to this user alone.

    Raises:
        OSError: the folder cannot be written, the disk is full, or what has that name is no file; it is as it was.
    """
    with _replacing(path) as file:
        file.writelines(pieces(identity, roots, num_blocks, records))


def pieces(
    identity: dict[str, object], roots: list[bytes], num_blocks: int, records: Iterable[Record]
) -> Iterator[bytes]:
    """The bytes of a file, one piece after the other."""
    header = {"identity": identity, "roots": [digest.hex() for digest in roots], "num_blocks": num_blocks}
    encoded = json.dumps(header).encode()
    start = _MAGIC + struct.pack("<q", len(encoded)) + encoded
    yield start + _checksum(start)
    yield from _sealed(_anchors(_checksum(start), roots), records)


def _anchors(checksum: bytes, roots: list[bytes]) -> list[bytes]:
    """What stands for each root, in a file whose header has this checksum."""
    return [checksum + digest for digest in roots]


def _sealed(anchors: list[bytes], records: Iterable[Record]) -> Iterator[bytes]:
    """The bytes of each block, its checksum behind them."""
    checksums: list[bytes] = []
    for record in records:
        packed = struct.pack("<q", record.parent) + record.tokens + record.data
        checksums.append(_checksum(_before(record.parent, anchors, checksums), packed))
        yield packed + checksums[-1]


def _before(parent: int, anchors: list[bytes], checksums: list[bytes]) -> bytes:
    """What stands for all that a block continues; b"" where there is no such thing."""
    known, index = (anchors, -1 - parent) if parent < 0 else (checksums, parent)
    return known[index] if index < len(known) else b""


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file under a name of its own that replaces `path`, or what that links to, when it is complete. It keeps the
    mode of what it replaces, and is the user's own where there was nothing.

    A lock marks it as being written: what a killed process has left is not locked, and goes before the next is written.
    """
    path = Path(os.path.realpath(path))
    before = _status(path)
    if before is not None and not stat.S_ISREG(before.st_mode):
        raise OSError(errno.EINVAL, "only a regular file can be replaced", str(path))
    _remove_abandoned(path.parent)
    file, name = _locked(path)
    try:
        with file:
            yield file
            if before is not None:
                _take_after(file.fileno(), before)
            file.flush()
            os.fsync(file.fileno())
            os.replace(name, path)  # still locked
    except BaseException:
        with suppress(FileNotFoundError):  # where it was complete
            os.unlink(name)
        raise
    with suppress(OSError):  # not every file system knows this
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _locked(path: Path) -> tuple[BinaryIO, str]:
    """A new file beside `path` and its name, open to this user alone whatever the umask."""
    while True:
        handle, name = tempfile.mkstemp(_BEING_WRITTEN, f".{path.name}.", path.parent)
        file = open(handle, "wb")  # noqa: SIM115  (closed by who called)
        try:
            os.fchmod(handle, 0o600)
            with suppress(OSError):  # a file system without locks: nobody takes it for abandoned
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.exists(name):
                return file, name
            file.close()  # somebody took it for abandoned before it was locked
        except BaseException:
            file.close()
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise


def _remove_abandoned(folder: Path) -> None:
    """Remove what this user's killed processes have left of files they were writing."""
    for name in os.listdir(folder):
        if not (name.startswith(".") and name.endswith(_BEING_WRITTEN)):
            continue
        with suppress(OSError):  # it is gone, somebody else's, or being written
            handle = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(handle)
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(folder / name)
            finally:
                os.close(handle)


def _take_after(handle: int, before: os.stat_result) -> None:
    """Owner, group and mode of the file that is replaced; where the group cannot be, the new group may do nothing."""
    mode, now = stat.S_IMODE(before.st_mode) & 0o777, os.fstat(handle)
    try:
        if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
            os.fchown(handle, before.st_uid if os.geteuid() == 0 else -1, before.st_gid)
    except PermissionError:
        mode &= 0o707
    os.fchmod(handle, mode)


class Reader:
    """A saved prefix cache, opened: its roots, and its blocks in batches.

    Args:
        identity: what the blocks must depend on.
        token_bytes, block_bytes: of one block.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a saved prefix cache, its header is damaged, or it was saved with another model, dtype or
            policy.
    """

    def __init__(self, path: Path, identity: dict[str, object], token_bytes: int, block_bytes: int):
        self._token_bytes = token_bytes
        self._size = 8 + token_bytes + block_bytes
        self._file = _opened(path)
        try:
            header, checksum = _read_header(self._file, path, self._size + _CHECKSUM_BYTES)
            if header["identity"] != identity:
                told = _told(header["identity"], identity)
                raise ValueError(f"{path} was saved with another model or policy: {told}")
        except BaseException:
            self._file.close()
            raise
        self.roots = [bytes.fromhex(digest) for digest in header["roots"]]
        self._anchors = _anchors(checksum, self.roots)
        self._checksums: list[bytes] = []  # of the blocks so far, as they say
        left = os.fstat(self._file.fileno()).st_size - self._file.tell()
        #: Blocks that are there, the last perhaps in part, and those that the header promises beyond them.
        self.num_present = min(header["num_blocks"], -(-left // (self._size + _CHECKSUM_BYTES)))
        self.num_missing = header["num_blocks"] - self.num_present

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def batches(self) -> Iterator[list[Record | None]]:
        """The blocks in their order, some at a time; None where one is truncated or altered."""
        step = max(1, _BATCH_BYTES // self._size)
        for begin in range(0, self.num_present, step):
            yield self._read(min(step, self.num_present - begin))

    def _read(self, count: int) -> list[Record | None]:
        stride = self._size + _CHECKSUM_BYTES
        data, before = memoryview(self._file.read(count * stride)), len(self._checksums)
        self._checksums += [bytes(data[at + self._size : at + stride]) for at in range(0, count * stride, stride)]

        def check(index: int) -> Record | None:
            record = data[index * stride : (index + 1) * stride]
            if len(record) < stride:
                return None
            (parent,) = struct.unpack_from("<q", record)
            known = self._checksums if parent < before + index else []  # none continues itself, or one behind it
            if record[self._size :] != _checksum(_before(parent, self._anchors, known), record[: self._size]):
                return None
            end = 8 + self._token_bytes
            return Record(parent, bytes(record[8:end]), bytes(record[end : self._size]))

        if count == 1:
            return [check(0)]
        with ThreadPoolExecutor() as threads:  # hashlib works outside the interpreter's lock
            return list(threads.map(check, range(count)))


def _opened(path: Path) -> BinaryIO:
    """Raises ValueError where it is no file; a pipe would be waited for."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} is not a saved prefix cache: it is no regular file")
    return file


def _read_header(file: BinaryIO, path: Path, record_bytes: int) -> tuple[dict, bytes]:
    """The header and its checksum, which says that nobody altered it by accident, and nothing about who wrote it."""
    start = file.read(len(_MAGIC) + 8)
    if not start.startswith(_MAGIC):
        raise ValueError(f"{path} is not a saved prefix cache of this version")
    (size,) = struct.unpack("<q", start[len(_MAGIC) :]) if len(start) == len(_MAGIC) + 8 else (-1,)
    left = os.fstat(file.fileno()).st_size - file.tell()
    is_likely = 0 < size <= left and size <= _HEADER_BYTES + _ROOT_BYTES * ((left - size) // record_bytes)
    encoded = file.read(size) if is_likely else b""
    checksum = _checksum(start + encoded)
    damaged = ValueError(f"{path}: the header is damaged, so nothing in it can be used")
    if not encoded or file.read(_CHECKSUM_BYTES) != checksum:
        raise damaged
    try:
        header = json.loads(encoded)
        is_sound = (
            isinstance(header, dict)
            and isinstance(header["identity"], dict)
            and type(header["num_blocks"]) is int
            and 0 <= header["num_blocks"] < 1 << 48
            and isinstance(header["roots"], list)
            and all(len(bytes.fromhex(digest)) == 32 for digest in header["roots"])
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        is_sound = False
    if not is_sound:
        raise damaged
    return header, checksum


def _told(theirs: dict[str, object], ours: dict[str, object]) -> str:
    """What differs, in words; theirs may be anything."""
    try:
        text = differences(theirs, ours)
    except RecursionError:
        text = "what the file says of itself is no such thing"
    return text if len(text) <= 2000 else f"{text[:2000]} ..."


def _checksum(*parts) -> bytes:
    digest = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()
