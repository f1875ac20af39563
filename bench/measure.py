"""Timing and memory: the few helpers every case measures with.

Times are seconds of `time.perf_counter` around a synchronised device, or CUDA events where the work is short. Speed is
the median of repeats after a warm-up, with the smallest and largest beside it. Peak memory is
`torch.cuda.max_memory_allocated` on a GPU and the peak resident size of the process on a CPU, which is why every case
runs in a process of its own.
"""

from __future__ import annotations

import re
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch


def synchronize(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeats, and how many there were."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def is_steady(values: Sequence[float], within: float = 0.05) -> bool:
    """Whether the last of at least three repeats moved their median by no more than this share of it."""
    if len(values) < 3:
        return False
    before, now = statistics.median(values[:-1]), statistics.median(values)
    return abs(before - now) <= within * now


def seconds(
    work: Callable[[], object], device: str | torch.device, repeats: int = 5, warmup: int = 1
) -> dict[str, float]:
    """Times `work()` `repeats` times. CUDA events on a GPU: they leave out the time Python needs to start the work."""
    for _ in range(warmup):
        work()
    synchronize(device)
    times = []
    for _ in range(repeats):
        if torch.device(device).type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return spread(times)


class PeakMemory:
    """Peak bytes between `start()` and `read()`: allocated on the GPU, or resident in this process on a CPU."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            # Linux resets a process's peak when told so. Where that is refused, the peak since the start stands.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            if found:
                return int(found[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def steady_steps(times: Sequence[Sequence[float]]) -> list[float]:
    """Durations of the steps in which every request was decoding: no prefill in them, and no request yet done.

    `times[r]` are the moments at which the tokens of request r came. Of all requests, the one that started last shows
    the steps; they count from its first token until the first request to finish has its last.
    """
    begin, end = max(row[0] for row in times), min(row[-1] for row in times)
    last = max(times, key=lambda row: row[0])
    return [b - a for a, b in pairwise(last) if a >= begin and b <= end]


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights one decode step reads: all, but of an input embedding of its own only the rows looked up."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())  # a tied weight is listed once
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total if embedding is head else total - embedding.numel() * embedding.element_size()


def kv_bytes_per_token(model: torch.nn.Module) -> int:
    """Bytes of K and V one token takes in all layers, unquantised."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize


def num_same(token_ids: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> int:
    return sum(list(got) == list(want) for got, want in zip(token_ids, expected, strict=True))


def attempt(work: Callable[[], dict]) -> dict:
    """What `work` found, or why it failed."""
    try:
        return work()
    except Exception as error:
        return {"error": reason(error)[:200]}


def reason(error: BaseException) -> str:
    """An error on one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
