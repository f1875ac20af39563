"""The questions asked of every strategy and of the native caches: memory, speed, correctness.

On the embedded model; on a GPU the speed of the Llama-2-7B shape as well. On a CPU it is to stay within a quarter of an
hour on two cores with a model of 135M parameters: a case costs 5 s before it begins, so what only shows the mechanism
is asked of the plain block pool alone.
"""

from __future__ import annotations

from bench.workload import Target


def speed_models(to: Target) -> list[str | None]:
    """What speed is measured of on a GPU: the embedded model and the Llama-2-7B shape, or what the user asked for."""
    if not to.on_gpu:
        return []
    return [to.model] if to.model else [None, "llama-2-7b-random"]
