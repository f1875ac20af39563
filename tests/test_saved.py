"""Files: whatever a file says, whoever is killed or interrupted, no block is served that was not written."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from common import every_moment, tiny_llama
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kv_strategies import build
from kv_strategies.paged import BlockPool, BlockTable
from kv_strategies.prefix import PrefixCache, lineage
from kv_strategies.step.interrupts import uninterrupted
from kv_strategies.tiers import saved

BLOCK_SIZE, BYTES = 2, 16
IDENTITY = {"model": "none", "rate": 0.5, "policies": {"retention": {}, "names": ["a"]}, "weights": ""}


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


def sealed(header, records=(), size=None, roots=(ROOT,)):
    """A file as `saved.write` writes it under these roots, whatever the header is."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = saved._MAGIC + struct.pack("<q", len(encoded) if size is None else size) + encoded
    checksum = saved._checksum(start)
    return start + checksum + b"".join(saved._sealed(saved._anchors(checksum, list(roots)), records))


def header(**changes):
    return {"identity": IDENTITY, "roots": [ROOT.hex()], "num_blocks": len(CHAIN), **changes}


def load(path, prefix, memory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prefix.load(path, memory)


def check(prefix, memory):
    """The books balance, nobody holds what the tree does not, and each block holds what its tokens say."""
    prefix.pool.check_integrity(prefix.held_blocks())
    prefix.check_integrity()
    assert prefix.pool.num_used == len(prefix.held_blocks()) == len(prefix.pool.idle)
    for node in prefix.ordered():
        assert memory.bytes[node.block].tolist() == [node.tokens[0]] * BYTES, "served, and never written"


# --- what a file says of itself

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(ROOT.hex()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "rate", "x"]), inner),
    max_leaves=6,
)
NESTED = b'{"identity": ' + b'{"x":' * 900 + b"1" + b"}" * 900 + b', "roots": [], "num_blocks": 1}'


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=JSON
    | st.builds(header, identity=JSON)
    | st.builds(header, roots=JSON)
    | st.builds(header, num_blocks=JSON)
    | st.builds(lambda key: {k: v for k, v in header().items() if k != key}, st.sampled_from(list(header())))
    | st.binary(max_size=9),
    size=st.none() | st.integers(-(2**63), 2**63 - 1),
)
@example(header=header(num_blocks=-1), size=None)
@example(header=header(num_blocks=True), size=None)
@example(header=header(num_blocks=10**4200), size=None)
@example(header=header(num_blocks=2**63), size=None)
@example(header=header(num_blocks=6.0), size=None)
@example(header=header(roots=[7]), size=None)
@example(header=header(roots=ROOT.hex()), size=None)
@example(header=header(roots={ROOT.hex(): 1}), size=None)
@example(header=header(roots=["zz"]), size=None)
@example(header=header(roots=["é" * 64]), size=None)
@example(header=header(roots=["72"]), size=None)
@example(header=header(identity={**IDENTITY, "rate": float("nan")}), size=None)
@example(header=header(identity=None), size=None)
@example(header=header(identity={**IDENTITY, "text": "\ud800"}), size=None)
@example(header=[], size=None)
@example(header=b"[" * 100_000, size=None)
@example(header=b"[" * 900 + b"]" * 900, size=None)
@example(header=NESTED, size=None)
@example(header=b"1" * 5000, size=None)
@example(header=b"\xff\xfe\x00", size=None)
@example(header=header(), size=-1)
@example(header=header(), size=-(2**63))
@example(header=header(), size=2**63 - 1)
@example(header=header(), size=0)
def test_odd_headers_are_refused_in_words(tmp_path, header, size):
    path, (prefix, memory) = tmp_path / "saved", empty()
    path.write_bytes(sealed(header, CHAIN, size))
    try:
        loaded = load(path, prefix, memory)
    except ValueError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 3000
        assert prefix.pool.num_free == 12
    else:  # it means what it says
        assert 0 <= loaded.num_blocks <= len(CHAIN)
    check(prefix, memory)


def test_a_file_cannot_claim_more_than_it_holds(tmp_path):
    path, (prefix, memory) = tmp_path / "saved", empty()
    path.write_bytes(sealed(header(num_blocks=300_000), CHAIN) + bytes(17_000))
    tracemalloc.start()
    began = time.perf_counter()
    loaded = load(path, prefix, memory)
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 1 << 20
    assert loaded.num_blocks == len(CHAIN) and loaded.num_damaged == 300_000 - len(CHAIN)
    check(prefix, memory)


def test_a_header_larger_than_its_blocks_need_is_not_even_read(tmp_path):
    path, (prefix, memory) = tmp_path / "saved", empty()
    path.write_bytes(sealed(header(padding="x" * (8 << 20))))
    tracemalloc.start()
    with pytest.raises(ValueError, match="header is damaged"):
        prefix.load(path, memory)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    roots = [bytes([i % 256, i // 256] * 16) for i in range(30_000)]  # a salt each
    saved.write(path, IDENTITY, roots, len(roots), (record(-1 - i, i % 100) for i in range(len(roots))))
    assert load(path, prefix, memory).num_blocks == 12
    check(prefix, memory)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(
        st.builds(record, st.integers(-3, 9) | st.sampled_from([-(2**63), 2**63 - 1]), st.integers(0, 3)), max_size=12
    ),
    roots=st.lists(st.sampled_from([ROOT, b"s" * 32]), max_size=2),
    num_blocks=st.integers(1, 12),
    batch=st.integers(1, 3),
)
@example(records=[record(0, 1), record(0, 2)], roots=[ROOT], num_blocks=4, batch=1)
@example(records=[record(-2, 1), record(0, 2)], roots=[ROOT], num_blocks=4, batch=1)
@example(records=[record(2, 1), record(-1, 2), record(0, 3)], roots=[ROOT], num_blocks=4, batch=3)
def test_blocks_that_continue_what_there_is_not(tmp_path, records, roots, num_blocks, batch):
    path, (prefix, memory) = tmp_path / "saved", empty(num_blocks)
    path.write_bytes(
        sealed(header(roots=[root.hex() for root in roots], num_blocks=len(records)), records, roots=roots)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "_BATCH_BYTES", batch * (8 + 4 * BLOCK_SIZE + BYTES))
        loaded = load(path, prefix, memory)
    check(prefix, memory)
    named = {}  # number -> tokens from the root on
    for number, one in enumerate(records):
        if -len(roots) <= one.parent < 0:
            named[number] = (roots[-1 - one.parent], one.tokens)
        elif one.parent in named and one.parent < number:
            named[number] = (*named[one.parent], one.tokens)
    assert loaded.num_blocks == min(num_blocks, len(set(named.values())))
    assert loaded.num_blocks + loaded.num_known + loaded.num_left_out == len(named)
    found = {(path[-1].parent.digest, *(n.tokens for n in reversed(path)))
             for path in (list(lineage(node)) for node in prefix.ordered())}  # fmt: skip
    assert found <= set(named.values()) and len(found) == loaded.num_blocks


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sound_blocks_in_other_places_are_not_what_they_were(tmp_path, data):
    """Records of two files of one header, swapped, repeated and mixed: none continues what it did not before."""
    path, (prefix, memory) = tmp_path / "saved", empty(20)
    shapes = [data.draw(st.lists(st.integers(-1, 5), min_size=6, max_size=6)) for _ in range(2)]
    files = [[record(min(parent, i - 1), 10 * number + i) for i, parent in enumerate(shape)]
             for number, shape in enumerate(shapes)]  # fmt: skip
    head = sealed(header())
    anchors = saved._anchors(head[-16:], [ROOT])
    pieces = [piece for records in files for piece in saved._sealed(anchors, records)]
    chosen = data.draw(st.lists(st.sampled_from(pieces), min_size=6, max_size=6))
    path.write_bytes(head + b"".join(chosen))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "_BATCH_BYTES", data.draw(st.integers(1, 3)) * (8 + 4 * BLOCK_SIZE + BYTES))
        load(path, prefix, memory)
    check(prefix, memory)
    written = set()
    for records in files:
        paths = {-1: ()}
        for number, one in enumerate(records):
            paths[number] = (*paths[one.parent], one.tokens)
            written.add(paths[number])
    for node in prefix.ordered():
        assert tuple(step.tokens for step in reversed(list(lineage(node)))) in written


def test_a_block_of_another_models_file_is_none_of_this_one(tmp_path):
    """Though both continue the same salt, and stand in the same place."""
    path, (prefix, memory) = tmp_path / "saved", empty()
    ours, theirs = (sealed(header(identity=IDENTITY | {"weights": weights}), CHAIN) for weights in ("", "other"))
    size = len(ours) - len(sealed(header()))
    path.write_bytes(ours[:-size] + theirs[-size:])
    assert load(path, prefix, memory).num_blocks == 0


def test_a_strangers_root_reaches_nobody(tmp_path):
    """Blocks under a root that no salt has are kept, and found by no request."""
    path, (prefix, memory) = tmp_path / "saved", empty()
    path.write_bytes(sealed(header(), CHAIN))
    assert load(path, prefix, memory).num_blocks == len(CHAIN)
    assert prefix.match([1, 1, 2, 2, 3, 3], "") == ([], 0)
    check(prefix, memory)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path, (prefix, memory) = tmp_path / "odd", empty()
    if kind == "pipe":
        os.mkfifo(path)
    path = "/dev/null" if kind == "device" else tmp_path if kind == "folder" else path
    with pytest.raises((ValueError, OSError), match=r"no regular file|Is a directory"):
        prefix.load(path, memory)
    with pytest.raises(OSError, match="only a regular file can be replaced"):
        prefix.save(path, memory)


# --- interrupted


def test_load_interrupted_at_any_moment(tmp_path, monkeypatch):
    path = tmp_path / "saved"
    saved.write(path, IDENTITY, [ROOT], len(CHAIN), CHAIN)
    monkeypatch.setattr(saved, "_BATCH_BYTES", 2 * (8 + 4 * BLOCK_SIZE + BYTES))
    state = [empty(9)]
    outcomes = set()
    for _ in every_moment(lambda: load(path, *state[-1]), step=3):
        prefix, memory = state[-1]
        check(prefix, memory)
        outcomes.add(len(prefix.held_blocks()))
        state.append(empty(9))
    assert outcomes == {0, 2, 4, 6}, "batches are taken as a whole"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_load_fails_in_any_of_its_calls(tmp_path, monkeypatch, error):
    path = tmp_path / "saved"
    saved.write(path, IDENTITY, [ROOT], len(CHAIN), CHAIN)
    monkeypatch.setattr(saved, "_BATCH_BYTES", 2 * (8 + 4 * BLOCK_SIZE + BYTES))
    for owner, name in [(Memory, "write_blocks"), (Memory, "read_blocks"), (BlockPool, "allocate"),
                        (saved.Reader, "_read"), (PrefixCache, "root")]:  # fmt: skip
        original = getattr(owner, name)
        for fails_at in range(6):
            calls = itertools.count()

            def failing(*args, _original=original, _calls=calls, _fails_at=fails_at, **options):
                if next(_calls) == _fails_at:
                    raise error
                return _original(*args, **options)

            prefix, memory = empty()
            with monkeypatch.context() as patch, contextlib.suppress(error):
                patch.setattr(owner, name, failing)
                load(path, prefix, memory)
            check(prefix, memory)
            load(path, prefix, memory)
            assert len(prefix.held_blocks()) == len(CHAIN)
            check(prefix, memory)


def test_the_tree_interrupted_at_any_moment():
    """Publish, match, pin, forget, evict, clear: what Ctrl-C ends, it ends between two of them."""
    prompt = [1, 1, 2, 2, 3, 3]
    prefix, memory = empty()
    tables = []

    def work():
        table = BlockTable(prefix.pool)
        tables.append(table)
        table.append(6)
        for block, token in zip(table.blocks.tolist(), (1, 2, 3), strict=True):
            memory.bytes[block] = token
        prefix.publish(prompt, table, "")
        table.release()
        prefix.pin(prompt[:4], "")
        prefix.forget(prompt[:4], "")
        prefix.evict(2)
        prefix.clear()

    original = BlockTable.append
    with pytest.MonkeyPatch.context() as patch:  # tables are their owner's business
        for name in ("append", "release"):
            patch.setattr(BlockTable, name, uninterrupted()(getattr(BlockTable, name)))
        for _ in every_moment(work):
            for table in tables:
                table.release()
            tables.clear()
            prefix.check_integrity()
            prefix.pool.check_integrity(prefix.held_blocks())
            prefix.clear()
            assert prefix.pool.num_free == 12
    assert BlockTable.append is original


def test_ctrl_c_waits_and_is_not_lost():
    steps = []

    @uninterrupted()
    def work():
        signal.raise_signal(signal.SIGINT)
        steps.append("done")
        inner()
        steps.append("inner done as well")

    @uninterrupted()
    def inner():
        steps.append("inner")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["done", "inner", "inner done as well"]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), uninterrupted() as interrupts:
        signal.raise_signal(signal.SIGINT)
        interrupts.check()
        raise AssertionError("not reached")
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("never")
    assert steps[-1] != "never", "twice is meant"
    assert signal.getsignal(signal.SIGINT) is before


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
    assert mode(strategy.placement.tiers._disk._file.handle) & 0o077 == 0
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
