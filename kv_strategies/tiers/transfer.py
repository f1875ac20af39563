"""Moving bytes between host and device: page-locked memory, side streams, and rows of it.

A device copies from page-locked ("pinned") memory by itself, at the full rate of the link and beside the model's work,
if the copy has a stream of its own. What must wait for what is said by marks: one stream leaves a mark, another waits
for it. On a CPU there is one memory and one order of things: the same calls, and nothing to wait for.
"""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import Tensor

Mark = torch.cuda.Event | None
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all devices


class Marks:
    """Marks of several devices as one: reached where all of them are."""

    def __init__(self, each: list[Mark]):
        self.each = each

    def query(self) -> bool:
        return all(mark is None or mark.query() for mark in self.each)

    def synchronize(self) -> None:
        for mark in self.each:
            if mark is not None:
                mark.synchronize()


class Lane:
    """A stream of a device: its own or, as the main lane, whichever is current."""

    def __init__(self, device: torch.device, *, main: bool = False):
        self.device = device
        self._stream = None if main or device.type != "cuda" else torch.cuda.Stream(device)

    @property
    def is_beside(self) -> bool:
        """Whether it works beside the host. If not, a copy has ended when the call returns, and marks are None."""
        return self.device.type == "cuda"

    @property
    def stream(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self.device)

    def __enter__(self) -> Lane:
        self._context = contextlib.nullcontext()
        if self.device.type == "cuda":
            self._context = torch.cuda.stream(self.stream)
        self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    def mark(self, *, timed: bool = False) -> Mark:
        """Where this lane has got to."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=timed)
        event.record(self.stream)
        return event

    def wait(self, *marks: Mark) -> None:
        """What comes next in this lane comes after the marks. The host goes on."""
        for mark in marks:
            if mark is not None:
                self.stream.wait_event(mark)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """target[:] = source, in this lane."""
        with self:
            target.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        """Wait, on the host, for all that it was given."""
        if self.device.type == "cuda":
            self.stream.synchronize()

    def uses(self, tensor: Tensor) -> None:
        """The tensor belongs to another lane: its memory is not to be reused before this one is done with it."""
        if self.device.type == "cuda":
            tensor.record_stream(self.stream)


def host_memory(*shape: int, device: torch.device) -> Tensor:
    """uint8 in host memory, page-locked where `device` is a GPU.

    Memory is locked in place: torch's own allocator of pinned memory rounds up to the next power of two.
    """
    memory = torch.empty(shape, dtype=torch.uint8)
    if device.type != "cuda" or not memory.numel():
        return memory
    cuda = torch.cuda.cudart()
    with torch.cuda.device(device):
        if cuda.cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE) != cuda.cudaError.success:
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device)  # the next launch reports the failure, and clears it
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    weakref.finalize(memory.untyped_storage(), cuda.cudaHostUnregister, memory.data_ptr())
    return memory


def copy_row(source: Tensor, row: int, target: Tensor, target_row: int) -> None:
    """target[:, target_row] = source[:, row], in the lane that has been entered.

    For memories [L, N, bytes] on its device or in page-locked memory.
    """
    if source.is_cuda and target.is_cuda:
        target[:, target_row].copy_(source[:, row])
    elif source.is_cuda or target.is_cuda or source.is_pinned():
        from ..kernels.blocks.triton_rows import copy_row as copy_on_gpu  # Triton is there only where a GPU is

        copy_on_gpu(source, row, target, target_row)
    else:
        target[:, target_row] = source[:, row]
