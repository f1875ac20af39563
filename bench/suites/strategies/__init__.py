"""What each strategy is for, measured beside what it replaces, and held against what it must reach.

Everything that is compared within a workload ran in the same process (but for long generation, whose peaks are those of
one system alone), on the same weights: the Llama-2-7B shape on a GPU, the embedded model on a CPU. Random prompts and a
random seed a repeat: nothing is found computed that should not be.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.case import Case
from bench.workload import Target


def shape_cases(system: str, on_gpu: dict, on_cpu: dict) -> Callable[[Target], list[Case]]:
    """One case of a system, of these sizes."""

    def cases(to: Target) -> list[Case]:
        if to.on_gpu:
            return [to.case(system, "bfloat16", on_gpu, timeout=550, model=to.model or "llama-2-7b-random")]
        return [to.case(system, "float32", on_cpu, timeout=550)]

    return cases
