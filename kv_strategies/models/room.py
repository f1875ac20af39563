"""Room: whether the weights of a model find memory, asked before they are read and not by a process that is killed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_NARROWER = (torch.bfloat16, torch.float16)


class NoRoom(ValueError):
    """The weights do not fit: how much they take, what is free, and in which dtypes they would fit."""

    def __init__(self, spec: str, num_weights: int, dtype: torch.dtype, device: torch.device, free: int):
        self.spec, self.free = spec, free
        narrower = [other for other in _NARROWER if other.itemsize < dtype.itemsize]
        self.dtypes = [_name(other) for other in narrower if num_weights * other.itemsize <= free]
        told = (
            f"{spec} takes {_gb(num_weights * dtype.itemsize)} in {_name(dtype)}, and {_gb(free)} of {device} memory "
            "are free"
        )
        if self.dtypes:
            told += f"; in {' or '.join(self.dtypes)} it takes {_gb(num_weights * narrower[0].itemsize)}, which fits"
        elif narrower:
            told += f"; nor does it fit in {_name(narrower[0])}, which takes {_gb(num_weights * narrower[0].itemsize)}"
        else:
            told += "; it would have to be spread over several devices (device_map='auto'), or be a smaller model"
        super().__init__(told)


def num_weights(config: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())


def check_room(spec: str, num_weights: int, dtype: torch.dtype, *places: torch.device) -> None:
    """Raises NoRoom where one of these places, each of which is to hold so many weights, has no room."""
    for place in dict.fromkeys(places):
        free = free_bytes(place)
        if free is not None and num_weights * dtype.itemsize > free:
            raise NoRoom(spec, num_weights, dtype, place, free)


def free_bytes(device: torch.device) -> int | None:
    """What could be allocated, caches of files counted as free; None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    told = [free for free in (_free_of_the_host(), _free_of_the_container()) if free is not None]
    return min(told, default=None)


def _free_of_the_host() -> int | None:
    try:
        return int(_lines("/proc/meminfo")["MemAvailable:"]) << 10
    except (OSError, KeyError, ValueError):
        return None


def _free_of_the_container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a control group still grants (both versions): beyond it processes are killed, whatever the host has."""
    for folder, limit, used in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            granted = int((folder / limit).read_text())  # "max" where there is no limit
            reclaimable = int(_lines(folder / "memory.stat")["inactive_file"])
            return max(0, granted - int((folder / used).read_text()) + reclaimable)
        except (OSError, KeyError, ValueError):
            continue
    return None


def _lines(path: str | Path) -> dict[str, str]:
    return dict(line.split()[:2] for line in Path(path).read_text().splitlines())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
