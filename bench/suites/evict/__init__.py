"""What evict is for: a prompt that leaves a quarter of its blocks, and all that follows from it, against paged.

Both sides of a ratio ran in one process, on the same weights: the Llama-2-7B shape and the 8B shape with grouped heads
on a GPU, the embedded model on a CPU. What a score loses is in the suite `cost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bench.case import Case
from bench.workload import Target

MHA, GQA = "llama-2-7b-random", "llama-3.1-8b-random"


def evict_cases(on_gpu: dict[str, dict], on_cpu: dict, timeout: int = 550) -> Callable[[Target], Iterable[Case]]:
    """A case for each model of `on_gpu` and its sizes, or of the first ones on what the user asked for."""

    def cases(to: Target) -> Iterable[Case]:
        if not to.on_gpu:
            yield to.case("evict", "float32", on_cpu, timeout=timeout)
            return
        by_model = {to.model: on_gpu.get(to.model, next(iter(on_gpu.values())))} if to.model else on_gpu
        for model, sizes in by_model.items():
            yield to.case("evict", "bfloat16", sizes, timeout=timeout, model=model)

    return cases
