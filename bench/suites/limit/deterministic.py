"""`deterministic=True`: does it keep its promise, and what does it cost?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench import measure
from bench.case import Bench, Case, ragged
from bench.markdown import milliseconds, of_each, table
from bench.suites.limit.decode import NUM_UNSTEADY
from bench.systems import Capacity, Ours, filled, ours
from bench.workload import Claim, Target, Workload, register

MODES = {"fast": {}, "deterministic": {"deterministic": True}}
BLOCK_SIZE = 16


def run_deterministic(bench: Bench) -> dict:
    """`steps`: points (rows, context) of a decode step; `prefills`: (rows, tokens) of prompts computed at once, in
    chunks of `chunk`; `requests`: how many are sent four times, alone, together, behind hits, with preemptions. Both
    modes in turns."""
    found: dict = {"points": [], "requests": bench.params.get("requests", 0)}
    for rows, context in bench.params["steps"]:
        bench.say(f"decode, {rows} x {context}")
        point = {mode: _step(bench, rows, context, options) for mode, options in MODES.items()}
        found["points"].append({"work": f"decode step, {rows} x {context}"} | point)
    for rows, tokens in bench.params["prefills"]:
        bench.say(f"prefill, {rows} x {tokens}")
        point = {mode: _prefill(bench, rows, tokens, options) for mode, options in MODES.items()}
        found["points"].append({"work": f"prefill, {rows} x {tokens}, a chunk of {bench.params['chunk']}"} | point)
    if found["requests"]:
        found["sent"] = _send(bench, found["requests"])
    return found


def _step(bench: Bench, rows: int, context: int, options: dict) -> dict:
    new_tokens = bench.params["new_tokens"]
    system = ours(bench.model, "paged", Capacity([[context + new_tokens] * rows]), **options)
    with filled(system.strategy):
        run = system(bench.prompts([context] * rows, seed=rows), new_tokens)
    del system
    bench.free()
    return measure.spread(measure.steady_steps(run.times)[NUM_UNSTEADY:])


def _prefill(bench: Bench, rows: int, tokens: int, options: dict) -> dict:
    from kv_strategies import build

    capacity = Capacity([[tokens + 1] * rows])
    strategy = build("paged", bench.model, num_blocks=capacity.blocks(BLOCK_SIZE), block_size=BLOCK_SIZE, **options)
    system = Ours(bench.model, strategy, capacity, max_batch_tokens=bench.params["chunk"])
    runs = [system(bench.prompts([tokens] * rows, seed=seed), 1).seconds for seed in range(4)]
    del system, strategy
    bench.free()
    return measure.spread(runs[1:])


def _send(bench: Bench, count: int) -> dict:
    """In how many requests a token differs from the same one sent alone, and what happened to them; for contrast the
    same of the fast kernels, by a tenth of the requests."""
    new_tokens = bench.params["new_tokens_sent"]
    half = bench.prompts(ragged(count // 2, 20, 120), seed=5)
    prompts = [prompt for first in half for prompt in (first, first[: len(first) // 2] + first[: len(first) // 3])]
    found = {}
    for mode, some in (("deterministic", prompts), ("fast", prompts[: max(1, count // 10)])):
        bench.say(f"{mode}: {len(some)} requests, alone")
        alone = _sent(bench, some, new_tokens, MODES[mode], seats=1)[0]
        row = {"requests": len(some)}
        for way, options in {
            "together": {"seats": 128},
            "in chunks of 160 beside others": {"seats": 128, "chunk": 160},
            "behind hits": {"seats": 128, "name": "prefix", "times": 2},
            "preempted": {"seats": 64, "share": 0.35},
        }.items():
            bench.say(f"{mode}: {way}")
            tokens, seen = _sent(bench, some, new_tokens, MODES[mode], **options)
            row[way] = {"differ": len(some) - measure.num_same(tokens, alone)} | seen
        found[mode] = row
    return found


def _sent(
    bench: Bench,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    options: dict,
    *,
    seats: int,
    name: str = "paged",
    chunk: int = 2048,
    share: float = 1.0,
    times: int = 1,
) -> tuple[list[list[int]], dict]:
    """The tokens of all requests, `seats` at a time in a pool of `share` of what these take; and what it took."""
    from kv_strategies import build

    capacity = Capacity([sorted((len(prompt) + new_tokens for prompt in prompts), reverse=True)[:seats]])
    num_blocks = max(int(share * capacity.blocks(BLOCK_SIZE)), -(-capacity.max_length // BLOCK_SIZE))
    if name == "prefix":
        num_blocks = sum(-(-(len(prompt) + new_tokens) // BLOCK_SIZE) for prompt in prompts)
    strategy = build(name, bench.model, num_blocks=num_blocks, block_size=BLOCK_SIZE, **options)
    system = Ours(bench.model, strategy, capacity, max_batch_tokens=chunk)
    for _ in range(times):
        run = system(prompts, new_tokens)
    seen = {"preemptions": system.runner.num_preemptions, "hit_tokens": strategy.stats()["hit_tokens"]}
    del system, strategy
    bench.free()
    return run.token_ids, seen


def cases(to: Target) -> Iterable[Case]:
    if not to.on_gpu:
        params = {"steps": [[1, 128], [8, 128]], "prefills": [[1, 256]], "chunk": 512, "new_tokens": 12}
        yield to.case("paged", "float32", params | {"requests": 20, "new_tokens_sent": 4}, timeout=900)
        return
    shapes = {
        "llama-2-7b-random": {"steps": [[1, 4096], [32, 1024], [16, 2048]], "prefills": [[1, 4096], [1, 16384]]},
        "llama-3.1-8b-random": {"steps": [[1, 4096], [32, 2048], [32, 8192]], "prefills": [[1, 4096], [1, 16384]]},
    }
    for model, params in shapes.items():
        if to.model in (None, model):
            sizes = {"chunk": 8192, "new_tokens": 32}
            yield to.case("paged", "bfloat16", params | sizes, timeout=300, model=model)
    if to.model not in shapes:
        params = {"steps": [], "prefills": [], "requests": 10000, "new_tokens_sent": 5}
        yield to.case("paged", "bfloat16", params, timeout=400)


def _show(result: dict) -> str:
    rows = [
        [point["work"], milliseconds(point["fast"]), milliseconds(point["deterministic"]), f"{_cost(point):+.1%}"]
        for point in result["points"]
    ]
    parts = [table(["work", "fast, ms", "deterministic, ms", "cost"], rows)] if rows else []
    if "sent" in result:
        ways = [way for way in result["sent"]["deterministic"] if way != "requests"]
        head = ["requests that differ from the same sent alone", "of", *ways]
        rows = [
            [mode, str(row["requests"]), *(str(row[way]["differ"]) for way in ways)]
            for mode, row in result["sent"].items()
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def _cost(point: dict) -> float:
    return point["deterministic"]["median"] / point["fast"]["median"] - 1


def _num_differing(result: dict) -> int | None:
    if "sent" not in result:
        return None
    return sum(way["differ"] for way in result["sent"]["deterministic"].values() if isinstance(way, dict))


register(
    Workload(
        "deterministic",
        run_deterministic,
        "does `deterministic=True` give each request the bits it has alone, and what does it cost?",
        cases={"limit": cases},
        tables=of_each("deterministic", _show),
        claims=[
            Claim("requests whose tokens depend on others", "none", 0, _num_differing, "{:.0f}", at_most=True),
            Claim(
                "cost of `deterministic=True`, {work}",
                "at most 15 %",
                0.15,
                _cost,
                "{:+.1%}",
                at_most=True,
                only=lambda point: True,
            ),
        ],
    )
)
