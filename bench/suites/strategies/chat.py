"""Chats: users behind one system prompt, who come back with all that was said before."""

from __future__ import annotations

from bench import measure
from bench.case import Bench
from bench.markdown import of_each, table
from bench.serving import percentiles
from bench.suites.strategies import shape_cases
from bench.systems import Capacity, Native, Ours, ours
from bench.workload import Claim, Workload, register


def run_chat(bench: Bench) -> dict:
    """All users speak at once, in turns. Of `prefix`, where the system prompt was preloaded and a turn finds those
    before it; of `paged`, which computes all of it anew; of native `generate()` the first token, one user alone.
    """
    params = bench.params
    users, turns = params["users"], params["turns"]
    longest = params["system"] + turns * (params["words"] + params["answer"])
    capacity = Capacity([[longest] * users])
    found: dict[str, list[dict]] = {}
    for name in ("prefix", "paged"):
        bench.say(name)
        # room for all that `paged` holds: of `prefix`, whose users share a system prompt, for the chat before as well
        system = ours(bench.model, name, capacity)
        _chat(bench, system, seed=1)  # kernels compile, graphs are captured
        found[name] = _chat(bench, system, seed=2)
        del system
        bench.free()
    native, alone = Native(bench.model, None), []
    for turn in found["paged"]:
        bench.say(f"native, {turn['prompt']} tokens")
        runs = [native(bench.prompts([turn["prompt"]], seed=seed), 1) for seed in range(params["repeats"] + 1)]
        alone.append(measure.spread([run.times[0][0] for run in runs[1:]]))
    return {**found, "native": alone}


def _chat(bench: Bench, system: Ours, seed: int) -> list[dict]:
    params, found = bench.params, []
    chats = bench.prompts([params["system"]], seed=seed) * params["users"]
    if system.strategy.name == "prefix":
        system.strategy.preload(chats[0])
    for turn in range(params["turns"]):
        words = bench.prompts([params["words"]] * params["users"], seed=100 * seed + turn)
        chats = [chat + more for chat, more in zip(chats, words, strict=True)]
        run = system(chats, params["answer"])
        found.append(
            {
                "prompt": len(chats[0]),
                "found": sum(run.cached_tokens) / sum(map(len, chats)),
                "ttft": percentiles([times[0] for times in run.times]),
                "seconds": run.seconds,
            }
        )
        chats = [chat + answer for chat, answer in zip(chats, run.token_ids, strict=True)]
    return found


ON_GPU = {"users": 16, "system": 2048, "words": 128, "answer": 128, "turns": 6, "repeats": 3}
ON_CPU = {"users": 4, "system": 256, "words": 32, "answer": 16, "turns": 3, "repeats": 2}


CLAIMS = [
    Claim(
        "last of {turns} turns of {users} users behind {system} tokens: TTFT p50 where all is computed / found",
        "at least 10x lower than without",
        10,
        lambda result: result["paged"][-1]["ttft"]["p50"] / result["prefix"][-1]["ttft"]["p50"],
    ),
]


def _table(result: dict) -> str:
    rows = [
        [
            str(turn),
            str(prefix["prompt"]),
            f"{prefix['found']:.1%}",
            *(f"{one['ttft']['p50'] * 1e3:.1f} / {one['ttft']['p99'] * 1e3:.1f}" for one in (prefix, paged)),
            f"{alone['median'] * 1e3:.1f}",
            *(f"{one['seconds']:.2f}" for one in (prefix, paged)),
        ]
        for turn, (prefix, paged, alone) in enumerate(
            zip(result["prefix"], result["paged"], result["native"], strict=True), start=1
        )
    ]
    head = ["turn", "prompt, tokens", "found computed", "prefix: TTFT p50 / p99, ms", "paged: TTFT p50 / p99, ms"]
    head += ["native, one user alone: TTFT, ms", "prefix: all answers, s", "paged: all answers, s"]
    title = "**Chats: all users at once behind one system prompt, each turn with all that was said before**"
    return f"{title}\n\n" + table(head, rows)


register(
    Workload(
        "chat",
        run_chat,
        "users behind one system prompt, several turns: first tokens where earlier turns are found computed, and not",
        cases={"strategies": shape_cases("prefix", ON_GPU, ON_CPU)},
        tables=of_each("chat", _table),
        claims=CLAIMS,
    )
)
