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

import hashlib
import os
import tempfile
import time
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..base import LowerTiers
from ..step.plan import Plan
from .transfer import Lane, Mark, copy_row, host_memory

_BOUNCE_BYTES = 256 << 20  # on the device, at most; and never more than so many blocks:
_MAX_BOUNCE = 32
#: Fewer new tokens say little about how fast a prompt is computed.
_MIN_TIMED_TOKENS = 32


class Tiers(LowerTiers):
    """Host memory for `num_blocks` idle blocks and, where given, a disk for those that it gives up.

    Args:
        memories: where the blocks of the pool lie: [L, N, bytes] uint8 each, of which block b is [:, b] of all.
        settle, touched: called before the memories are read, and after they are written, in the model's lane.
    """

    def __init__(
        self,
        memories: Sequence[Tensor],
        block_size: int,
        device: torch.device,
        num_blocks: int,
        rates: Rates,
        disk: Disk | None = None,
        settle: Callable[[], None] = lambda: None,
        touched: Callable[[], None] = lambda: None,
    ):
        self.rates = rates
        self.block_bytes = bytes_of(memories)
        self.num_promoted = self.num_refused = self.bytes_down = self.bytes_up = 0
        self.num_places = num_blocks + (disk.num_places if disk else 0)
        self._block_size, self._disk = block_size, disk
        self._host = host_memory(num_blocks, self.block_bytes, device=device)
        self._crossing = _Crossing(memories, device, self.rates, settle, touched)
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # in host memory, the longest unused first
        self._leaving: OrderedDict[bytes, tuple[_Kept, Future]] = OrderedDict()  # in host memory, being written to disk
        self._unwanted: deque[bytes] = deque()
        self._free: deque[tuple[int, Mark]] = deque((place, None) for place in range(num_blocks))  # free at the mark
        self._spare = max(1, min(8, num_blocks // 8))  # places freed ahead of need, while the disk writes beside

    # --- down

    def demote(self, key: bytes, block: int, tokens: bytes = b"") -> None:
        self._collect()
        if self._find(key) is not None:
            return  # a key names contents: what is kept is the same
        place = self._free_place()
        arrived = self._crossing.down(block, self._host[place])
        self._kept[key] = _Kept(tokens, place, arrived)
        self.bytes_down += self.block_bytes
        self._write_behind()

    def _free_place(self) -> int:
        if not self._free and not self._leaving:
            self._write_behind(wait=True)
        if not self._free and self._leaving:
            self._collect(wait=True)
        if not self._free:
            _, kept = self._kept.popitem(last=False)
            self._release(kept)
        place, mark = self._free.popleft()
        if mark is not None:
            mark.synchronize()
        return place

    def _release(self, kept: _Kept) -> None:
        self._free.append((kept.place, kept.arrived))

    def _write_behind(self, *, wait: bool = False) -> None:
        """Send the longest unused blocks to the disk, so that there is room in host memory when it is needed. A block
        must have arrived: the thread that writes may not ask the device, which a graph under capture forbids.
        """
        while self._disk and self._kept and len(self._free) + len(self._leaving) < self._spare:
            key, kept = next(iter(self._kept.items()))
            if kept.arrived is not None and not kept.arrived.query():
                if not wait:
                    return
                kept.arrived.synchronize()
            del self._kept[key]
            self._leaving[key] = kept, self._disk.write(key, kept.tokens, self._host[kept.place])

    def _collect(self, *, wait: bool = False) -> None:
        """Take back the places of what is not wanted, and of blocks that the disk has; wait for the first, if told."""
        while self._unwanted:
            self._forget(self._unwanted.popleft())
        while self._leaving and (wait or next(iter(self._leaving.values()))[1].done()):
            _, (kept, written) = self._leaving.popitem(last=False)
            self.rates.disk_write.learn(self.block_bytes, written.result())
            self._release(kept)
            wait = False

    # --- up

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

    def promote(self, key: bytes, block: int) -> bool:
        self._collect()
        if key in self._leaving:
            kept, written = self._leaving.pop(key)
            written.result()
            self._disk.discard(key)
            self._kept[key] = kept
        kept = self._kept.pop(key, None)
        if kept is None:
            place = self._free_place() if self._disk and key in self._disk else None
            seconds = self._disk.read(key, self._host[place]) if place is not None else None
            if seconds is None:
                if place is not None:
                    self._free.append((place, None))
                return False
            self.rates.disk_read.learn(self.block_bytes, seconds)
            kept = _Kept(b"", place, None)
        kept.arrived = self._crossing.up(self._host[kept.place], kept.arrived, block)
        self._release(kept)
        self.num_promoted += 1
        self.bytes_up += self.block_bytes
        return True

    # --- bookkeeping

    def _find(self, key: bytes) -> _Kept | None:
        """What is kept under a key, which becomes the most recently used; its place is -1 on disk."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key in self._leaving:
            return self._leaving[key][0]
        return self._disk.find(key) if self._disk else None

    def discard(self, key: bytes) -> None:
        self._unwanted.append(key)  # a finalizer may call this in the middle of anything

    def _forget(self, key: bytes) -> None:
        if key in self._leaving:
            kept, written = self._leaving.pop(key)
            written.result()
            self._release(kept)
        if key in self._kept:
            self._release(self._kept.pop(key))
        if self._disk:
            self._disk.discard(key)

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
            "tier_rates": self.rates.stats(),
        }


def bytes_of(memories: Sequence[Tensor]) -> int:
    """Bytes of one block."""
    return sum(memory.shape[0] * memory.shape[2] for memory in memories)


@dataclass
class _Kept:
    tokens: bytes
    place: int  # in host memory; -1 on disk
    arrived: Mark  # when the copy has ended


class _Crossing:
    """Between the pool and host memory, through bounce blocks on the device."""

    def __init__(self, memories, device: torch.device, rates: Rates, settle, touched):
        self._memories, self._rates, self._settle, self._touched = memories, rates, settle, touched
        block_bytes = bytes_of(memories)
        count = max(1, min(_MAX_BOUNCE, _BOUNCE_BYTES // block_bytes)) if device.type == "cuda" else 1
        self._bounce = torch.empty(count, block_bytes, dtype=torch.uint8, device=device)
        self._busy: list[Mark] = [None] * count
        self._next = 0
        self._main, self._down, self._up = Lane(device, main=True), Lane(device), Lane(device)
        self._timed: deque[tuple[Rate, Mark, Mark]] = deque()

    @property
    def num_bytes(self) -> int:
        return self._bounce.numel()

    def down(self, block: int, host: Tensor) -> Mark:
        """Copy a block to host memory [bytes]. The block is free at once, the host memory full at the mark."""
        at = self._take()
        self._main.wait(self._busy[at])
        self._settle()
        for memory, piece in self._pieces(at):
            copy_row(memory, block, piece, 0)
        ready = self._main.mark()
        self._busy[at] = self._copy(self._down, ready, self._bounce[at], host, self._rates.down)
        return self._busy[at]

    def up(self, host: Tensor, filled: Mark, block: int) -> Mark:
        """Fill a block from host memory [bytes], which is filled at one mark and free at the one returned. The model's
        lane waits for it to arrive.
        """
        at = self._take()
        self._up.wait(filled)
        arrived = self._copy(self._up, self._busy[at], host, self._bounce[at], self._rates.up)
        self._main.wait(arrived)
        for memory, piece in self._pieces(at):
            copy_row(piece, 0, memory, block)
        self._touched()
        self._busy[at] = self._main.mark()
        return arrived

    def _take(self) -> int:
        at, self._next = self._next, (self._next + 1) % len(self._busy)
        return at

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
        with lane:
            lane.wait(after)
            began = lane.mark(timed=True)
            target.copy_(source, non_blocking=True)
            ended = lane.mark(timed=True)
        if ended is None:
            rate.learn(source.numel(), time.perf_counter() - begin)
        else:
            self._timed.append((rate, began, ended))
        return ended


class Disk:
    """Blocks in one file, in places of equal size. It has no name, and dies with its owner; so checksums are in memory.

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
        self._file, self._handle, self._folder, self._block_bytes = file, file.fileno(), folder, block_bytes
        self._free = list(range(self.num_places))
        self._kept: OrderedDict[bytes, _OnDisk] = OrderedDict()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-disk")
        self._is_broken = False
        weakref.finalize(self, _close, self._writer, file)

    def write(self, key: bytes, tokens: bytes, data: Tensor) -> Future:
        """Start to write a block [bytes]; the future gives the seconds it took. The data must stay until then."""
        if not self._free:
            self._drop(next(iter(self._kept)))
        entry = _OnDisk(tokens, self._free.pop())
        self._kept[key] = entry
        return self._writer.submit(self._write, entry, data)

    def _write(self, entry: _OnDisk, data: Tensor) -> float:
        if self._is_broken:
            return 0.0
        begin, view, offset = time.perf_counter(), memoryview(data.numpy()), entry.slot * self._block_bytes
        checksum = _checksum(view)
        try:
            while view:
                written = os.pwrite(self._handle, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            self._is_broken = True
            warnings.warn(
                f"the disk tier in {self._folder} takes no more blocks ({error.strerror}); those it "
                "cannot take are computed again when they are needed",
                RuntimeWarning,
                stacklevel=2,
            )
            return 0.0
        entry.checksum = checksum
        return time.perf_counter() - begin

    def read(self, key: bytes, target: Tensor) -> float | None:
        """Take a block [bytes] off the disk. Returns the seconds it took, or None where it is damaged or was lost."""
        entry = self._kept[key]
        begin, view, count = time.perf_counter(), memoryview(target.numpy()), 0
        with suppress(OSError):
            while count < len(view):
                got = os.preadv(self._handle, [view[count:]], entry.slot * self._block_bytes + count)
                if not got:
                    break
                count += got
        is_sound = count == len(view) and _checksum(view) == entry.checksum
        if not is_sound and entry.checksum:
            self.num_damaged += 1
            warnings.warn(
                f"a block in {self._folder} is truncated or altered; it is computed again",
                RuntimeWarning,
                stacklevel=3,
            )
        self._drop(key)
        return time.perf_counter() - begin if is_sound else None

    def find(self, key: bytes) -> _Kept | None:
        entry = self._kept.get(key)
        if entry is None or not entry.checksum:
            return None
        self._kept.move_to_end(key)
        return _Kept(entry.tokens, -1, None)

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

    def _drop(self, key: bytes) -> None:
        """Forget a block; a write to its place that is under way ends before the next one there begins."""
        self._free.append(self._kept.pop(key).slot)


@dataclass
class _OnDisk:
    tokens: bytes
    slot: int
    checksum: bytes = b""  # empty until written, and where writing failed


def _checksum(data) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _close(writer: ThreadPoolExecutor, file: BinaryIO) -> None:
    writer.shutdown(wait=True, cancel_futures=True)
    file.close()


class Rate:
    """Units a second, learnt: recent measurements count more."""

    def __init__(self) -> None:
        self._seconds_per_unit: float | None = None

    def learn(self, units: float, seconds: float) -> None:
        if units > 0 and seconds > 0:
            new, old = seconds / units, self._seconds_per_unit
            self._seconds_per_unit = new if old is None else 0.8 * old + 0.2 * new

    def seconds(self, units: float) -> float:
        """0 where nothing is known yet."""
        return units * (self._seconds_per_unit or 0.0)

    @property
    def value(self) -> float | None:
        return None if self._seconds_per_unit is None else 1 / self._seconds_per_unit


@dataclass
class Rates:
    """What this machine does a second, as measured while it runs: bytes moved, tokens computed."""

    down: Rate = field(default_factory=Rate)
    up: Rate = field(default_factory=Rate)
    disk_read: Rate = field(default_factory=Rate)
    disk_write: Rate = field(default_factory=Rate)
    prefill: Rate = field(default_factory=Rate)

    def seconds_saved(self, num_bytes: int, num_tokens: int, *, on_disk: bool) -> float:
        """By fetching a block and not computing it; below 0 where computing is faster. Unmeasured, fetching wins."""
        if self.prefill.value is None:
            return 1e-9
        fetch = self.up.seconds(num_bytes) + (self.disk_read.seconds(num_bytes) if on_disk else 0.0)
        return self.prefill.seconds(num_tokens) - fetch

    def stats(self) -> dict[str, float | None]:
        return {name: rate.value for name, rate in vars(self).items()}


class PrefillClock:
    """How fast prompts are computed: the time from the first layer's attention to the last's, over their tokens."""

    def __init__(self, rate: Rate, device: torch.device, num_layers: int):
        self._rate, self._last_layer, self._lane = rate, num_layers - 1, Lane(device, main=True)
        self._began: tuple[Mark, float] | None = None
        self._timed: deque[tuple[int, Mark, Mark]] = deque()

    def open(self, layer_idx: int, plan: Plan) -> None:
        if layer_idx == 0:
            is_prompt = plan.num_tokens - plan.num_decodes >= _MIN_TIMED_TOKENS
            self._began = (self._lane.mark(timed=True), time.perf_counter()) if is_prompt else None

    def close(self, layer_idx: int, plan: Plan) -> None:
        if layer_idx != self._last_layer or self._began is None:
            return
        (mark, began), self._began = self._began, None
        if mark is None:
            self._rate.learn(plan.num_tokens, time.perf_counter() - began)
            return
        self._timed.append((plan.num_tokens, mark, self._lane.mark(timed=True)))
        while self._timed[0][2].query():
            num_tokens, mark, end = self._timed.popleft()
            self._rate.learn(num_tokens, mark.elapsed_time(end) / 1e3)
            if not self._timed:
                break


def main() -> None:
    pool = torch.arange(8, dtype=torch.uint8).repeat_interleave(4096).view(1, 8, 4096)  # block b is full of b
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(folder, 4 * 4096, 4096)
        tiers = Tiers([pool], 16, torch.device("cpu"), num_blocks=2, rates=Rates(), disk=disk)
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
