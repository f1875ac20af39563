"""What the launch of a kernel asks of the device it is for."""

from __future__ import annotations

from functools import cache

import torch


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for Triton's interpreter, which runs programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether kernels on this device can overlap (see `triton_overlap.py`): NVIDIA's from compute capability 9.0 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
