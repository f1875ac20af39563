"""Generated tokens over total time for a ragged batch; peak memory; how full the KV store is."""

from __future__ import annotations

from collections.abc import Iterable

from bench import measure
from bench.case import RAGGED_SEED, Bench, Case, ragged
from bench.lines import Found
from bench.markdown import NONE, table
from bench.suites.default import speed_models
from bench.systems import EVERY, EVERYTHING, NATIVE, PAGED_GENERATE, Capacity, expand
from bench.workload import Target, Workload, register


def run_throughput(bench: Bench) -> dict:
    lengths, new_tokens = bench.params["lengths"], bench.params["new_tokens"]
    capacity = Capacity([[n + new_tokens for n in lengths]])
    before = bench.allocated()
    system = bench.open(capacity)
    allocated = bench.allocated() - before  # what a native cache takes comes and goes with each call
    bench.say("warming up")
    system.warm_up(bench.prompts(lengths, seed=RAGGED_SEED), new_tokens)
    bench.free()
    bench.memory.start()
    times, count = [], 0
    least, most = bench.params["repeats"], bench.params.get("until_steady", 0)
    while len(times) < least or (len(times) < most and not measure.is_steady(times)):
        bench.say(f"repeat {len(times) + 1} of {max(least, most)}" + " at most" * (most > least))
        run = system(bench.prompts(lengths, seed=RAGGED_SEED + 1 + len(times)), new_tokens)
        times.append(run.seconds)
        count = run.num_tokens
    return {
        "requests": len(lengths),
        "prompt_tokens": sum(lengths),
        "generated_tokens": count,
        "seconds": measure.spread(times),
        "tokens_per_second": measure.spread([count / seconds for seconds in times]),
        "peak": bench.memory.read(),
        "kv": system.filling,
        "kv_allocated": allocated,
        **bench.model_bytes(),
    }


def cases(to: Target) -> Iterable[Case]:
    if not to.on_gpu:
        params = {"lengths": ragged(8, 16, 320), "new_tokens": 24, "repeats": 2}
        yield from to.each(EVERYTHING, "float32", params)
        return
    params = {"lengths": ragged(64, 100, 1024), "new_tokens": 256}
    for model in speed_models(to):
        for system in expand([EVERY, PAGED_GENERATE, *NATIVE]):
            repeats = {"repeats": 1 if system == "offloaded" else 3}  # minutes a run
            if system in NATIVE and system != "offloaded":  # a step of theirs takes what the host's Python takes
                repeats["until_steady"] = 9
            yield from to.each([system], "bfloat16", params | repeats, timeout=900, model=model)


def tables(found: Found, model: str) -> str:
    """How full the KV store was; the speed itself stands in the main table of the page."""
    return "\n\n".join(filter(None, (_memory(found, model, dtype) for dtype in found.dtypes("throughput", model))))


def _memory(found: Found, model: str, dtype: str) -> str:
    rows = []
    for system, line in found.of("throughput", model, dtype).items():
        result = line.get("result", {})
        kv = result.get("kv")
        if not kv:
            continue
        allocated = result.get("kv_allocated")
        rows.append(
            [
                system,
                f"{kv['bytes'] / 1e6:.1f}",
                f"{allocated / 1e6:.1f}" if allocated else NONE,
                f"{kv['bytes'] / result['parameter_bytes']:.2f}",
                str(kv["tokens"] or NONE),
                str(kv["places"]),
                f"{1 - kv['tokens'] / kv['places']:.1%}" if kv["tokens"] else NONE,
            ]
        )
    head = ["system", "KV memory (MB)", "by the allocator", "KV / weights", "tokens held", "token places", "wasted"]
    note = (
        "KV memory of the same batch at its fullest moment, on all tiers; by the allocator: what torch handed out "
        "for it, in MB; wasted: places that hold no token."
    )
    return f"**KV memory, {dtype}**\n\n{note}\n\n" + table(head, rows) if rows else ""


register(
    Workload(
        "throughput",
        run_throughput,
        "generated tokens over total time for a ragged batch; peak memory; how full the KV store is",
        cases={"default": cases},
        tables=tables,
        words=lambda result: (
            f"{result['tokens_per_second']['median']:.1f} tokens/s, peak {result['peak'] / 1e9:.2f} GB"
        ),
    )
)
