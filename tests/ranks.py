"""What tests/test_parallel.py runs in several processes, each a rank: `python tests/ranks.py SCENARIO FOLDER`.

A scenario writes what it found to FOLDER/SCENARIO.RANK.json. `answers` is also what one process is asked.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from kv_strategies import Request, Runner, build, cli, registry, runner
from kv_strategies.models import load, load_model
from kv_strategies.speculative import PromptLookup
from kv_strategies.step import heartbeat
from kv_strategies.step.ranks import RankError, ranks_of
from kv_strategies.step.upstream import with_cache

RANK = int(os.environ.get("RANK", "0"))
FREE = 8 << 30  # bytes of rank 0's device, as it is told; a fourth on rank 1's
DEVICE = None if "RANK" in os.environ else "cpu"  # a rank takes what it finds
STRATEGIES = {
    "paged": {},
    "prefix": {},
    "window": {"window": 16},
    "offload": {},
    "int8": {},
    "evict": {"keep": 0.5},
    "prefix+offload+int8": {"resident": "kv", "host_bytes": 1 << 16},
}


def requests(vocab_size: int) -> list[Request]:
    """Greedy and sampled, one and several samples, prompts that begin alike and some that preempt others."""
    rng = random.Random(5)
    shared = [rng.randrange(vocab_size) for _ in range(23)]
    prompts = [shared[: rng.randint(1, 23)] + [rng.randrange(vocab_size) for _ in range(k)] for k in range(0, 45, 5)]
    return [
        Request(prompt, 10, temperature=0.8 * (i % 2), seed=i, n=1 + 2 * (i == 3), logprobs=0)
        for i, prompt in enumerate(prompts)
    ]


def answers(model, folder: Path) -> dict[str, object]:
    """Tokens of every strategy by both doors, by the stack and by modules, and what was found there already."""
    vocab_size, found = model.config.vocab_size, {}
    ids = torch.tensor([[0, 0, 0, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2, 1]]) % vocab_size
    mask = (torch.arange(9) >= torch.tensor([[3], [0]])).long()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for name, own in STRATEGIES.items():
        if "host_bytes" in own:
            own = own | {"disk_path": folder / "disk", "disk_bytes": 1 << 20}
        for is_fused in (True, False):
            strategy = build(name, model, num_blocks=40, block_size=4, **own)
            strategy.fused = is_fused
            assert (strategy.stack is not None) == is_fused
            served = Runner(model, strategy, max_num_seqs=8, max_batch_tokens=24, warm_up=True)
            results = [result for _ in range(2) for result in served.generate(requests(vocab_size))]
            given = [strategy.cache(), *([strategy.cache(ids, mask)] if name != "evict" else [])]
            texts = [
                model.generate(ids, attention_mask=mask, **with_cache(cache), **options).tolist() for cache in given
            ]
            if name == "paged":
                guessing = Runner(model, strategy, max_batch_tokens=90, speculate=PromptLookup())
                texts.append([result.token_ids for result in guessing.generate([Request([5, 6, 7] * 8, 20)])])
            del given
            strategy.check_integrity()
            found[f"{name} {is_fused}"] = [
                [(result.token_ids, result.num_cached_tokens, result.finish_reason) for result in results],
                texts,
                served.num_preemptions > 0,
                strategy.stats()["hit_tokens"],
            ]
    return found


def made(tied: bool) -> list[int]:
    """What a model says that is not read from a folder, but made whole and then cut."""
    load.RANDOM_MODELS["tiny-random"] = load.RANDOM_MODELS["llama-2-7b-random"] | {
        "vocab_size": 62, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied,
    }  # fmt: skip
    model, _ = load_model("tiny-random", device=DEVICE)
    return Runner(model, build("paged", model, num_blocks=8)).generate([Request(range(9), 12)])[0].token_ids


def equal(folder: Path) -> dict[str, object]:
    """All that holds of ranks that agree."""
    model, _ = load_model(folder / "tiny")
    found = {"answers": answers(model, folder)}
    everybody = ranks_of(model)
    strategy = build("prefix", model, num_blocks=40, block_size=4)
    served = Runner(model, strategy, max_num_seqs=4)
    prompt = list(range(30))

    found["unseeded"] = [result.token_ids for result in served.generate([Request(prompt, 8, 1.0)] * 2)]
    found["generated"] = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=True).tolist()
    found["deadline"] = by_the_clock_of_rank_0(served, prompt)
    found["asynchronous"] = asynchronous(served, prompt)
    found["saved"] = saved(strategy, everybody, folder)
    found["changed"] = hits_after_changes(model, served, prompt)

    free = registry.free_bytes
    registry.free_bytes = lambda device: FREE // (1 + 3 * RANK)
    found["free"] = FREE
    found["blocks"] = build("paged", model, memory_fraction=1e-4).pool.num_blocks
    registry.free_bytes = free

    found["made"] = [made(tied) for tied in (False, True)]
    found["refused"] = refused(
        lambda: build("paged", model, num_blocks=8, deterministic=True),
        lambda: build("paged", model, num_blocks=8 + RANK),
        lambda: load_model(folder / "three"),
        lambda: load_model(folder / "tiny", device="meta"),
        lambda: Runner(model, build("baseline", model)).generate([Request([1], 1, deadline=1.0)]),
        lambda: Runner(model, strategy, target_itl=1.0),
        lambda: Runner(model, strategy, shortest_first=1.0),
    )
    for name, argv in {
        "cli": ["generate", "one two", "--max-new-tokens", "4"],
        "batch": ["batch", str(folder / "prompts.jsonl"), str(folder / "out.jsonl"), "--max-new-tokens", "4"],
        "again": ["batch", str(folder / "prompts.jsonl"), str(folder / "out.jsonl"), "--resume"],
    }.items():
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = cli.main([*argv, "--model", str(folder / "worded"), "--option", "num_blocks=64"])
        found[name] = [status, out.getvalue(), err.getvalue() if name != "cli" else ""]
    return found


def by_the_clock_of_rank_0(served: Runner, prompt: list[int]) -> list[object]:
    """A clock that goes on at every look, of rank 0, and one that stands far ahead."""
    ticks = itertools.count()
    runner.time = SimpleNamespace(perf_counter=lambda: float(next(ticks)) if RANK == 0 else 1e9)
    try:
        results = served.generate([Request(prompt, 60, deadline=20.0), Request(prompt, 60)])
        return [(result.finish_reason, len(result.token_ids)) for result in results]
    finally:
        runner.time = time


def asynchronous(served: Runner, prompt: list[int]) -> list[object]:
    """Threads that submit and cancel whenever they come to it, beside one that steps."""
    ended: dict[str, object] = {}

    def ask(name: str) -> None:
        time.sleep(random.random() / 10)
        served.submit([Request(prompt[: 5 + ord(name) % 7], 40, request_id=name)])
        time.sleep(random.random() / 10)
        if name in "ac":
            served.cancel(name)

    asking = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    random.seed(RANK)
    for thread in asking:
        thread.start()
    while len(ended) < 4:
        for event in served.step():
            if event.result is not None:
                ended[event.request_id] = (event.result.finish_reason, event.result.token_ids)
    for thread in asking:
        thread.join()
    return sorted(ended.items())


def saved(strategy, everybody, folder: Path) -> list[object]:
    """Its own file comes back, another rank's is refused, and one that is damaged is nobody's."""
    path, own = folder / "cache", Path(everybody.own(folder / "cache"))
    found = [strategy.save(path)]
    strategy.reset()
    found += [strategy.load(path).num_blocks, own.name]
    strategy.reset()
    contents = everybody.all(own.read_bytes())
    own.write_bytes(contents[1 - RANK])
    found += refused(lambda: strategy.load(path))
    own.write_bytes(contents[RANK][: -RANK or None])  # of rank 1 a byte is missing
    found += refused(lambda: strategy.load(path))
    return [*found, strategy.stats()["blocks_cached"]]


def hits_after_changes(model, served: Runner, prompt: list[int]) -> list[int]:
    """Cached tokens of a prompt: computed, met again, and after each change of what is here of a weight."""
    found = []
    weight = model.model.layers[0].mlp.down_proj.weight
    changes = [lambda: None, lambda: None, lambda: weight.add_(0.01), lambda: weight._local_tensor.add_(0.01)]
    for change in changes:
        with torch.no_grad():
            change()
        found.append(served.generate([Request(prompt, 1)])[0].num_cached_tokens)
    return found


def refused(*works) -> list[str]:
    said = []
    for work in works:
        try:
            work()
            said.append("not refused")
        except (ValueError, RankError) as error:
            said.append(str(error))
    return said


def plan(folder: Path) -> list[str]:
    """A rank that has forgotten what the other finds."""
    model, _ = load_model(folder / "tiny")
    strategy = build("prefix", model, num_blocks=40, block_size=4)
    served = Runner(model, strategy)
    served.generate([Request(range(20), 2)])
    if RANK == 1:
        strategy.sharing.clear()
    return refused(lambda: served.generate([Request(range(20), 2)]), lambda: served.generate([Request([1], 2)]))


def prompt(folder: Path) -> list[str]:
    """Ranks that call generate() with prompts of two lengths."""
    model, _ = load_model(folder / "tiny")
    strategy = build("paged", model, num_blocks=40)
    ids = torch.arange(6 + RANK)[None]
    return refused(lambda: model.generate(ids, **with_cache(strategy.cache()), max_new_tokens=4))


def killed(folder: Path, by: int = signal.SIGKILL) -> list[str]:
    """A rank that dies in the middle of a request."""
    model, _ = load_model(folder / "tiny")
    served = Runner(model, build("paged", model, num_blocks=40))

    def generate() -> None:
        for number, _ in enumerate(served.stream([Request(range(9), 60)])):
            if number == 5 and RANK == 1:
                os.kill(os.getpid(), by)

    return refused(generate)


def stopped(folder: Path) -> list[str]:
    """A rank that stands still in the middle of a request, and stays."""
    return killed(folder, by=signal.SIGSTOP)


def prompts(folder: Path) -> list[list[int]]:
    """The 64 prompts, natural text, by paged."""
    model, _ = load_model(folder / "widened", device=DEVICE)
    served = Runner(model, build("paged", model, num_blocks=800))
    asked = json.loads((folder / "prompts.json").read_text())
    return [result.token_ids for result in served.generate([Request(ids, 16) for ids in asked])]


if __name__ == "__main__":
    heartbeat.PATIENCE = 2.0
    scenario, into = sys.argv[1], Path(sys.argv[2])
    outcome = globals()[scenario](into)
    (into / f"{scenario}.{RANK}.json").write_text(json.dumps(outcome))
