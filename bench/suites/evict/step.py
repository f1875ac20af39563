"""A decode step behind prompts of which a part is kept, against paged rows of as many tokens."""

from __future__ import annotations

from bench import measure
from bench.case import Bench
from bench.markdown import milliseconds, of_each, table
from bench.suites.evict import GQA, MHA, evict_cases
from bench.systems import Capacity, filled, ours
from bench.workload import Claim, Workload, register


def run_step(bench: Bench) -> dict:
    """Contexts that nobody computed (`filled`): compaction and steps read as much, whatever the numbers are."""
    batch, context, keep, new_tokens = (bench.params[name] for name in ("batch", "context", "keep", "new_tokens"))
    sizes = {"paged": (int(context * keep), {}), "evict": (context, {"score": bench.params["score"], "keep": keep})}
    runs: dict[str, list[list[float]]] = {name: [] for name in sizes}
    for _ in range(bench.params["repeats"]):
        for name, (length, options) in sizes.items():
            bench.say(f"{name}: {batch} x {length}")
            system = ours(bench.model, name, Capacity([[length + new_tokens] * batch]), **options)
            prompts = bench.prompts([length] * batch, seed=1)
            with filled(system.strategy):
                system(prompts, 4)  # kernels compile, the graph is captured
                runs[name].append(measure.steady_steps(system(prompts, new_tokens).times))
            del system
            bench.free()
    found: dict[str, object] = {}
    for name, steps in runs.items():
        first = 2 if name == "evict" else 0  # compactions stand before them
        found[name] = measure.spread([step for run in steps for step in run[first:]])
    # All rows are compacted at once here, between their first and their second token.
    found["compaction"] = measure.spread([max(run[:2]) - found["evict"]["median"] for run in runs["evict"]])
    return found


SIZES = {"batch": 32, "context": 8192, "keep": 0.25, "new_tokens": 48, "score": "knorm", "repeats": 2}
ON_GPU = {GQA: SIZES, MHA: SIZES | {"batch": 8, "context": 8192}}
ON_CPU = {"batch": 4, "context": 512, "keep": 0.25, "new_tokens": 12, "score": "knorm", "repeats": 1}


def _table(result: dict) -> str:
    kept = int(result["context"] * result["keep"])
    rows = [
        [f"paged, {result['batch']} x {kept}", milliseconds(result["paged"], 3)],
        [f"evict, {result['batch']} x {result['context']}, keep {result['keep']}", milliseconds(result["evict"], 3)],
        ["compaction of all rows, beside a step", milliseconds(result["compaction"], 1)],
    ]
    return f"**A decode step, {result['score']}**\n\n" + table(["", "ms"], rows)


register(
    Workload(
        "evict step",
        run_step,
        "a decode step behind prompts of which a part is kept, against paged rows of as many tokens",
        cases={"evict": evict_cases(ON_GPU, ON_CPU)},
        tables=of_each("evict step", _table),
        claims=[
            Claim(
                "decode step, {batch} x {context}, keep {keep} / paged with as many tokens",
                "within 3 %", 1.03, lambda r: r["evict"]["median"] / r["paged"]["median"], "{:.3f}", at_most=True,
            )
        ],
    )
)  # fmt: skip
