"""Shared prefixes: what one process has computed another one uses, whoever is killed, writes beside it or fails."""

from __future__ import annotations

import fcntl
import itertools
import os
import resource
import signal
import time
import warnings

import pytest
from common import baseline_tokens, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replicas import (
    IDENTITY,
    MOMENTS,
    PROCESSES,
    blocks,
    killed_in_the_middle,
    names,
    num_bytes,
    prompt,
    read,
    replica,
    serve,
    sharing,
    small_folder,
    started,
    write,
    writing,
)
from test_identity import CHANGES, adapt

from kv_strategies import Request, Runner, build, prefix
from kv_strategies.tiers import shared

MODEL = tiny_llama(num_layers=1)


# --- between processes


def test_a_replica_starts_with_what_another_has_computed(tmp_path):
    """Both run; each finds what the other has published since, and answers as alone."""
    ours, theirs = PROCESSES.Pipe()
    first, second = prompt(1), prompt(2)
    with started(replica, tmp_path / "shared", theirs):
        ours.send(first)
        tokens, num_cached, _ = ours.recv()
        assert num_cached == 0
        strategy = sharing(tmp_path / "shared")
        (again,) = serve(strategy, first)
        assert again.token_ids == tokens and again.num_cached_tokens == 20
        (other,) = serve(strategy, second)
        ours.send(second)
        tokens, num_cached, stats = ours.recv()
        assert tokens == other.token_ids and num_cached == 20
        assert stats["shared_blocks_read"] == 5
        ours.send(None)
    assert [again.token_ids, other.token_ids] == baseline_tokens(MODEL, [Request(p, 5) for p in (first, second)])


def test_a_killed_writer_leaves_no_lock_and_no_half_a_block(tmp_path):
    ours, theirs = PROCESSES.Pipe()
    with started(killed_in_the_middle, tmp_path, theirs):
        assert [ours.recv() for _ in MOMENTS] == [-signal.SIGKILL] * len(MOMENTS)
    for moment in MOMENTS:
        folder = small_folder(tmp_path / moment)
        assert (tmp_path / moment / ".writing").exists() == (moment != "named")
        assert [data for _, data in blocks(1, 2)] == read(folder, 1, 2)
        assert len(read(folder, 2, 2)) == (moment == "named") and folder.num_damaged == 0
        write(folder, 2, 2)
        assert [data for _, data in blocks(2, 2)] == read(folder, 2, 2)
        assert len(os.listdir(tmp_path / moment)) == 5  # four blocks and the lock


def test_two_write_at_once_and_one_reads_what_they_replace(tmp_path):
    """A folder that is always full: what is read is whole and right, and nobody ever takes more than there may be."""
    path, num_blocks = tmp_path / "shared", 12
    folder, found, most = small_folder(path, num_blocks), 0, 0
    with started(writing, path, num_blocks, 1) as one, started(writing, path, num_blocks, 2) as two:
        for row in itertools.cycle(range(8)):
            data = read(folder, row, 4)
            assert data == [content for _, content in blocks(row, 4)][: len(data)]
            found += len(data)
            with folder._locked():
                most = max(most, num_bytes(path))
            if not (one.is_alive() or two.is_alive()):
                break
        assert (one.exitcode, two.exitcode) == (0, 0)
    assert found and folder.num_damaged == 0
    assert 0 < most <= folder._num_bytes
    assert not (path / ".writing").exists()


def test_readers_wait_for_no_lock(tmp_path):
    folder = small_folder(tmp_path / "shared")
    write(folder, 1, 2)
    with open(tmp_path / "shared" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.write(IDENTITY, blocks(2, 1))
        assert len(read(folder, 1, 2)) == 2 and len(read(small_folder(tmp_path / "shared"), 1, 2)) == 2
        assert folder.lacking(names(2, 2)) == [1], "it is on its way"
        assert not read(folder, 2, 1)
    folder.settle()
    assert len(read(folder, 2, 1)) == 1


# --- what is believed


def test_what_others_see_is_nothing(tmp_path):
    before = os.umask(0)
    try:
        folder = small_folder(tmp_path / "new" / "shared")
        write(folder, 1, 1)
    finally:
        os.umask(before)
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in os.scandir(tmp_path / "new" / "shared")}
    assert set(modes.values()) == {0o600} and len(modes) == 2
    assert (tmp_path / "new" / "shared").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o1777])
def test_a_folder_that_is_open_to_others_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(ValueError, match=r"closed to others.*chmod 700"):
        sharing(tmp_path)


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shared_path and shared_bytes go together"):
        build("prefix", MODEL, num_blocks=8, shared_path=tmp_path)
    with pytest.raises(ValueError, match="shared_bytes must hold at least one block"):
        sharing(tmp_path / "shared", num_bytes=100)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        sharing(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be used: Not a directory"):
        sharing(tmp_path / "file" / "below")


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(fcntl.F_GETFD + 94, "Operation not supported")

    monkeypatch.setattr(shared.fcntl, "flock", flock)
    with pytest.raises(ValueError, match="file system without locks: Operation not supported"):
        sharing(tmp_path / "shared")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder that a strategy has filled, and what it has answered."""
    path = tmp_path_factory.mktemp("published") / "shared"
    asked = [prompt(seed) for seed in range(4)]
    strategy = sharing(path, tiny_llama())
    return path, asked, [result.token_ids for result in serve(strategy, *asked)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_model_finds_nothing(published, change):
    path, asked, _ = published
    model = tiny_llama()
    change(model)
    strategy = sharing(path, model)
    found = serve(strategy, asked[0], salt="of this test")  # and leaves nothing for the next
    alone = build("prefix", model, num_blocks=64, block_size=4)
    assert [result.token_ids for result in found] == [
        result.token_ids for result in Runner(model, alone).generate([Request(asked[0], 5)])
    ]
    assert next(strategy.sharing._folder.read(strategy.sharing._tell(), of(strategy, asked[0])), None) is None


def of(strategy, tokens, salt=""):
    return strategy.sharing._named(list(strategy.sharing._split(tokens)), salt)


def test_adapters_are_told_apart(tmp_path):
    """The weights are the same, whichever of them is active."""
    strategies = {}
    for active in (["a"], ["b"], ["a"]):
        model = tiny_llama()
        adapt(model).active_adapters = active
        strategies[active[0]] = strategy = sharing(tmp_path / "shared", model)
        serve(strategy, prompt(0))
    assert [s.stats()["shared_blocks_read"] for s in strategies.values()] == [5, 0]


@pytest.mark.parametrize("changes", [{"salt": "b"}, {"name": "prefix+int8"}, {"name": "prefix+window", "window": 16}])
def test_salts_and_policies_are_told_apart(published, changes):
    path, asked, _ = published
    strategy = sharing(path, tiny_llama(), **{key: value for key, value in changes.items() if key != "salt"})
    (result,) = serve(strategy, asked[1], salt=changes.get("salt", "c"))
    assert result.num_cached_tokens == 0


def test_all_tokens_are_compared(tmp_path, monkeypatch):
    """Hashes of one byte, of which two in three collide: no answer is another prompt's."""
    monkeypatch.setattr(prefix, "block_digest", lambda parent, tokens: bytes([sum(tokens) % 8]) * 32)
    asked = [prompt(seed, 12) for seed in range(30)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file of other tokens is taken for a damaged one
        strategies = [sharing(tmp_path / "shared", num_blocks=8) for _ in range(2)]
        found = [serve(strategies[index % 2], one)[0].token_ids for index, one in enumerate(asked)]
    assert found == baseline_tokens(MODEL, [Request(one, 5) for one in asked])
    assert sum(strategy.sharing._folder.num_damaged for strategy in strategies) > 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["flip", "cut", "more", "other"]))
def test_a_damaged_file_is_computed_again(tmp_path, data, kind):
    folder = small_folder(tmp_path / "shared")
    for file in (tmp_path / "shared").iterdir():
        file.unlink()
    for row in (1, 2):
        write(folder, row, 3)
    index = data.draw(st.integers(0, 2))
    file = folder._file(names(1, 3)[index])
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "more":
        content += bytes(data.draw(st.integers(1, 200)))
    else:
        content = folder._file(names(2, 3)[data.draw(st.integers(0, 2))]).read_bytes()
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = len(read(folder, 1, 3))
    is_sound = kind == "more"  # what follows the block is nobody's
    assert count == (3 if is_sound else index) and folder.num_damaged == (not is_sound)
    assert file.exists() == is_sound
    write(folder, 1, 3)
    assert read(folder, 1, 3) == [content for _, content in blocks(1, 3)]


# --- room


def test_the_longest_unused_go_and_the_end_of_a_path_before_its_start(tmp_path):
    folder = small_folder(tmp_path / "shared", 10)
    for row in (1, 2):
        write(folder, row, 3)
        time.sleep(0.02)  # times of files are as fine as the kernel's clock
    assert len(read(folder, 1, 3)) == 3
    time.sleep(0.02)
    write(folder, 3, 3)
    time.sleep(0.02)
    assert folder.lacking(names(1, 3)) == []
    write(folder, 4, 2)
    left = {row: len(read(folder, row, 3)) for row in (1, 2, 3, 4)}
    assert left[1] == 3 and left[2] < 3 and left[4] == 2
    assert {file.name for file in (tmp_path / "shared").iterdir()} >= {
        names(2, 3)[i].digest.hex() for i in range(left[2])
    }


@pytest.mark.parametrize("content", [b"", b"7", b"not a number at all", b"9" * 20, b"-" + b"1" * 19])
def test_a_wrong_number_of_bytes_is_counted_again(tmp_path, content):
    folder = small_folder(tmp_path / "shared", 6)
    write(folder, 1, 2)
    (tmp_path / "shared" / ".lock").write_bytes(content)
    write(folder, 2, 2)
    assert len(read(folder, 1, 2)) == len(read(folder, 2, 2)) == 2
    for row in range(3, 9):
        write(folder, row, 2)
    assert num_bytes(tmp_path / "shared") <= folder._num_bytes


def test_a_full_disk_ends_writing_and_nothing_else(tmp_path):
    strategy = sharing(tmp_path / "shared")
    serve(strategy, prompt(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # for all files of this process, as a full disk would
    try:
        with pytest.warns(RuntimeWarning, match="takes no more blocks of this process"):
            found = serve(strategy, prompt(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found[0].token_ids == baseline_tokens(MODEL, [Request(prompt(2), 5)])[0]
    assert not (tmp_path / "shared" / ".writing").exists()
    serve(strategy, prompt(3))
    assert strategy.stats()["shared_blocks_written"] == 6
    assert serve(sharing(tmp_path / "shared"), prompt(1))[0].num_cached_tokens == 20


def test_what_is_published_is_given_as_it_can_be_written(tmp_path, monkeypatch):
    """A writer that is slower than the model holds at most so much, and the rest is given when it is used again."""
    monkeypatch.setattr(shared, "_UNDER_WAY", 3 << 10)  # blocks of this model have 1 KiB
    strategy = sharing(tmp_path / "shared")
    for written in (3, 6):
        with open(tmp_path / "shared" / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            Runner(strategy.model, strategy).generate([Request(prompt(1), 5)])
        strategy.sharing._folder.settle()
        assert strategy.stats()["shared_blocks_written"] == written


@pytest.mark.parametrize("name", ["prefix", "prefix+offload", "prefix+int8", "prefix+evict", "prefix+window+offload"])
def test_a_pool_of_few_blocks_takes_what_it_has_room_for(tmp_path, name):
    options = {"window": 8, "sinks": 2} if "window" in name else {"keep": 0.6} if "evict" in name else {}
    asked = [prompt(seed, 60) for seed in range(5)]
    large = sharing(tmp_path / "shared", name=name, num_blocks=120, **options)
    wanted = [result.token_ids for result in serve(large, *asked)]
    small = sharing(tmp_path / "shared", name=name, num_blocks=35, **options)
    assert [result.token_ids for result in serve(small, *asked)] == wanted
    assert small.stats()["shared_blocks_read"] > 0 and small.stats()["blocks_used"] == 0
