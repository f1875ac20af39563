"""A pool too small for all requests at once: do all finish, and with the same tokens?"""

from __future__ import annotations

from collections.abc import Iterable

from bench.case import RAGGED_SEED, Bench, Case, is_random
from bench.lines import Found
from bench.markdown import by_system
from bench.measure import num_same
from bench.systems import EVERY, Capacity, build_strategy
from bench.workload import Target, Workload, register


def run_pressure(bench: Bench) -> dict:
    """Room for the prompts and little more: requests must wait or be preempted, and none may be lost."""
    from kv_strategies import Request, Runner

    lengths, new_tokens = bench.params["lengths"], bench.params["new_tokens"]
    prompts = bench.prompts(lengths, seed=RAGGED_SEED)
    roomy = Capacity([[n + new_tokens for n in lengths]])
    expected = bench.open(roomy)(prompts, new_tokens).token_ids
    bench.free()
    bench.say("the same with too few blocks")
    needed = build_strategy(bench.case.system, bench.model, roomy).pool.num_blocks
    tight = Capacity([[n + 1 for n in lengths]]).blocks(16) + 1
    num_blocks = min(tight, needed - 1) if needed > len(lengths) else max(1, needed // 2)
    strategy = build_strategy(bench.case.system, bench.model, roomy, num_blocks=num_blocks)
    runner = Runner(bench.model, strategy, max_num_seqs=len(lengths), warm_up=False)
    results = runner.generate([Request(prompt, max_new_tokens=new_tokens) for prompt in prompts])
    strategy.check_integrity()
    return {
        "requests": len(prompts),
        "finished": sum(len(result.token_ids) == new_tokens for result in results),
        "identical": num_same([list(result.token_ids) for result in results], expected),
        "blocks_needed": needed,
        "blocks_given": num_blocks,
        "preemptions": runner.num_preemptions,
    }


def cases(to: Target) -> Iterable[Case]:
    if not (to.on_gpu and is_random(to.model)):
        params = {"lengths": [33, 34, 35, 36, 37, 38], "new_tokens": 24}
        yield from to.each([EVERY if to.on_gpu else "paged"], "float32", params)


COLUMNS = {
    "blocks given of needed": lambda result: f"{result['blocks_given']} of {result['blocks_needed']}",
    "finished": lambda result: f"{result['finished']} of {result['requests']}",
    "preemptions": lambda result: str(result["preemptions"]),
    "tokens as with room for all": lambda result: f"{result['identical']} of {result['requests']}",
}


def tables(found: Found, model: str) -> str:
    shown = by_system(found.of("pressure", model), COLUMNS)
    return shown and "**Out of memory: a pool too small for all requests at once**\n\n" + shown


register(
    Workload(
        "pressure",
        run_pressure,
        "a pool too small for all requests at once: do all finish, and with the same tokens?",
        cases={"default": cases},
        tables=tables,
        words=lambda r: f"{r['finished']} of {r['requests']} finished, {r['preemptions']} preemptions",
    )
)
