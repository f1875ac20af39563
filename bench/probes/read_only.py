"""A Triton sum that does nothing but read, for the read bandwidth of a GPU (torch's own sum may stay below it)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

TILE = 8192


@triton.jit
def _read_only(source_ptr, sums_ptr, num_tiles, TILE: tl.constexpr):
    total = tl.zeros([TILE], dtype=tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        total += tl.load(source_ptr + tile.to(tl.int64) * TILE + tl.arange(0, TILE))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def reader(source: torch.Tensor) -> Callable[[], object]:
    """A call that reads all whole tiles of `source` (float32, on a GPU) once."""
    num_programs = 8 * torch.cuda.get_device_properties(source.device).multi_processor_count
    sums = torch.empty(num_programs, dtype=torch.float32, device=source.device)
    return lambda: _read_only[(num_programs,)](source, sums, source.numel() // TILE, TILE=TILE, num_warps=8)
