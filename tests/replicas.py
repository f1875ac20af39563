"""What other processes do with a shared folder, for `test_shared.py`."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from contextlib import contextmanager

from common import VOCAB, tiny_llama

from kv_strategies import Request, Runner, build
from kv_strategies.tiers import saved
from kv_strategies.tiers.shared import Folder, Name

TOKENS, BYTES = 8, 64  # of a block, where no model is
IDENTITY = {"model": "none"}
#: Each is forked from one that has imported this module, and has nothing else of this one.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["replicas"])


@contextmanager
def started(target, *args):
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


# --- a strategy that shares


def sharing(folder, model=None, name="prefix", num_blocks=64, num_bytes=1 << 22, **options):
    options |= {"num_blocks": num_blocks, "block_size": 4, "shared_path": folder, "shared_bytes": num_bytes}
    return build(name, model or tiny_llama(num_layers=1), **options)


def serve(strategy, *prompts, salt=""):
    """Results, when all that was to be written is."""
    results = Runner(strategy.model, strategy).generate([Request(p, max_new_tokens=5, salt=salt) for p in prompts])
    strategy.check_integrity()
    strategy.sharing._folder.settle()
    return results


def prompt(seed, length=23):
    return random.Random(seed).choices(range(VOCAB), k=length)


# --- a folder without a model


def names(row, count):
    """Of a row's first blocks, whose tokens are its number."""
    path = bytes([row]) * TOKENS * count
    return [Name(bytes([row, i]) * 16, b"r" * 32, path, TOKENS * i, TOKENS * (i + 1)) for i in range(count)]


def blocks(row, count):
    return [(name, bytes([row, i]) * (BYTES // 2)) for i, name in enumerate(names(row, count))]


def small_folder(path, num_blocks=1000):
    """Room for so many blocks of the shortest rows, and BYTES of anything."""
    one = len(b"".join(saved.pieces(IDENTITY | {"before": ""}, [b"r" * 32], 1, [])))
    return Folder(path, num_blocks * (one + 8 + TOKENS + BYTES + 16), TOKENS, BYTES)


def num_bytes(path):
    return sum(entry.stat().st_size for entry in os.scandir(path) if entry.name[0] != ".")


def read(folder, row, count):
    return [data for some in folder.read(IDENTITY, names(row, count)) for data in some]


def write(folder, row, count):
    folder.write(IDENTITY, blocks(row, count))
    folder.settle()


# --- what processes do


def replica(path, pipe):
    """Serves what it is asked, until told to end."""
    strategy = sharing(path)
    while (asked := pipe.recv()) is not None:
        (result,) = serve(strategy, asked)
        pipe.send((result.token_ids, result.num_cached_tokens, strategy.stats()))


def killed_in_the_middle(path, pipe):
    """A writer in a folder of its own for each moment, and how it ended."""
    for moment in MOMENTS:
        child = os.fork()
        if not child:
            _die(path / moment, moment)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


MOMENTS = ("writing", "written", "named")


def _die(path, moment):
    folder, replace = small_folder(path), os.replace
    write(folder, 1, 2)

    def killed(source, target):
        if moment == "writing":
            os.truncate(source, 100)
        if moment == "named":
            replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killed
    write(folder, 2, 2)


def writing(path, num_blocks, seed):
    folder, rng = small_folder(path, num_blocks), random.Random(seed)
    for _ in range(30):
        write(folder, rng.randrange(8), rng.randint(1, 4))
