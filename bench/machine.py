"""What this machine is and what it can do: names and versions for every result line, and its measured limits.

A decode step reads all weights and all KV once, so the bandwidth measured here is the floor its time is held against;
offloading is held against the link between host and device. Nothing here names the host, its paths or its user.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.measure import seconds

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: str) -> dict:
    """Names of the processor and the device, without the host's."""
    about = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"gpu": properties.name, "gpu_memory": properties.total_memory}
    return about


def device_name(device: str) -> str:
    """The name results are filed under: "cpu", or the GPU's own name in small letters and dashes."""
    if torch.device(device).type != "cuda":
        return "cpu"
    return "-".join(torch.cuda.get_device_name(device).lower().split())


def versions() -> dict[str, str | None]:
    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    found = {name: of(name) for name in ("torch", "triton", "transformers")}
    return {"python": platform.python_version(), **found, "cuda": torch.version.cuda}


def commit() -> dict:
    """The commit measured, and whether files beside the results differ from it. `BENCH_COMMIT` names it where the tree
    came without its git history, or with another."""
    if named := os.environ.get("BENCH_COMMIT"):
        return {"commit": named, "dirty": None}
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        return {"commit": head, "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": None}


def conditions(device: str) -> dict:
    """What stands beside every number: machine, versions and commit."""
    return {"machine": describe(device), "versions": versions(), **commit()}


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
        from bench.read_only import reader

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
