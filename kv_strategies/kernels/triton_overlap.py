"""Consecutive kernels that overlap (programmatic dependent launch, CUDA C++ Programming Guide).

A kernel launched so may start before the one ahead of it has ended: once all programs of that one have said that they
may be followed, or have ended. Its programs take what room is left, do what depends on nobody, and wait.

    kernel n      |-- begins --|------ works ------| followed() |-- last of the work --|
    kernel n + 1                                                |-- first weights --|  | waited() |-- works ------|

One rule makes this safe, whatever the order of kernels, and a kernel that is launched with it has to keep it:

    Before `waited`, no program writes anything, nor reads anything but what no kernel of the step writes: weights, the
    block tables, slots and lengths that the host has copied, and K and V of earlier steps. And every program waits.

Then the end of a kernel means the end of all before it, so what is read after `waited` is there (also two kernels on),
and what is overwritten after it (a residual, parts in a workspace, memory that the allocator gives again) has no reader
left. Kernels launched the ordinary way, torch's own among them, wait for all of their predecessor and need no rule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_device import can_overlap


def overlapping(device: torch.device) -> dict[str, bool]:
    """What a launch takes beside its arguments, for a kernel with a parameter OVERLAP: tl.constexpr."""
    return {"OVERLAP": True, "launch_pdl": True} if can_overlap(device) else {"OVERLAP": False}


@triton.jit
def followed(OVERLAP: tl.constexpr):
    """The next kernel may take what room there is, as soon as all programs have said so."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def waited(OVERLAP: tl.constexpr):
    """All that earlier kernels have written is there from here on."""
    if OVERLAP:
        gdc_wait()
