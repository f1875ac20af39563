"""Blocks that samples of one prompt share; under `generate()`, whether prompts sent twice are computed twice."""

from __future__ import annotations

from collections.abc import Iterable

from bench.case import RAGGED_SEED, Bench, Case, is_random
from bench.lines import Found
from bench.markdown import by_system
from bench.systems import DOOR, EVERY, NATIVE_CACHES, PAGED_GENERATE, Capacity
from bench.workload import Target, Workload, register


def run_sharing(bench: Bench) -> dict:
    """Blocks in use by samples of one prompt. Under `generate()`, the share of prompt tokens that a second call with
    the same prompts does not compute: the model's forward is watched, since nothing says so."""
    lengths = bench.params["lengths"]
    prompts = bench.prompts(lengths, seed=RAGGED_SEED)
    if bench.case.system in NATIVE_CACHES or bench.case.system.endswith(DOOR):
        system = bench.open(Capacity([[n + 1 for n in lengths]]))
        computed = []
        hook = bench.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: computed.append((args or list(kwargs.values()))[0].numel()), with_kwargs=True
        )
        for prompt in prompts * 2:
            system([prompt], 1)
        hook.remove()
        return {"hit_rate": 1 - sum(computed[len(prompts) :]) / sum(lengths)}
    new_tokens, samples, longest = bench.params["new_tokens"], bench.params["samples"], max(prompts, key=len)
    system = bench.open(Capacity([[len(longest) + new_tokens] * samples]))
    bench.say("one sample")
    apart = _blocks_used(system, longest, 1, new_tokens) * samples
    system.strategy.reset()
    bench.say(f"{samples} samples")
    together = _blocks_used(system, longest, samples, new_tokens)
    return {"samples": samples, "blocks_together": together, "blocks_apart": apart}


def _blocks_used(system, prompt: list[int], samples: int, new_tokens: int) -> int:
    """The most blocks in use at a time while `samples` continuations of one prompt are drawn."""
    from kv_strategies import Request

    request = Request(prompt, max_new_tokens=new_tokens, n=samples, temperature=1.0, seed=0)
    return max(system.strategy.stats()["blocks_used"] for _ in system.runner.stream([request]))


def cases(to: Target) -> Iterable[Case]:
    if to.on_gpu and is_random(to.model):
        return
    params = {"lengths": [64, 200], "new_tokens": 8, "samples": 4}
    yield from to.each(["baseline", EVERY if to.on_gpu else "paged", PAGED_GENERATE], "float32", params)


def tables(found: Found, model: str) -> str:
    """The samples; hit rates stand in the main table of the page."""
    lines = {
        system: line for system, line in found.of("sharing", model).items() if "hit_rate" not in line.get("result", {})
    }
    column = "samples of one prompt: blocks in use"
    shown = by_system(
        lines, {column: lambda r: f"{r['samples']}: {r['blocks_together']} instead of {r['blocks_apart']}"}
    )
    return shown and "**Parallel samples**\n\n" + shown


def _words(result: dict) -> str:
    if "hit_rate" in result:
        return f"{result['hit_rate']:.0%} of repeated prompts not computed again"
    return f"{result['samples']} samples in {result['blocks_together']} blocks, not {result['blocks_apart']}"


register(
    Workload(
        "sharing",
        run_sharing,
        "four samples of one prompt: how many blocks? (under `generate()`: are prompts sent twice computed twice?)",
        cases={"default": cases},
        tables=tables,
        words=_words,
    )
)
