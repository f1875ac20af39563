"""Files: whatever a file says, whoever is killed or interrupted, no block is served that was not written."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from common import tiny_llama

from kv_strategies import build
from kv_strategies.paged import BlockPool
from kv_strategies.prefix import PrefixCache
from kv_strategies.tiers import saved

BLOCK_SIZE, BYTES = 2, 16
IDENTITY = {"model": "none", "rate": 0.5, "policies": {"retention": {}, "names": ["a"]}}


class Memory:
    """Sixteen bytes a block."""

    def __init__(self, num_blocks):
        self.bytes = torch.zeros(num_blocks, BYTES, dtype=torch.uint8)

    def read_blocks(self, blocks):
        return self.bytes[blocks]

    def write_blocks(self, blocks, data):
        self.bytes[blocks] = data


def empty(num_blocks=12, identity=IDENTITY):
    prefix = PrefixCache()
    prefix.open(BlockPool(num_blocks, BLOCK_SIZE), identity)
    return prefix, Memory(num_blocks)


def tokens(*ids):
    return np.asarray(ids, dtype="<i4").tobytes()


def record(parent, token, data=None):
    """A block of one token, twice; what it holds tells it from all others."""
    return saved.Record(parent, tokens(token, token), bytes([token % 256] * BYTES) if data is None else data)


CHAIN = [record(parent, parent + 2) for parent in range(-1, 5)]
ROOT = b"r" * 32


def sealed(header, records=(), size=None):
    """A file as `saved.write` writes it, whatever the header is."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = saved._MAGIC + struct.pack("<q", len(encoded) if size is None else size) + encoded
    packed = [struct.pack("<q", one.parent) + one.tokens + one.data for one in records]
    return b"".join(piece + saved._checksum(piece) for piece in (start, *packed))


def header(**changes):
    return {"identity": IDENTITY, "roots": [ROOT.hex()], "num_blocks": len(CHAIN), **changes}


def load(path, prefix, memory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prefix.load(path, memory)


def check(prefix, memory):
    """The books balance, nobody holds what the tree does not, and each block holds what its tokens say."""
    prefix.pool.check_integrity(prefix.held_blocks())
    assert prefix.pool.num_used == len(prefix.held_blocks()) == len(prefix.pool.idle)
    for node in prefix.ordered():
        assert memory.bytes[node.block].tolist() == [node.tokens[0]] * BYTES, "served, and never written"


# --- under its name


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def write(path, records=CHAIN):
    saved.write(path, IDENTITY, [ROOT], len(CHAIN), records)


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_new_file_is_the_users_own(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "saved")
        strategy = build(
            "prefix+offload",
            tiny_llama(num_layers=1),
            num_blocks=2,
            resident="kv",
            host_bytes=1 << 20,
            disk_path=tmp_path,
            disk_bytes=1 << 20,
        )
    finally:
        os.umask(before)
    assert mode(tmp_path / "saved") == 0o600
    assert mode(strategy.placement.tiers._disk._handle) & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o644, 0o666, 0o400])
def test_a_replaced_file_keeps_its_mode(tmp_path, kept):
    path, seen = tmp_path / "saved", set()

    def records():
        seen.update(mode(found) for found in tmp_path.iterdir() if found != path)
        yield from CHAIN

    path.write_bytes(b"old")
    path.chmod(kept)
    write(path, records())
    assert mode(path) == kept and seen == {0o600}, "incomplete, it is nobody else's business"
    assert path.read_bytes() == sealed(header(), CHAIN)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "volume").mkdir()
    target, link, dangling = tmp_path / "volume" / "real", tmp_path / "saved", tmp_path / "dangling"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink() and target.read_bytes() == sealed(header(), CHAIN)
    dangling.symlink_to(tmp_path / "volume" / "new")
    write(dangling)
    assert dangling.is_symlink() and mode(tmp_path / "volume" / "new") == 0o600
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(OSError, match="only a regular file"):
        write(circle)
    assert circle.is_symlink() and len(list((tmp_path / "volume").iterdir())) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from kv_strategies.tiers import saved
def records():
    yield saved.Record(-1, bytes(8), bytes(16))
    os.kill(os.getpid(), signal.SIGKILL)
saved.write(Path(sys.argv[1]), {}, [b"r" * 32], 2, records())
"""


def test_what_a_killed_process_has_left_goes_with_the_next_save(tmp_path):
    path = tmp_path / "saved"
    for name in ("saved", "another"):
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)])
        assert done.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(f".{name}.") and mode(left) == 0o600
    (tmp_path / ".mine").write_text("hidden, and no leftover")
    (tmp_path / "notes.kv-saving").write_text("likewise")
    os.mkfifo(tmp_path / ".pipe.kv-saving")
    (tmp_path / ".link.kv-saving").symlink_to(tmp_path / ".mine")
    write(path)
    names = {".mine", "notes.kv-saving", ".pipe.kv-saving", ".link.kv-saving", "saved"}
    assert {found.name for found in tmp_path.iterdir()} == names


def test_a_file_that_is_being_written_is_left_alone(tmp_path):
    path = tmp_path / "saved"

    def records():
        write(path)
        assert len(list(tmp_path.iterdir())) == 2
        yield from CHAIN

    write(path, records())
    assert [found.name for found in tmp_path.iterdir()] == ["saved"]
    prefix, memory = empty()
    assert load(path, prefix, memory).num_blocks == len(CHAIN)


def test_a_file_taken_for_abandoned_before_it_was_locked(tmp_path, monkeypatch):
    flock, stolen = saved.fcntl.flock, []

    def late(handle, how):
        if not stolen and how == saved.fcntl.LOCK_EX:
            stolen.extend(tmp_path.iterdir())
            saved._remove_abandoned(tmp_path)
        return flock(handle, how)

    monkeypatch.setattr(saved.fcntl, "flock", late)
    write(tmp_path / "saved")
    assert len(stolen) == 1 and [found.name for found in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("name", ["mkstemp", "fchmod", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, name, error):
    path = tmp_path / "saved"
    path.write_bytes(b"old")
    path.chmod(0o640)

    def fail(*args):
        raise error

    monkeypatch.setattr(saved.tempfile if name == "mkstemp" else saved.os, name, fail)
    with pytest.raises(type(error)):
        write(path)
    assert path.read_bytes() == b"old" and mode(path) == 0o640
    assert [found.name for found in tmp_path.iterdir()] == ["saved"]
