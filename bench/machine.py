"""What this machine is: the names, versions and commit of every result line. Its limits: `probes/limits.py`.

Nothing here names the host, its paths or its user.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


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
    about["instructions"] = torch.backends.cpu.get_cpu_capability()  # processors of one name differ in these
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

    found = {name: of(name) for name in ("torch", "triton")}
    # Of the tree that runs, which need not be the distribution that is installed beside it.
    found["transformers"] = transformers.__version__
    return {"python": platform.python_version(), **found, "cuda": torch.version.cuda}


def commit() -> dict:
    """The commit measured, and whether files beside the results differ from it, with a digest of how. `BENCH_COMMIT`
    names it where the tree came without its git history, or with another."""
    if named := os.environ.get("BENCH_COMMIT"):
        return {"commit": named, "dirty": None}
    try:
        head = _git("rev-parse", "--short=12", "HEAD").decode().strip()
        changed = _git("diff", "--no-ext-diff", "--binary", "HEAD", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": None}
    digest = {"changes": hashlib.sha256(changed).hexdigest()[:12]} if changed else {}
    return {"commit": head, "dirty": bool(changed)} | digest


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


def conditions(device: str) -> dict:
    """What stands beside every number: machine, versions and commit."""
    return {"machine": describe(device), "versions": versions(), **commit()}
