"""The main table: every system with its memory, its speed, and what it can do. One machine, one model, one dtype."""

from __future__ import annotations

from collections.abc import Callable

from bench.case import is_random
from bench.lines import Found, commits_of
from bench.markdown import cell, spread, table
from bench.systems import NATIVE_CACHES, in_order

GENERATE_BATCH_NOTE = (
    "`generate_batch` runs on torch's SDPA here. With the flash-attn package it is several times faster upstream "
    "(1373 to 6729 tokens/s in transformers #42839)."
)

OWN_PER_CALL = dict.fromkeys(NATIVE_CACHES, "no: a cache a call") | {"generate_batch": "no: a pool a call"}
HEAD = (
    "system", "peak memory (GB)", "throughput (tokens/s)", "equal to baseline", "handles > 4k tokens",
    "shared across requests",
)  # fmt: skip


def rows(found: Found, model: str, dtype: str) -> list[list[str]]:
    """A row for every system, its cells as `HEAD` says."""
    throughput, context = found.of("throughput", model, dtype), found.of("context", model, dtype)
    judged = _judged(found, model)
    accuracy = found.of("accuracy", judged, "float32") or found.of("accuracy", judged)
    hits = {
        system: line
        for workload in ("accuracy", "sharing")
        for system, line in found.of(workload, judged).items()
        if "hit_rate" in line.get("result", {})
    }
    rows = []
    for system in in_order([*throughput, *context]) if throughput else ():
        line = throughput.get(system)
        rows.append(
            [
                system,
                _cell(line, lambda result: f"{result['peak'] / 1e9:.2f}"),
                _cell(line, lambda result: spread(result["tokens_per_second"], 1, 1)),
                _cell(accuracy.get(system), lambda result, system=system: _equality(result, system)),
                _beyond_4k(context, system),
                OWN_PER_CALL.get(system)
                or _cell(hits.get(system), lambda result: f"{result['hit_rate']:.0%} of repeated prompts"),
            ]
        )
    return rows


def _cell(line: dict | None, show: Callable[[dict], str]) -> str:
    return "not run" if line is None else cell(line, show)


def comparison(found: Found, model: str, dtype: str) -> str:
    """The rows as Markdown, and what they were measured with."""
    throughput, judged = found.of("throughput", model, dtype), _judged(found, model)
    if not throughput:
        return ""
    sample = next((line["result"] for line in throughput.values() if line["status"] == "ok"), None)
    params = next(iter(throughput.values()))["params"]
    lengths, new_tokens = params["lengths"], params["new_tokens"]
    text = f"Batch: {len(lengths)} requests of {min(lengths)} to {max(lengths)} tokens, {new_tokens} new each, greedy."
    text += " Weights and token ids are random: only the shape of the model is real." * is_random(model)
    if sample:
        text += f" Weights: {sample['parameter_bytes'] / 1e9:.2f} GB."
    peak = "`torch.cuda.max_memory_allocated`" if found.on_gpu else "peak resident size of the process"
    text += f" Peak memory: {peak}, weights included. Throughput: generated tokens over total time, median"
    text += " (smallest to largest); one run where no range stands."
    if judged != model:
        of = [*found.of("accuracy", judged).values(), *found.of("sharing", judged).values()]
        text += f" Equality and sharing are those of {judged} in float32 here (commit {commits_of(of)}): tokens of"
        text += " random weights mean nothing."
    text += " Margin: by how much the logits of two tokens differ where they first part. Tokens as baseline: behind"
    text += " more than 4k tokens they are the native cache's too"
    text += "." if dtype == "float32" else f"; where it is not said, rounding in {dtype} may have parted them."
    if any(line["status"] == "ok" for system, line in throughput.items() if system == "generate_batch"):
        text += " " + GENERATE_BATCH_NOTE
    return f"**All systems, {dtype}**\n\n{text}\n\n" + table(HEAD, rows(found, model, dtype))


def _judged(found: Found, model: str) -> str:
    """The model whose tokens are compared: of random weights, another that ran on this machine, if one did."""
    others = [other for other in found.models() if found.of("accuracy", other)] if is_random(model) else []
    return others[0] if others else model


def _beyond_4k(context: dict[str, dict], system: str) -> str:
    def points(line: dict | None) -> dict[int, dict]:
        ran = line["result"]["points"] if line and line["status"] == "ok" else []
        return {point["context"]: point for point in ran if point["context"] > 4096}

    line, own, native = context.get(system), points(context.get(system)), points(context.get("baseline"))
    if not own:
        return _cell(line, lambda result: "not run beyond 4096")
    done = [length for length, point in own.items() if "error" not in point]
    if not done:
        return "; ".join(f"{length}: {point['error']}" for length, point in own.items())
    length = max(done)
    same = system != "baseline" and own[length]["tokens"] == native.get(length, {}).get("tokens")
    return f"yes, {length}" + (", tokens as baseline" if same else "")


def _equality(result: dict, system: str) -> str:
    if result["divergence"] is None:
        return "yes" if system != "baseline" else "yes (padded batch)"
    text = f"{result['identical']} of {result['prompts']} prompts"
    margin = result["divergence"]["margin"]
    return text if margin is None else f"{text}; margin {margin:.2g}"
