"""What each strategy is for, measured beside what it replaces: `python -m bench --suite strategies`.

| workload | question                                                                                                |
|----------|---------------------------------------------------------------------------------------------------------|
| prefix   | time to first token where the start of a prompt is known, where it is not, and of the native cache      |
| fan-out  | many short candidates over one history: a decode step with the history read once (cascade), and without |
| window   | time a decode step and KV bytes after a short and after a long prompt                                   |
| stream   | a million tokens: time and KV bytes a chunk, perplexity against recomputing the window                  |
| offload  | a decode step with V on the host, all of it and the heaviest tokens alone, against all of it on the GPU |
| 8 bits   | a decode step of int8 and fp8 against bfloat16, and the bytes a token takes                             |

Everything that is compared within a workload ran in the same process, on the same weights. What must be reached stands
in `report_claims.py`. Random prompts and a random seed a repeat: nothing is found computed that should not be.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench import measure
from bench.probes import limits
from bench.systems import Capacity, Native, Ours, filled

if TYPE_CHECKING:
    from bench.cases import Bench

BLOCK_SIZE = 16
CHUNK = 2048  # tokens that a runner prefills at a time

# workload -> (system, sizes), on a GPU for the Llama-2-7B shape and on a CPU for the embedded model
ON_GPU = {
    "prefix": ("prefix", {"points": [[4096, 64], [16184, 64]], "repeats": 3}),
    "fan-out": ("prefix", {"history": 8192, "candidates": 128, "candidate_tokens": 8, "new_tokens": 16}),
    "window": ("window", {"contexts": [4096, 65536], "window": 2048, "sinks": 4, "new_tokens": 48}),
    "offload": ("offload", {"context": 16384, "top_n": 128, "new_tokens": 24, "native_tokens": 4}),
    "8 bits": ("int8", {"batch": 32, "context": 2048, "new_tokens": 24}),
}
ON_CPU = {
    "prefix": ("prefix", {"points": [[512, 32]], "repeats": 2}),
    "fan-out": ("prefix", {"history": 1024, "candidates": 16, "candidate_tokens": 8, "new_tokens": 6}),
    "window": ("window", {"contexts": [512, 1536], "window": 256, "sinks": 4, "new_tokens": 20}),
    "offload": ("offload", {"context": 512, "top_n": 64, "new_tokens": 8}),
    "8 bits": ("int8", {"batch": 4, "context": 128, "new_tokens": 8}),
}
# The stream runs on real text, so on the embedded model everywhere.
STREAM_ON_GPU = {"tokens": 1_000_000, "chunk": 1024, "window": 2048, "sinks": 4, "places": 8192, "batch": 32}
STREAM_ON_GPU |= {"warm_tokens": 16384}  # beyond the first rebasing
STREAM_ON_CPU = {"tokens": 4096, "chunk": 256, "window": 256, "sinks": 4, "places": 24, "batch": 8}
STREAM_ON_CPU |= {"warm_tokens": 256}


# --- prefix


def run_prefix(bench: Bench) -> dict:
    """A prompt nobody has sent; the same start again behind which all is new, `repeats` times; native `generate()`."""
    repeats, points = bench.params["repeats"], bench.params["points"]
    capacity = Capacity([[max(map(sum, points)) + 1]])
    count = repeats + 2  # kernels compile in the first, a short prefill is captured in the second
    room = (count + 1) * capacity.blocks(BLOCK_SIZE)  # for every cold prompt: nothing is evicted
    system = ours(bench, "prefix", capacity, num_blocks=room)
    native, rows = Native(bench.model, None), []
    for shared, new in points:
        bench.say(f"{shared} shared + {new} new tokens")
        system.strategy.reset()
        colds = bench.prompts([shared + new] * count, seed=shared)
        cold = [system([prompt], 1) for prompt in colds][2:]
        ends = bench.prompts([new] * count, seed=shared + 1)
        hit = [system([colds[-1][:shared] + end], 1) for end in ends][2:]
        plain = [native([prompt], 1) for prompt in colds[1:]][1:]
        row = {"shared": shared, "new": new, "hit_rate": hit[-1].cached_tokens[0] / (shared + new)}
        for name, runs in {"cold": cold, "hit": hit, "native": plain}.items():
            row[name] = measure.spread([run.times[0][0] for run in runs])
        rows.append(row)
        bench.free()
    return {"points": rows}


# --- fan-out


def run_fan_out(bench: Bench) -> dict:
    """All candidates decode together behind one history, which is computed once, ahead."""
    history_tokens, candidates = bench.params["history"], bench.params["candidates"]
    own_tokens, new_tokens = bench.params["candidate_tokens"], bench.params["new_tokens"]
    history = bench.prompts([history_tokens], seed=1)[0]
    prompts = [history + end for end in bench.prompts([own_tokens] * candidates, seed=2)]
    length = history_tokens + own_tokens + new_tokens
    history_blocks = history_tokens // BLOCK_SIZE
    own_blocks = candidates * (-(-length // BLOCK_SIZE) - history_blocks)
    room = history_blocks + 4 * own_blocks
    system = ours(bench, "prefix", Capacity([[length] * candidates]), num_blocks=room)
    system.strategy.preload(history)
    steps = {}
    for name, mode in {"cascade": nullcontext, "apart": without_cascade}.items():
        bench.say(name)
        with mode():
            system(prompts, 3)  # kernels compile, the graph is captured
            steps[name] = measure.spread(measure.steady_steps(system(prompts, new_tokens).times))
    return {
        **steps,
        "blocks_used": _most_blocks(system, prompts, new_tokens),
        "blocks_needed": history_blocks + own_blocks,
        "blocks_apart": candidates * -(-length // BLOCK_SIZE),
        "bytes_per_block": _bytes_per_block(system.strategy),
    }


@contextmanager
def without_cascade() -> Iterator[None]:
    """No start that rows share is long enough to be read once for all of them."""
    from kv_strategies.step import plan

    before, plan.MIN_TOKENS_SPARED = plan.MIN_TOKENS_SPARED, sys.maxsize
    try:
        yield
    finally:
        plan.MIN_TOKENS_SPARED = before


def _most_blocks(system: Ours, prompts: list[list[int]], new_tokens: int) -> int:
    """The most blocks that are referenced at once while the prompts run."""
    events, most = system.stream(prompts, new_tokens), 0
    for index, _ in enumerate(events):
        if index % len(prompts) == 0:  # once a step
            most = max(most, system.strategy.stats()["blocks_used"])
    return most


# --- window


def run_window(bench: Bench) -> dict:
    """Decode steps behind prompts of several lengths, all but the last tokens of which are out of sight."""
    window, sinks, new_tokens = (bench.params[name] for name in ("window", "sinks", "new_tokens"))
    blocks = -(-(window + sinks + CHUNK) // BLOCK_SIZE) + 4
    system = ours(bench, "window", Capacity([[1]]), num_blocks=blocks, window=window, sinks=sinks)
    rows = []
    for context in bench.params["contexts"]:
        bench.say(f"after {context} tokens")
        prompt = bench.prompts([context], seed=context)
        most = _most_blocks(system, prompt, new_tokens)  # the same lengths: kernels compile, graphs are captured
        steps = measure.steady_steps(system(prompt, new_tokens).times)
        rows.append(
            {"tokens": context, "step": measure.spread(steps), "kv_bytes": most * _bytes_per_block(system.strategy)}
        )
    return {"points": rows}


def run_stream(bench: Bench) -> dict:
    """The whole text, and again from its start where it is shorter than asked for, through one row of the runner."""
    from bench.accuracy import stream_nll
    from kv_strategies import build
    from kv_strategies.models.text import corpus

    count, chunk, window, sinks = (bench.params[name] for name in ("tokens", "chunk", "window", "sinks"))
    model, tokenizer = bench.loaded
    ids = corpus(tokenizer)
    ids = ids.repeat(-(-count // len(ids)))[:count]
    blocks = -(-(window + sinks + chunk) // BLOCK_SIZE) + 4
    strategy = build("window", model, num_blocks=blocks, block_size=BLOCK_SIZE, window=window, sinks=sinks)
    for _ in stream_nll(model, strategy, ids[: bench.params["warm_tokens"]], chunk):  # kernels compile
        pass
    losses, moments, kv_bytes = [], [], []
    measure.synchronize(bench.case.device)
    start = time.perf_counter()
    for first, loss in stream_nll(model, strategy, ids, chunk):
        losses.append(loss)
        measure.synchronize(bench.case.device)
        moments.append(time.perf_counter())
        kv_bytes.append(strategy.stats()["blocks_used"] * _bytes_per_block(strategy))
        if len(losses) % 32 == 0:
            bench.say(f"{first:,} of {count:,} tokens")
    seconds = [b - a for a, b in pairwise([start, *moments])]
    few = 16 if len(seconds) > 64 else 4

    def around(begin: int) -> dict:
        """A few whole chunks from this one on."""
        end = begin + few
        return {"chunk": measure.spread(seconds[begin:end]), "kv_bytes": max(kv_bytes[begin:end])}

    losses = torch.cat(losses).cpu()
    early = 2 * window // chunk  # the chunk that begins at twice the window: 4k on a GPU
    return {
        "early_token": early * chunk,
        "early": around(early),
        "late": around(len(seconds) - 1 - few),
        "kv_bytes_most": max(kv_bytes),
        "seconds": sum(seconds),
        "perplexity": losses.mean().exp().item(),
        "perplexity_by_part": [part.mean().exp().item() for part in losses.chunk(16)],
        **_against_recomputing(bench, ids, losses),
    }


def _against_recomputing(bench: Bench, ids: Tensor, losses: Tensor) -> dict:
    """Perplexity at random places, of the stream and of its window computed from scratch for each of them."""
    from bench.accuracy import recomputed_nll

    window, sinks, batch = (bench.params[name] for name in ("window", "sinks", "batch"))
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(window + sinks, len(ids) - 1, (bench.params["places"],), generator=generator)
    found: list[Tensor] = []
    for some in places.split(8 * batch):
        bench.say(f"recomputing the window: {sum(map(len, found))} of {len(places)} places")
        found.append(recomputed_nll(bench.model, ids, some.tolist(), window=window, sinks=sinks, batch=batch).cpu())
    streamed, recomputed = losses[places], torch.cat(found)
    return {
        "perplexity_at_places": streamed.mean().exp().item(),
        "recomputed_at_places": recomputed.mean().exp().item(),
        "ratio_error": ((streamed - recomputed).std() / math.sqrt(len(places))).item(),  # standard error, relative
    }


# --- offload


def run_offload(bench: Bench) -> dict:
    """One long context: all on the device, V on the host and read whole, V on the host and read in part, native."""
    context, top_n, new_tokens = (bench.params[name] for name in ("context", "top_n", "new_tokens"))
    on_gpu = bench.case.device.startswith("cuda")
    capacity = Capacity([[context + new_tokens]])
    prompts = bench.prompts([context], seed=1)
    found: dict[str, object] = {}
    if on_gpu:
        found["host_to_device"] = limits.link(bench.case.device)["host_to_device"]
    for name, options in {"paged": {}, "exact": {}, "heaviest": {"top_n": top_n}}.items():
        bench.say(name)
        system = ours(bench, "paged" if name == "paged" else "offload", capacity, **options)
        system(prompts, 4)
        row = {"step": measure.spread(measure.steady_steps(system(prompts, new_tokens).times))}
        if name == "exact":
            row["bytes"] = _bytes_per_step(system, prompts, new_tokens)
        row["kv_bytes"] = system.strategy.stats()["kv_bytes_per_tier"][bench.model.device.type]
        found[name] = row
        del system
        bench.free()
    if on_gpu:
        bench.say("native offloaded cache")
        native = Native(bench.model, "offloaded")
        native([prompts[0][:16]], 2)
        steps = measure.steady_steps(native(prompts, bench.params["native_tokens"]).times)
        found["native"] = {"step": measure.spread(steps)}
    return found


def _bytes_per_step(system: Ours, prompts: list[list[int]], new_tokens: int) -> float:
    """Bytes that one decode step brings to the device, by the strategy's own count."""
    fetched = [system.strategy.placement.stats()["bytes_to_device"] for _ in system.stream(prompts, new_tokens)]
    return statistics.median(b - a for a, b in pairwise(fetched[1:-1]))


# --- 8 bits


def run_8_bits(bench: Bench) -> dict:
    """Steps behind contexts that nobody computed (`filled`): they read as much."""
    batch, context, new_tokens = (bench.params[name] for name in ("batch", "context", "new_tokens"))
    capacity = Capacity([[context + new_tokens] * batch])
    prompts = bench.prompts([context] * batch, seed=1)
    found: dict[str, object] = {}
    for name in ("paged", "int8", "fp8"):
        bench.say(name)
        try:
            system = ours(bench, name, capacity)
        except ValueError as error:  # a GPU without fp8
            found[name] = {"error": str(error)}
            continue
        with filled(system.strategy):
            system(prompts, 4)  # kernels compile, the graph is captured
            steps = measure.steady_steps(system(prompts, new_tokens).times)
        found[name] = {
            "step": measure.spread(steps),
            "bytes_per_token": system.strategy.stats()["bytes_per_token"],
        }
        del system
        bench.free()
    return found


# --- shared


def ours(bench: Bench, name: str, capacity: Capacity, *, num_blocks: int | None = None, **options) -> Ours:
    """A strategy with room for `capacity`, or of `num_blocks`, behind a runner."""
    from kv_strategies import build

    num_blocks = num_blocks or capacity.blocks(BLOCK_SIZE)
    strategy = build(name, bench.model, num_blocks=num_blocks, block_size=BLOCK_SIZE, **options)
    return Ours(bench.model, strategy, capacity)


def _bytes_per_block(strategy) -> int:
    return round(strategy.stats()["bytes_per_token"] * strategy.block_size)
