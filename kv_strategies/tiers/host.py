"""Tiers: where the contents of idle blocks go when the pool gives them to others.

    device pool   ->  host memory  ->  disk            a block that is given up moves down,
                  <-               <-                  and comes back up when somebody asks for it

A block is idle when no request uses it: a prefix that is kept for later requests, or the blocks of a preempted request.
To give it up is to compute it again some day, unless a copy of its bytes is fetched faster than that. How fast each is,
is measured as it happens (`Rates`), and a block is fetched only where it pays.

Saves: the time to first token of prompts that come back after the pool has forgotten them (CachedAttention, Gao et al.,
USENIX ATC 2024, arXiv 2403.19708; Mooncake, Qin et al., FAST 2025, arXiv 2407.00079). Costs: host memory, disk, and
traffic on the link, which the model's work hides as far as it can: a copy goes through a few *bounce* blocks on the
device, so that a block is free at once, and the model need not wait for the link nor the link for the model.

Lossless: what comes back is what went down, to the bit. A block on disk has a checksum; one that fails it is forgotten,
and computed again. So is what a full or broken disk could not take, after one warning.

    python -m kv_strategies.tiers.host      sends blocks down and brings them back
"""

from __future__ import annotations

import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..step.interrupts import uninterrupted
from .disk import Disk
from .lower import LowerTiers
from .rates import Rate, Rates
from .transfer import Lane, Mark, Marks, copy_row, host_memory

_BOUNCE_BYTES = 256 << 20  # on the device, at most; and never more than so many blocks:
_MAX_BOUNCE = 32


class Tiers(LowerTiers):
    """Host memory for `num_blocks` idle blocks and, where given, a disk for those that it gives up.

    Args:
        homes: where the blocks of the pool lie, a piece of each on every device of the model.
    """

    def __init__(self, homes: Sequence[Home], block_size: int, num_blocks: int, rates: Rates, disk: Disk | None = None):
        self.rates = rates
        self.block_bytes = sum(home.block_bytes for home in homes)
        self.num_promoted = self.num_refused = self.bytes_down = self.bytes_up = 0
        self.num_places = num_blocks + (disk.num_places if disk else 0)
        self._block_size, self._disk = block_size, disk
        self._host = host_memory(num_blocks, self.block_bytes, device=homes[0].device)
        self._crossing = _Crossings(homes, rates)
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # in host memory, the longest unused first
        self._leaving: OrderedDict[bytes, tuple[_Kept, Future]] = OrderedDict()  # in host memory, being written to disk
        self._unwanted: deque[bytes] = deque()
        self._free: deque[tuple[int, Mark]] = deque((place, None) for place in range(num_blocks))  # free at the mark
        self._spare = max(1, min(8, num_blocks // 8))  # places freed ahead of need, while the disk writes beside

    # --- down

    @uninterrupted()
    def demote(self, key: bytes, block: int, tokens: bytes = b"") -> bool:
        self._collect()
        if self._find(key) is not None:
            return True  # a key names contents: what is kept is the same
        place = self._free_place()
        try:
            arrived = self._crossing.down(block, self._host[place])
        except BaseException:
            self._free.append((place, None))
            raise
        self._kept[key] = _Kept(tokens, place, arrived)
        self.bytes_down += self.block_bytes
        self._write_behind()
        return True

    def _free_place(self) -> int:
        if not self._free and not self._leaving:
            self._write_behind(wait=True)
        if not self._free and self._leaving:
            self._collect(wait=True)
        if not self._free:
            _, kept = self._kept.popitem(last=False)
            self._release(kept)
        _, mark = self._free[0]
        if mark is not None:
            mark.synchronize()
        return self._free.popleft()[0]

    def _release(self, kept: _Kept) -> None:
        self._free.append((kept.place, kept.arrived))

    @property
    def _lacks_places(self) -> bool:
        return self._disk is not None and len(self._free) + len(self._leaving) < self._spare

    def _write_behind(self, *, wait: bool = False) -> None:
        """Send the longest unused blocks to the disk, so that there is room in host memory when it is needed. A block
        must have arrived: the thread that writes may not ask the device, which a graph under capture forbids.
        """
        while self._kept and self._lacks_places and self._disk.takes_blocks:
            key, kept = next(iter(self._kept.items()))
            if kept.arrived is not None and not kept.arrived.query():
                if not wait and self.rates.decide:
                    return
                kept.arrived.synchronize()
            written = self._disk.write(key, kept.tokens, self._host[kept.place])
            self._leaving[key] = self._kept.pop(key), written

    def _collect(self, *, wait: bool = False) -> None:
        """Take back the places of what is not wanted, and of blocks that the disk has; wait for the first, if told."""
        while self._unwanted:
            self._forget(self._unwanted[0])
            self._unwanted.popleft()
        while self._leaving and (wait or next(iter(self._leaving.values()))[1].done()):
            key = next(iter(self._leaving))
            kept, seconds = self._end_write(key)
            if seconds:
                self.rates.disk_write.learn(self.block_bytes, seconds)
            else:
                self._disk.discard(key)
            self._release(kept)
            wait = False

    def _end_write(self, key: bytes) -> tuple[_Kept, float]:
        """Wait until the disk is done with a block, which is then nowhere but in its place here, and perhaps there.
        Returns it, and the seconds it took; 0 where it has failed.
        """
        kept, written = self._leaving[key]
        try:
            seconds = written.result()
        except Exception as error:
            self.report(error)
            seconds = 0.0
        del self._leaving[key]
        return kept, seconds

    # --- up

    @uninterrupted()
    def num_promotable(self, wanted: Iterable[tuple[bytes, bytes]]) -> int:
        """The number of leading blocks that saves most: a block too slow to fetch may lead to others that are not."""
        self._collect()
        best, best_saved, saved = 0, 0.0, 0.0
        for count, (key, tokens) in enumerate(wanted, start=1):
            kept = self._find(key)
            if kept is None or kept.tokens != tokens:
                break
            saved += self.rates.seconds_saved(self.block_bytes, self._block_size, on_disk=kept.place < 0)
            if saved > best_saved:
                best, best_saved = count, saved
        if not best and saved < 0:
            self.num_refused += 1
        return best

    @uninterrupted()
    def promote(self, key: bytes, block: int) -> bool:
        self._collect()
        if key in self._leaving:
            self._kept[key], _ = self._end_write(key)
            self._disk.discard(key)
        if key not in self._kept and not self._lift(key):
            return False
        kept = self._kept[key]
        arrived = self._crossing.up(self._host[kept.place], kept.arrived, block)
        del self._kept[key]
        self._free.append((kept.place, arrived))
        self.num_promoted += 1
        self.bytes_up += self.block_bytes
        return True

    def _lift(self, key: bytes) -> bool:
        """Bring a block from disk to host memory. False where it has been lost."""
        if not self._disk or key not in self._disk:
            return False
        tokens = self._disk.find(key) or b""
        with self._disk.holding(key):  # room is made at the cost of others
            place = self._free_place()
            try:
                seconds = self._disk.read(key, self._host[place])
            except BaseException:
                self._free.append((place, None))
                raise
        if seconds is None:
            self._free.append((place, None))
            return False
        self.rates.disk_read.learn(self.block_bytes, seconds)
        self._kept[key] = _Kept(tokens, place, None)
        return True

    # --- bookkeeping

    def _find(self, key: bytes) -> _Kept | None:
        """What is kept under a key, which becomes the most recently used; its place is -1 on disk."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key in self._leaving:
            self._disk.touch(key)
            return self._leaving[key][0]
        tokens = self._disk.find(key) if self._disk else None
        return None if tokens is None else _Kept(tokens, -1, None)

    def discard(self, key: bytes) -> None:
        self._unwanted.append(key)  # a finalizer may call this in the middle of anything

    def _forget(self, key: bytes) -> None:
        if key in self._leaving:
            self._release(self._end_write(key)[0])
        if key in self._kept:
            self._release(self._kept.pop(key))
        if self._disk:
            self._disk.discard(key)

    @uninterrupted()
    def clear(self) -> None:
        while self._leaving:
            self._collect(wait=True)
        for key in list(self._kept):
            self._forget(key)
        if self._disk:
            self._disk.clear()

    @property
    def device_bytes(self) -> int:
        return self._crossing.num_bytes

    @property
    def host_bytes(self) -> int:
        return self._host.numel()

    def check_integrity(self) -> None:
        held = [*self._kept.values(), *(kept for kept, _ in self._leaving.values())]
        places = [place for place, _ in self._free] + [kept.place for kept in held]
        assert sorted(places) == list(range(len(self._host))), "a place in host memory is lost, or taken twice"
        assert not self._kept.keys() & self._leaving.keys(), "a block is in host memory twice"
        if self._disk:
            assert not any(key in self._disk for key in self._kept), "a block is in host memory and on disk"
            self._disk.check_integrity()

    @uninterrupted()
    def stats(self) -> dict[str, object]:
        self._collect()
        return {
            "tier_blocks": {
                "host": len(self._kept) + len(self._leaving),
                **({"disk": self._disk.num_blocks} if self._disk else {}),
            },
            "tier_bytes_down": self.bytes_down,
            "tier_bytes_up": self.bytes_up,
            "tier_blocks_promoted": self.num_promoted,
            "tier_fetches_refused": self.num_refused,
            "tier_blocks_damaged": self._disk.num_damaged if self._disk else 0,
            "tier_copies_failed": self.num_failed,
            "tier_rates": self.rates.stats(),
        }


@dataclass(frozen=True)
class Home:
    """Where the blocks of the pool lie on one device: in memories [L, N, bytes] uint8, of which block b is [:, b] of
    each.

    `settle` and `touched` are called before they are read, and after they are written, in the model's lane.
    """

    memories: Sequence[Tensor]
    device: torch.device
    settle: Callable[[], None] = lambda: None
    touched: Callable[[], None] = lambda: None

    @property
    def block_bytes(self) -> int:
        """Bytes of one block here."""
        return sum(memory.shape[0] * memory.shape[2] for memory in self.memories)


@dataclass
class _Kept:
    tokens: bytes
    place: int  # in host memory; -1 on disk
    arrived: Mark | Marks  # when the copy has ended


class _Crossings:
    """Between the pool and host memory, where a block is the pieces of all devices, one behind the other."""

    def __init__(self, homes: Sequence[Home], rates: Rates):
        ends = pairwise(accumulate((home.block_bytes for home in homes), initial=0))
        self._each = [(_Crossing(home, rates), slice(*end)) for home, end in zip(homes, ends, strict=True)]

    @property
    def num_bytes(self) -> int:
        return sum(crossing.num_bytes for crossing, _ in self._each)

    def down(self, block: int, host: Tensor) -> Mark | Marks:
        """See `_Crossing`."""
        return _joined(crossing.down(block, host[piece]) for crossing, piece in self._each)

    def up(self, host: Tensor, filled: Mark | Marks, block: int) -> Mark | Marks:
        """See `_Crossing`."""
        marks = filled.each if isinstance(filled, Marks) else [filled] * len(self._each)
        each = zip(self._each, marks, strict=True)
        return _joined(crossing.up(host[piece], mark, block) for (crossing, piece), mark in each)


def _joined(copies: Iterable[Mark]) -> Mark | Marks:
    """What stands for all of these copies, which begin here; where one fails, none is under way afterwards."""
    marks = []
    try:
        for mark in copies:
            marks.append(mark)
    except BaseException:
        Marks(marks).synchronize()
        raise
    return marks[0] if len(marks) == 1 else Marks(marks)


class _Crossing:
    """Between the pool and host memory, through bounce blocks on the device."""

    def __init__(self, home: Home, rates: Rates):
        self._memories, self._rates, self._settle, self._touched = home.memories, rates, home.settle, home.touched
        block_bytes, device = home.block_bytes, home.device
        self._main, self._down, self._up = Lane(device, main=True), Lane(device), Lane(device)
        count = max(1, min(_MAX_BOUNCE, _BOUNCE_BYTES // block_bytes)) if self._down.is_beside else 1
        self._bounce = torch.empty(count, block_bytes, dtype=torch.uint8, device=device)
        self._busy: list[Mark] = [None] * count
        self._next = 0
        self._timed: deque[tuple[Rate, Mark, Mark]] = deque()

    @property
    def num_bytes(self) -> int:
        return self._bounce.numel()

    def down(self, block: int, host: Tensor) -> Mark:
        """Copy a block to host memory [bytes]. The block is free at once, the host memory full at the mark."""
        with self._next_bounce() as at:
            self._main.wait(self._busy[at])
            self._settle()
            with self._main:
                for memory, piece in self._pieces(at):
                    copy_row(memory, block, piece, 0)
            ready = self._main.mark()
            self._busy[at] = self._copy(self._down, ready, self._bounce[at], host, self._rates.down)
        return self._busy[at]

    def up(self, host: Tensor, filled: Mark, block: int) -> Mark:
        """Fill a block from host memory [bytes], which is filled at one mark and free at the one returned. The model's
        lane waits for it to arrive.
        """
        with self._next_bounce() as at:
            self._up.wait(filled)
            arrived = self._copy(self._up, self._busy[at], host, self._bounce[at], self._rates.up)
            self._main.wait(arrived)
            with self._main:
                for memory, piece in self._pieces(at):
                    copy_row(piece, 0, memory, block)
            self._touched()
            self._busy[at] = self._main.mark()
        return arrived

    @contextmanager
    def _next_bounce(self) -> Iterator[int]:
        """A bounce block to copy through. Where that fails, nothing is under way afterwards to or from any memory."""
        at, self._next = self._next, (self._next + 1) % len(self._busy)
        try:
            yield at
        except BaseException:
            self._busy[at] = None
            for lane in (self._main, self._down, self._up):
                with suppress(RuntimeError):  # the error that this is about, told again
                    lane.synchronize()
            raise

    def _pieces(self, at: int):
        begin = 0
        for memory in self._memories:
            size = memory.shape[0] * memory.shape[2]
            yield memory, self._bounce[at, begin : begin + size].view(memory.shape[0], 1, memory.shape[2])
            begin += size

    def _copy(self, lane: Lane, after: Mark, source: Tensor, target: Tensor, rate: Rate) -> Mark:
        while self._timed and self._timed[0][2].query():
            done, began, ended = self._timed.popleft()
            done.learn(source.numel(), began.elapsed_time(ended) / 1e3)
        begin = time.perf_counter()
        lane.wait(after)
        began = lane.mark(timed=True)
        lane.copy(source, target)
        ended = lane.mark(timed=True)
        if ended is None:
            rate.learn(source.numel(), time.perf_counter() - begin)
        else:
            self._timed.append((rate, began, ended))
        return ended


def main() -> None:
    pool = torch.arange(8, dtype=torch.uint8).repeat_interleave(4096).view(1, 8, 4096)  # block b is full of b
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(folder, 4 * 4096, 4096)
        tiers = Tiers([Home([pool], torch.device("cpu"))], 16, num_blocks=2, rates=Rates(), disk=disk)
        print("A pool of 8 blocks, host memory for 2 and disk for 4 idle ones.\n")
        for block in range(8):
            tiers.demote(bytes([block]), block)
            tiers._collect(wait=True)  # else the disk writes beside
            host = [key[0] for key in [*tiers._kept, *tiers._leaving]]
            print(f"block {block} is given up      host {host!s:<10} disk {[key[0] for key in disk._kept]}")
        pool.zero_()
        kept = [key for key in range(8) if tiers.num_promotable([(bytes([key]), b"")])]
        print(f"\nIts memory is overwritten; blocks {kept} can be brought back, the others must be computed again.")
        for key in kept:
            tiers.promote(bytes([key]), key)
        print("The pool afterwards:", pool[0, :, 0].tolist())
        down, up = tiers.bytes_down, tiers.bytes_up
        print(f"{down} bytes went down and {up} came up, at {tiers.rates.up.value / 1e9:.1f} GB/s; "
              f"the disk reads {tiers.rates.disk_read.value / 1e9:.1f} GB/s.")  # fmt: skip


if __name__ == "__main__":
    main()
