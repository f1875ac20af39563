"""What this machine can do at best, in bytes/s: its memory read and copied, and each direction of the link to a GPU.

A decode step reads all weights and all KV once, so the read bandwidth is the floor its time is held against; offloading
is held against the link between host and device.
"""

from __future__ import annotations

import torch

from bench.measure import seconds


def limits(device: str, size: int | None = None) -> dict[str, float]:
    """Measured limits of the machine in bytes/s: `read` and `copy` (read plus write) of the device's memory and, on a
    GPU, `host_to_device` and `device_to_host` from pinned memory. The best of the repeats: a limit, not a typical run.

    `size` is the buffer in bytes, far larger than any cache: 4 GiB on a GPU, 1 GiB on a CPU unless told.
    """
    on_gpu = torch.device(device).type == "cuda"
    size = size or (4 << 30 if on_gpu else 1 << 30)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    readers = [lambda: source.sum()]
    if on_gpu:
        from bench.probes.read_only import reader

        readers.append(reader(source))
    read = max(size / seconds(reader, device)["min"] for reader in readers)
    target = torch.empty_like(source)
    found = {"read": read, "copy": 2 * size / seconds(lambda: target.copy_(source), device)["min"]}
    return found | (link(device, min(size, 1 << 30)) if on_gpu else {})


def link(device: str, size: int = 1 << 30) -> dict[str, float]:
    """Bytes/s between pinned host memory and a GPU, each way alone; the best of the repeats."""
    host = torch.ones(size // 4, dtype=torch.float32, pin_memory=True)
    there = torch.empty_like(host, device=device)
    num_bytes = host.numel() * 4
    return {
        "host_to_device": num_bytes / seconds(lambda: there.copy_(host, non_blocking=True), device)["min"],
        "device_to_host": num_bytes / seconds(lambda: host.copy_(there, non_blocking=True), device)["min"],
    }
