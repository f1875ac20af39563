"""What scoring and compaction hold up: the first token, and the second."""

from __future__ import annotations

from bench import measure
from bench.case import Bench
from bench.markdown import milliseconds, of_each, table
from bench.suites.evict import GQA, MHA, evict_cases
from bench.systems import Capacity, ours
from bench.workload import Claim, Workload, register


def run_first_token(bench: Bench) -> dict:
    """A prompt at a time, `repeats` times round. A row is compacted once its first token is out: the second waits."""
    context, keep, repeats = (bench.params[name] for name in ("context", "keep", "repeats"))
    systems = {"paged": ours(bench.model, "paged", Capacity([[context + 4]]))}
    for score in bench.params["scores"]:
        systems[score] = ours(bench.model, "evict", Capacity([[context + 4]]), score=score, keep=keep)
    times: dict[str, list[list[float]]] = {name: [] for name in systems}
    for repeat in range(repeats + 1):
        for name, system in systems.items():
            bench.say(f"{name}, {repeat + 1} of {repeats + 1}")
            run = system(bench.prompts([context], seed=repeat), 4)
            if repeat:  # kernels compile before, and a graph is captured
                times[name].append(run.times[0])
    return {
        name: {
            "first": measure.spread([row[0] for row in rows]),
            "second": measure.spread([row[1] for row in rows]),
            "later": measure.spread([row[3] - row[2] for row in rows]),
        }
        for name, rows in times.items()
    }


# Both pools of a prompt of 16384 tokens take 8.6 GB each of Llama-2-7B's shape.
ON_GPU = {"context": 16384, "keep": 0.25, "repeats": 5, "scores": ["knorm", "snapkv"]}
ON_CPU = {"context": 512, "keep": 0.25, "repeats": 2, "scores": ["knorm", "snapkv"]}


def _table(result: dict) -> str:
    rows = [
        [name, *(milliseconds(result[name][key], 1) for key in ("first", "second", "later"))]
        for name in ("paged", *result["scores"])
    ]
    title = f"**One prompt of {result['context']} tokens, keep {result['keep']}**\n\n"
    return title + table(["", "first token, ms", "second token, ms", "a later step, ms"], rows)


CLAIMS = [
    Claim(
        f"{score}: time to the first token, {{context}} tokens / paged",
        f"at most {bound}x",
        bound,
        lambda result, score=score: result[score]["first"]["median"] / result["paged"]["first"]["median"],
        "{:.3f}x",
        at_most=True,
    )
    for score, bound in (("snapkv", 1.05), ("knorm", 1.02))
]

register(
    Workload(
        "evict first token",
        run_first_token,
        "what scoring and compaction hold up: the first token, and the second",
        cases={"evict": evict_cases({MHA: ON_GPU, GQA: ON_GPU}, ON_CPU)},
        tables=of_each("evict first token", _table),
        claims=CLAIMS,
    )
)
