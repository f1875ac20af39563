"""Many machines: a file of prompts over a Ray cluster, `kv-strategies batch prompts.jsonl out.jsonl --address auto`.

    read (where the file is)  ->  sort by beginnings  ->  tasks of neighbours  ->  replicas  ->  rows, as they are done
                                  a b c | a b d | a b d e | f ..                   Answering      written by the caller

Each replica is an actor with a model, a strategy and a runner of its own, and answers as one machine does (`batch.py`).
Who gets which task and when, progress, back-pressure and the repetition of what a dead replica leaves are those of Ray
Data; nothing here schedules.

Prompts that begin alike are neighbours after sorting, which is the depth-first order of their tree: the order in which
a cache of limited size finds most (SGLang, Zheng et al. 2024, theorem 3.1). So a task's prompts share what a replica
has cached, and each replica that a long run of them reaches computes their common beginning once: docs/scale.md.

It takes the extra `cluster`: pip install 'kv-strategies[cluster]'.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from .batch import PROMPTS, Answering, Line, Lines, encode

_TASK = 64  # lines at most: the seats of a runner
_TASKS = 2  # of a replica at the same time: as one ends, the other takes its seats
_PART = 64 << 20  # bytes of the file that are sorted in one piece of memory, some more where lines are like each other
_PIECE = 128  # characters, some two blocks: where two prompts differ within one, they count as different from its start


class Cluster:
    """Lines to rows, by the replicas of a Ray cluster.

    Args:
        load: makes what answers, in each replica. It is pickled: it holds names that every machine can load.
        address: of the cluster: "auto" for the one that this machine is part of, "HOST:PORT", or "local", which starts
            one of this machine and ends it. Where the process is connected already, that cluster serves.
        replicas: as many as fit unless told.
        gpus: of a replica; 1 where the cluster has any, unless told. A share, such as 0.5, is taken, too.
        cpus: of a replica; 1 unless told.

    Raises, as it is called:
        ConnectionError: no cluster at the address.
        ValueError: a replica that the cluster has no room for.
        RuntimeError: a replica that cannot be made, or raised; it says why. One that dies is replaced.
    """

    def __init__(
        self,
        load: Callable[[], Answering],
        address: str = "auto",
        *,
        replicas: int | None = None,
        gpus: float | None = None,
        cpus: float | None = None,
    ):
        self._load = load
        self._address = address
        self._replicas, self._gpus, self._cpus = replicas, gpus, cpus

    def __call__(self, lines: Lines) -> Generator[dict, None, None]:
        if not len(lines):
            return
        is_ours = not ray.is_initialized()
        if is_ours:
            _connect(self._address)
        try:
            yield from self._answer(lines)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"a replica failed: {_reason(error)}") from error
        finally:
            if is_ours:
                ray.shutdown()

    def _answer(self, lines: Lines) -> Iterator[dict]:
        replicas, resources = self._sizes()
        replicas = min(replicas, len(lines))
        # At least four tasks a replica, so that the others do not wait for long for the last one.
        size = max(1, min(_TASK, len(lines) // (4 * replicas)))
        prompts = _Prompts(lines)
        answers = (
            # Without a CPU of its own: the machine with the file may have none that Ray counts.
            ray.data.read_datasource(
                prompts,
                num_cpus=0,
                compute=TaskPoolStrategy(min(2, prompts.num_parts)),
                override_num_blocks=prompts.num_parts,
            )
            .sort("beginnings")
            .repartition(target_num_rows_per_block=size)
            .map_batches(
                _Replica,
                fn_constructor_args=[self._load],
                batch_size=size,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    size=replicas,
                    max_tasks_in_flight_per_actor=_TASKS,
                    max_concurrent_calls_per_actor=_TASKS,
                    enable_true_multi_threading=True,
                ),
                **resources,
            )
        )
        for table in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from map(json.loads, table["row"].to_pylist())

    def _sizes(self) -> tuple[int, dict[str, float]]:
        """How many replicas, and what Ray is told that each of them takes."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = self._gpus if self._gpus is not None else float(any(node.get("GPU") for node in nodes))
        cpus = self._cpus if self._cpus is not None else 1.0
        needs = {"GPU": gpus, "CPU": cpus}
        if min(gpus, cpus) < 0 or gpus + cpus == 0:
            raise ValueError(f"a replica takes a GPU or a CPU, or a part of one; got {gpus:g} and {cpus:g}")
        room = sum(min(int(node.get(kind, 0) / need + 1e-9) for kind, need in needs.items() if need) for node in nodes)
        if not gpus:  # one CPU has to be left for reading and sorting, or no replica ever gets a task
            room = min(room, int((sum(node.get("CPU", 0) for node in nodes) - 1) / cpus + 1e-9))
        if room < (self._replicas or 1):
            raise ValueError(
                f"the cluster has room for {room} replicas of {gpus:g} GPUs and {cpus:g} CPUs, beside the one CPU that "
                f"reads and sorts: {len(nodes)} machines, {sum(node.get('GPU', 0) for node in nodes):g} GPUs, "
                f"{sum(node.get('CPU', 0) for node in nodes):g} CPUs"
            )
        # Ray counts one CPU beside a GPU by itself, and warns where it is told both.
        resources = {"num_gpus": gpus} if gpus and self._cpus is None else {"num_gpus": gpus, "num_cpus": cpus}
        return self._replicas or room, resources


def _connect(address: str) -> None:
    host, _, port = address.rpartition(":")
    if port.isdecimal():  # Ray would wait for a quarter of an hour
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from None
    ray.init(address, **({"include_dashboard": False} if address == "local" else {}))


def _reason(error: Exception) -> str:
    """What stands below the last frame of a replica's traceback."""
    lines = str(error).rstrip().splitlines()
    below = next((i for i in range(len(lines), 0, -1) if lines[i - 1].startswith(" ")), 0)
    return "\n".join(lines[below:] or lines)


class _Prompts(Datasource):
    """The lines, read on the machine that has the file in as many parts as the sort shall have."""

    supports_distributed_reads = False

    def __init__(self, lines: Lines):
        super().__init__()
        self._lines = ray.put(lines)  # once for all parts: it knows every line that has been answered
        self._parts = list(_parts(lines.path))
        self.num_parts = len(self._parts)

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context=None):
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_read, self._lines, part), metadata) for part in self._parts]


def _parts(path: Path) -> Iterator[tuple[int, int, int]]:
    """Whole lines, `_PART` bytes and more: at which byte they begin, with the number of the first, and how many."""
    offset, number = 0, 1
    with path.open("rb") as file:
        while text := file.read(_PART) + file.readline():
            count = text.count(b"\n") + (not text.endswith(b"\n"))
            yield offset, number, count
            offset, number = offset + len(text), number + count


def _read(lines: ray.ObjectRef[Lines], part: tuple[int, int, int]) -> Iterator[pa.Table]:
    found = ray.get(lines).part(*part)
    while rows := [line._asdict() | {"beginnings": beginnings(line)} for line in islice(found, 1024)]:
        yield pa.Table.from_pylist(rows)


def beginnings(line: Line) -> str:
    """A chained hash for each beginning of what is asked, from the shortest: sorted by it, lines that begin alike are
    neighbours, the nearer the longer they do.
    """
    try:
        asked = json.loads(line.text)
        text = json.dumps([asked.get(name) for name in ("salt", *PROMPTS)], sort_keys=True)
    except (ValueError, RecursionError, AttributeError):
        return ""  # the replica says what is wrong with it
    chain, hashes = hashlib.blake2b(digest_size=4), []
    for start in range(0, len(text), _PIECE):
        chain.update(text[start : start + _PIECE].encode())
        hashes.append(chain.hexdigest())
    return "".join(hashes)


class _Replica:
    def __init__(self, load: Callable[[], Answering]):
        self._answer = load()

    def __call__(self, table: pa.Table) -> pa.Table:
        lines = [Line(**line) for line in table.drop_columns(["beginnings"]).to_pylist()]
        # In their order: where Ray runs a task again, it takes the same rows to come at the same places.
        rows = sorted(self._answer(lines), key=itemgetter("line"))
        return pa.table({"row": [encode(row) for row in rows]})
