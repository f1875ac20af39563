"""A prefix cache in a file, so that it outlives the process.

    magic | header: what the blocks depend on (JSON) | checksum | block | block | ...
    block = place of the block before it | its tokens | K and V of all layers | checksum

Blocks stand after the one they continue, and the most recently used come first, so a pool smaller than the file takes
what is most useful. Every block is checked by itself: what is truncated or altered is refused, with all that continues
it, and the rest is used. The file appears under its name only when it is complete.

Salts are there as digests only. Hashes of blocks are not: they are computed anew from the tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from .identity import differences

if TYPE_CHECKING:
    from ..base import Placement
    from ..prefix import Node, PrefixCache

_MAGIC = b"kv_strategies prefix cache 1\n"
_CHECKSUM_BYTES = 16
_BATCH_BYTES = 256 << 20  # read, checked and copied at a time


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


def save(prefix: PrefixCache, placement: Placement, path: Path) -> int:
    """Write all published blocks. Returns how many.

    Raises:
        OSError: the folder cannot be written, or the disk is full; a file of that name is as it was.
    """
    nodes = list(prefix.ordered())
    roots: dict[bytes, int] = {}
    places: dict[Node, int] = {node: place for place, node in enumerate(nodes)}
    for node in nodes:
        if node.parent not in places:
            roots.setdefault(node.parent.digest, -1 - len(roots))
    block_bytes = placement.read_blocks([0]).shape[1]
    header = {
        "identity": prefix.identity,
        "roots": [digest.hex() for digest in roots],
        "num_blocks": len(nodes),
        "block_bytes": block_bytes,
    }
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            encoded = json.dumps(header).encode()
            start = _MAGIC + struct.pack("<q", len(encoded)) + encoded
            file.write(start + _checksum(start))
            for batch in _batches(nodes, block_bytes):
                for node, data in zip(batch, placement.read_blocks([node.block for node in batch]), strict=True):
                    parent = places.get(node.parent)
                    place = struct.pack("<q", roots[node.parent.digest] if parent is None else parent)
                    record = place + node.tokens + data.numpy().tobytes()
                    file.write(record + _checksum(record))
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return len(nodes)


def load(prefix: PrefixCache, placement: Placement, path: Path) -> Loaded:
    """Take the blocks of a file into the free blocks of the pool; none is evicted for them.

    Warns where a part of the file could not be used.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a saved prefix cache, its header is damaged, or it was saved with another model, dtype or
            policy.
    """
    pool, tokens_end = prefix.pool, 8 + 4 * prefix.pool.block_size
    fates: Counter[str] = Counter()
    held: list[int] = []
    with open(path, "rb") as file:
        header = _read_header(file, path)
        if header["identity"] != prefix.identity:
            raise ValueError(
                f"{path} was saved with another model or policy: {differences(header['identity'], prefix.identity)}"
            )
        roots = [prefix.root(bytes.fromhex(digest)) for digest in header["roots"]]
        nodes: list[Node | str] = []  # a block that is in the cache, or the fate of one that is not

        def admit(record: bytes | None) -> Node | str:
            """Make room for a block, which is then the last of `held`."""
            if record is None:
                return "num_damaged"
            (place,) = struct.unpack_from("<q", record)
            parent = roots[-1 - place] if place < 0 else nodes[place]
            if isinstance(parent, str):
                return "num_left_out" if parent == "num_left_out" else "num_unreachable"
            if known := parent.children.get(record[8:tokens_end]):
                fates["num_known"] += 1
                return known
            if not pool.num_free:
                return "num_left_out"
            held.append(pool.allocate(after=parent.block))
            return prefix.insert(parent, record[8:tokens_end], held[-1]) or "num_unreachable"

        try:
            for batch in _batches(range(header["num_blocks"]), header["block_bytes"]):
                new: list[Node] = []
                contents: list[bytes] = []
                for record in _read_records(file, tokens_end + header["block_bytes"], len(batch)):
                    num_held = len(held)
                    nodes.append(admit(record))
                    if isinstance(nodes[-1], str):
                        fates[nodes[-1]] += 1
                    elif len(held) > num_held:
                        new.append(nodes[-1])
                        contents.append(record[tokens_end:])
                try:
                    if new:
                        data = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
                        placement.write_blocks([node.block for node in new], data.view(len(new), -1))
                except BaseException:
                    for node in reversed(new):
                        prefix.drop(node)
                    raise
                fates["num_blocks"] += len(new)
        finally:
            for block in reversed(held):  # so that the first, most recently used, are idle for the shortest time
                pool.release(block)
    loaded = Loaded(**fates)
    if loaded.num_damaged or loaded.num_unreachable or loaded.num_left_out:
        warnings.warn(f"{path}: {loaded}", stacklevel=4)
    return loaded


def _read_header(file: BinaryIO, path: Path) -> dict:
    start = file.read(len(_MAGIC) + 8)
    if not start.startswith(_MAGIC):
        raise ValueError(f"{path} is not a saved prefix cache")
    size = int.from_bytes(start[len(_MAGIC) :], "little")
    left = os.fstat(file.fileno()).st_size - file.tell()
    encoded = file.read(size) if 0 <= size <= left else b""
    if not encoded or file.read(_CHECKSUM_BYTES) != _checksum(start + encoded):
        raise ValueError(f"{path}: the header is damaged, so nothing in it can be used")
    return json.loads(encoded)


def _read_records(file: BinaryIO, size: int, count: int) -> list[bytes | None]:
    """The next records without their checksums; None where one is truncated or altered."""
    data = memoryview(file.read(count * (size + _CHECKSUM_BYTES)))

    def check(index: int) -> bytes | None:
        record = data[index * (size + _CHECKSUM_BYTES) : (index + 1) * (size + _CHECKSUM_BYTES)]
        return bytes(record[:size]) if record[size:] == _checksum(record[:size]) else None

    with ThreadPoolExecutor() as threads:  # hashlib works outside the interpreter's lock
        return list(threads.map(check, range(count)))


def _batches(items, block_bytes: int) -> Iterator:
    step = max(1, _BATCH_BYTES // block_bytes)
    return (items[begin : begin + step] for begin in range(0, len(items), step))


def _checksum(data) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest()
