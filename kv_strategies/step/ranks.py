"""Ranks: the processes that hold one model between them, each a share of its heads (tensor parallelism).

    rank 0   q k v of its heads --- attend --- o, of its columns ---+
                                                                    sum ---> the same on all ranks
    rank 1   q k v of its heads --- attend --- o, of its columns ---+

All ranks are given the same requests and decide by the same integers, so nothing has to be sent for a decision. What
only one process can know is rank 0's to say: the order in which threads asked for something, and the clock. It writes
both down as it goes (`tell`), through the process group's key-value store, and the others read it (`hear`) while the
device still works on the step before. Along comes a digest of every plan, compared before anything is launched: ranks
that disagree find out before they compute together. A rank that fails, or is killed, is known to all others within
seconds (`heartbeat.py`).

`Ranks` is a process that is alone; `Group` one of several.
"""

from __future__ import annotations

import atexit
import os
import pickle
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM

from . import heartbeat
from .heartbeat import Heartbeat, RankError

Found = TypeVar("Found")
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13, and before
_LOOK_AGAIN = timedelta(seconds=1)  # while one waits for another rank, whether that still lives


class Ranks:
    """The ranks of a model. Here: one, which holds all of it and has nobody to ask."""

    rank, size = 0, 1
    num_beside = 1  # ranks of this host, which share its memory
    random: Any = random  # what unseeded requests draw their seeds from

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def own(self, path: str | Path) -> str | Path:
        """A name for what this rank writes beside the others."""
        return path

    # --- tensors

    def add(self, part: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        return part

    def join(self, part: Tensor, num_columns: int) -> Tensor:
        """Columns that `torch.chunk` has spread over ranks, or that all are here: [R, n] -> [R, num_columns]."""
        return part

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks compute together: an error in here says which rank it comes from.

        Raises:
            RankError: another rank has failed, ended or was killed.
        """
        yield

    # --- one order for all

    def is_turn(self, call: Callable[[], tuple]) -> bool:
        """Whether it is time to do what was asked for, which `call` gives in words: at once, or where rank 0 did it."""
        return True

    def step(self, owner: int, late: Callable[[], list[int]]) -> list[int] | None:
        """Begin a step of the runner `owner`: what is late by rank 0's clock. None where rank 0 did something else
        first, which another thread will do here.
        """
        return late()

    def pause(self) -> None:
        """Let other threads do what has to come first."""

    def agree(self, plan: Callable[[], tuple]) -> None:
        """Raises RankError where the plan, in words, is not what rank 0 is about to compute."""

    # --- once, not in a step

    def first(self, work: Callable[[], Found]) -> Found:
        """What rank 0 finds, or the error that it meets, on all ranks."""
        return work()

    def all(self, value: Found) -> list[Found]:
        """What each rank says, in their order."""
        return [value]

    def same(self, what: str, value: object) -> None:
        """Raises RankError where ranks say different things of `what`."""
        for rank, said in enumerate(found := self.all(value)):
            if said != found[0]:
                raise RankError(f"the ranks disagree on {what}: {said!r} on rank {rank}, {found[0]!r} on rank 0")


class Group(Ranks):
    """A rank of a process group."""

    def __init__(self, group: dist.ProcessGroup):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._num_heard, self._num_exchanged = group, 0, 0
        store = dist.PrefixStore(f"kv_strategies/{group.group_name}", dist.distributed_c10d._get_default_store())
        self._store = store.clone()
        self._next: tuple | None = None  # what rank 0 said that is not done here yet
        self._waits_since: float | None = None  # for another thread
        self._is_aborted = False
        self._heart = Heartbeat(store.clone(), self.rank, self.size, lambda: self._num_heard, self._abort)
        hosts = self.all(socket.gethostname())
        self.num_beside = hosts.count(hosts[self.rank])
        self.random = random.Random(self.first(lambda: int.from_bytes(os.urandom(8))))

    def own(self, path: str | Path) -> str | Path:
        return f"{path}.rank{self.rank}of{self.size}"

    def add(self, part: Tensor) -> Tensor:
        if part.is_cuda:
            dist.all_reduce(part, group=self._group)
        else:
            self._wait_for(dist.all_reduce(part, group=self._group, async_op=True))
        return part

    def join(self, part: Tensor, num_columns: int) -> Tensor:
        if part.shape[1] == num_columns:
            return part
        num_rows, width = len(part), -(-num_columns // self.size)
        padded = torch.nn.functional.pad(part, (0, width - part.shape[1])).contiguous()
        parts = padded.new_empty(self.size * num_rows, width)
        if part.is_cuda:
            _gather(parts, padded, group=self._group)
        else:
            self._wait_for(_gather(parts, padded, group=self._group, async_op=True))
        return parts.view(self.size, num_rows, width).transpose(0, 1).reshape(num_rows, -1)[:, :num_columns]

    def _wait_for(self, work: dist.Work) -> None:
        """On a CPU, where nothing but a time limit ends a wait for a rank that does not come."""
        while True:
            try:
                work.wait(_LOOK_AGAIN)
                return
            except RuntimeError:
                if work.is_completed():
                    raise
                self._heart.check()

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._heart.working():
            try:
                yield
            except RankError:
                raise
            except BaseException as error:
                is_own = not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError)
                cause = None if is_own else self._heart.await_cause()  # a peer may be gone
                if cause is not None:
                    raise RankError(cause) from error
                self._fail(f"rank {self.rank} of {self.size} stopped in a step: {type(error).__name__}: {error}")
                raise
            self._heart.check()

    # --- one order for all

    def tell(self, *said: object) -> None:
        """On rank 0: what all others are to do next."""
        self._store.set(f"said/{self._num_heard}", pickle.dumps(said))
        self._num_heard += 1

    def hear(self) -> tuple:
        """On the others: what rank 0 did next. It stays until `take`."""
        self._heart.check()
        if self._next is None:
            self._next = pickle.loads(self._wait(f"said/{self._num_heard}", 0))
        return self._next

    def take(self) -> None:
        self._next, self._waits_since = None, None
        self._num_heard += 1

    def is_turn(self, call: Callable[[], tuple]) -> bool:
        words = call()
        if self.is_first:
            self._heart.check()
            self.tell("call", *words)
            return True
        said = self.hear()
        if said == ("call", *words):
            self.take()
            return True
        if said[0] == "call":
            self._wait_for_thread(f"asked for {_shown(words)}")
        return False

    def step(self, owner: int, late: Callable[[], list[int]]) -> list[int] | None:
        if self.is_first:
            self._heart.check()
            found = late()
            self.tell("step", owner, found)
            return found
        said = self.hear()
        if said[:2] == ("step", owner):
            self.take()
            return said[2]
        self._wait_for_thread("to take a step")
        return None

    def pause(self) -> None:
        if self._waits_since is not None:
            time.sleep(0.001)

    def agree(self, plan: Callable[[], tuple]) -> None:
        words = plan()
        self._heart.check()
        if self.is_first:
            self.tell("plan", *words)
        elif (said := self.hear()) == ("plan", *words):
            self.take()
        else:
            self._disagree(f"about to compute {_shown(words)}", said)

    def _wait_for_thread(self, wants: str) -> None:
        """Another thread is to do here what rank 0 did; it has as long as a rank that does not answer."""
        now = time.monotonic()
        self._waits_since = self._waits_since or now
        if now - self._waits_since > heartbeat.PATIENCE:
            self._disagree(wants, self.hear())

    def _disagree(self, mine: str, said: tuple) -> None:
        message = f"rank {self.rank} of {self.size} is {mine}, and rank 0 did something else: {_shown(said)}"
        self._fail(message)
        raise RankError(message)

    def _fail(self, message: str) -> None:
        self._heart.fail(message)
        self._abort()

    def _abort(self) -> None:
        """No rank waits for this one any more, nor this one for any."""
        if dist.get_backend(self._group) == "nccl" and not self._is_aborted:  # what waits in gloo looks by itself
            self._is_aborted = True
            # Beside: it may itself wait for the rank that is gone, and this one is to end whatever happens.
            abort = threading.Thread(target=self._group.abort, name="kv-abort", daemon=True)
            abort.start()
            atexit.register(abort.join, heartbeat.PATIENCE)  # an interpreter that ends within it dies of it

    def _wait(self, key: str, rank: int) -> bytes:
        """What `rank` writes under `key`, however long that takes, as long as it lives."""
        while True:
            self._heart.check()
            has_left = rank in self._heart.left
            try:
                self._store.wait([key], _LOOK_AGAIN)
                return self._store.get(key)
            except dist.DistStoreError:
                if has_left:
                    raise RankError(f"rank {rank} of {self.size} has ended, and rank {self.rank} has not") from None
            except dist.DistError as error:
                raise RankError(heartbeat.STORE_LOST) from error

    # --- once, not in a step

    def first(self, work: Callable[[], Found]) -> Found:
        if self.is_first:
            try:
                found = work()
            except Exception as error:
                self.tell("error", error)
                raise
            self.tell("value", found)
            return found
        said = self.hear()
        if said[0] not in ("value", "error"):
            self._disagree("to be told something", said)
        self.take()
        if said[0] == "error":
            raise said[1]
        return said[1]

    def all(self, value: Found) -> list[Found]:
        keys = [f"all/{self._num_exchanged}/{rank}" for rank in range(self.size)]
        self._num_exchanged += 1
        self._store.set(keys[self.rank], pickle.dumps(value))
        return [pickle.loads(self._wait(key, rank)) for rank, key in enumerate(keys)]


ALONE = Ranks()
_GROUPS: dict[str, Group] = {}


def ranks_of(model: LlamaForCausalLM) -> Ranks:
    """Those that hold `model`, by its weights: upstream leaves them as DTensors on a mesh of ranks.

    Raises:
        ValueError: the mesh has several dimensions of more than one rank.
    """
    weight = model.model.layers[0].self_attn.k_proj.weight
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.size() == 1:
        return ALONE
    if mesh.ndim != 1:
        raise ValueError(f"the weights are spread over {mesh}: strategies know tensor parallelism, over one dimension")
    group = mesh.get_group()
    if group.group_name not in _GROUPS:
        _GROUPS[group.group_name] = Group(group)
    return _GROUPS[group.group_name]


def _shown(said: Sequence[object]) -> str:
    text = " ".join(map(str, said))
    return text if len(text) <= 200 else f"{text[:200]} ..."
