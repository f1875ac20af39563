"""Questions that people bring, each answered from the result lines of one machine.

An answer is a function of what a machine measured. It returns None where that holds no answer, and says less where only
a part of it was measured. One more is one function and one entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.report.answers.accuracy import eight_bits, full_precision
from bench.report.answers.measured import Answer, Measured
from bench.report.answers.memory import (
    growing_or_fixed,
    kv_and_parameters,
    mapping_or_copying,
    out_of_memory,
    peak_and_card,
)
from bench.report.answers.prompts import best_batch, more_at_once, padded_or_ragged, preload
from bench.report.answers.steps import busy, kv_access, length, step_time


@dataclass(frozen=True)
class Question:
    asked: str
    answer: Callable[[Measured], Answer | None]
    workloads: Sequence[str]  # that it looks at; the first measures it


QUESTIONS = [
    Question("How large should the cache be at first, and grow or be fixed?", growing_or_fixed, ["throughput", "pool"]),
    Question(
        "Requests that begin alike: map the same blocks, or copy them?", mapping_or_copying, ["fan-out", "sharing"]
    ),
    Question(
        "What happens when memory runs out: host memory, disk, computing again? How often, how slow?",
        out_of_memory,
        ["pool", "pressure", "batching"],
    ),
    Question("A batch: padded, or ragged?", padded_or_ragged, ["throughput"]),
    Question("What does preloading the start of a prompt bring?", preload, ["prefix"]),
    Question("Do 8 bits cost accuracy?", eight_bits, ["cost", "8 bits"]),
    Question("How many bytes are K and V beside the parameters?", kv_and_parameters, ["throughput"]),
    Question("Is a step under 100 ms, and what is it made of?", step_time, ["context", "profile"]),
    Question("Is access to K and V the bottleneck?", kv_access, ["context", "batch", "decode"]),
    Question("Is the GPU busy more than 80 % of the time?", busy, ["profile", "busy"]),
    Question("How near does the peak come to the card's memory?", peak_and_card, ["throughput", "batching"]),
    Question("Which batch size is best?", best_batch, ["concurrency", "batch"]),
    Question("What do more requests at once bring?", more_at_once, ["concurrency"]),
    Question("How does throughput change with length?", length, ["context"]),
    Question("How far are results from those of full precision?", full_precision, ["accuracy"]),
]
