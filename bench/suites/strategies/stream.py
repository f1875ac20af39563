"""A million tokens: time and KV bytes a chunk, perplexity against recomputing the window."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from bench import measure
from bench.case import Bench, Case, is_random
from bench.markdown import milliseconds, of_each, table
from bench.systems import BLOCK_SIZE, bytes_per_block
from bench.workload import Claim, Target, Workload, register


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
        kv_bytes.append(strategy.stats()["blocks_used"] * bytes_per_block(strategy))
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


# The stream runs on real text, so on the embedded model everywhere.
ON_GPU = {"tokens": 1_000_000, "chunk": 1024, "window": 2048, "sinks": 4, "places": 8192, "batch": 32}
ON_GPU |= {"warm_tokens": 16384}  # beyond the first rebasing
ON_CPU = {"tokens": 4096, "chunk": 256, "window": 256, "sinks": 4, "places": 24, "batch": 8}
ON_CPU |= {"warm_tokens": 256}


def cases(to: Target) -> Iterable[Case]:
    if not is_random(to.model):
        params, dtype = (ON_GPU, "bfloat16") if to.on_gpu else (ON_CPU, "float32")
        yield to.case("window", dtype, params, timeout=550)


CLAIMS = [
    Claim(
        "time a chunk at the end of {tokens} tokens / at {early_token}",
        "within 3 %",
        1.03,
        lambda result: result["late"]["chunk"]["median"] / result["early"]["chunk"]["median"],
        "{:.3f}",
        at_most=True,
    ),
    Claim(
        "KV bytes, likewise",
        "within 3 %",
        1.03,
        lambda result: result["late"]["kv_bytes"] / result["early"]["kv_bytes"],
        "{:.3f}",
        at_most=True,
    ),
    Claim(
        "perplexity / that of recomputing the window, at {places} places",
        "within 1 % (or lower)",
        1.01,
        lambda result: result["perplexity_at_places"] / result["recomputed_at_places"],
        "{:.4f}",
        at_most=True,
    ),
]


def _table(result: dict) -> str:
    rows = [
        [
            f"at {result['early_token']}",
            milliseconds(result["early"]["chunk"]),
            f"{result['early']['kv_bytes'] / 1e6:.1f}",
        ],
        ["at the end", milliseconds(result["late"]["chunk"]), f"{result['late']['kv_bytes'] / 1e6:.1f}"],
    ]
    parts = ", ".join(f"{value:.2f}" for value in result["perplexity_by_part"])
    note = (
        f"{result['tokens']:,} tokens in chunks of {result['chunk']}, window {result['window']}, "
        f"{result['sinks']} sinks: {result['seconds']:.1f} s. Perplexity {result['perplexity']:.3f} over all; "
        f"in sixteenths of the text: {parts}. At {result['places']} places: "
        f"{result['perplexity_at_places']:.3f}, and {result['recomputed_at_places']:.3f} "
        f"where the window was computed from scratch (standard error of the ratio {result['ratio_error']:.4f})."
    )
    return "**Stream**\n\n" + note + "\n\n" + table(["", "chunk, ms", "KV blocks in use, MB"], rows)


register(
    Workload(
        "stream",
        run_stream,
        "a million tokens: time and KV bytes a chunk, perplexity against recomputing the window",
        cases={"strategies": cases},
        tables=of_each("stream", _table),
        claims=CLAIMS,
    )
)
