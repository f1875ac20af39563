"""What the lossy strategies cost, and what they save: `python -m bench --suite cost`.

Every setting of one option is a row of one case: perplexity and distance from the native cache's logits over the end of
natural texts (`accuracy.py`). Beside them stands what a context of that length takes on the GPU, as a share of the
plain block pool in bfloat16. What is found again in long texts: `quality.py`.

The end of a text is fed one token at a time to top-N and mass, which are defined for decode steps and read all of V
while they prefill; so all of a text but its end is computed exactly there. Window and codes are lossy token by token
from the start, and any chunk gives the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.case import Bench, Case
from bench.lines import Found
from bench.markdown import NONE, cell, table
from bench.systems import BLOCK_SIZE
from bench.workload import Target, Workload, register

if TYPE_CHECKING:
    from kv_strategies.base import Codec, Placement

ROUNDING = 1e-7  # nats: differences of float32 logits alone

# kind -> its settings: (row, strategy, options)
SETTINGS_ON_GPU = {
    "exact and 8 bits": [("paged", "paged", {}), ("int8", "int8", {}), ("fp8", "fp8", {})],
    "4 bits": [("k8v4", "k8v4", {}), ("int4", "int4", {})],
    "top-N": [(f"top-{n}", "offload", {"top_n": n}) for n in (16, 32, 64, 128, 256)],
    "top-N, renormalised": [
        (f"top-{n}, renormalised", "offload", {"top_n": n, "renormalise": True}) for n in (16, 64, 256)
    ],
    "mass": [(f"mass {mass}", "offload", {"mass": mass}) for mass in (0.9, 0.99, 0.999)],
    "window": [
        (f"window {window}, {sinks} sinks", "window", {"window": window, "sinks": sinks})
        for window in (512, 1024, 2048)
        for sinks in (0, 4)
    ],
}
SETTINGS_ON_CPU = {
    "exact and 8 bits": SETTINGS_ON_GPU["exact and 8 bits"],
    "4 bits": SETTINGS_ON_GPU["4 bits"],
    "top-N": [(f"top-{n}", "offload", {"top_n": n}) for n in (16, 64)],
    "mass": [("mass 0.99", "offload", {"mass": 0.99})],
    "window": [(f"window 128, {sinks} sinks", "window", {"window": 128, "sinks": sinks}) for sinks in (0, 4)],
}
ON_GPU = {"texts": 8, "prompt": 5888, "judged": 256}
ON_CPU = {"texts": 1, "prompt": 480, "judged": 32}


def run_cost(bench: Bench) -> dict:
    """One row for each of `params["settings"]`."""
    from bench.accuracy import judge
    from kv_strategies import build

    num_texts, num_prompt, num_judged = (bench.params[name] for name in ("texts", "prompt", "judged"))
    length = num_prompt + num_judged
    texts = torch.tensor(bench.prompts([length] * num_texts, seed=11))
    bench.say("the native cache's logits")
    reference = judge(bench.model, build("baseline", bench.model), texts, num_prompt=num_prompt)
    num_blocks = num_texts * (-(-length // BLOCK_SIZE) + 1)
    found = []
    for index, (label, name, options) in enumerate(bench.params["settings"]):
        bench.say(f"{label}, {index + 1} of {len(bench.params['settings'])}")
        row = {"label": label, "strategy": name, "options": options}
        found.append(row)
        try:
            strategy = build(name, bench.model, num_blocks=num_blocks, block_size=BLOCK_SIZE, **options)
        except ValueError as error:  # a GPU without fp8
            row["error"] = str(error)
            continue
        row |= _cost(bench, strategy, texts, reference, decode="top_n" in options or "mass" in options)
        row["gpu_share"] = gpu_share(strategy, length)
        del strategy
        bench.free()
    return {"rows": found, "texts": num_texts, "prompt": num_prompt, "judged": reference.judged}


def _cost(bench: Bench, strategy, texts: Tensor, reference, *, decode: bool) -> dict:
    from bench.accuracy import cost

    chunk = 1 if decode else 512
    row = cost(bench.model, strategy, reference, texts, num_prompt=bench.params["prompt"], chunk=chunk)
    stats = strategy.stats()
    return row | {name: stats.get(name) for name in ("kept_tokens_mean", "dropped_mass_mean", "dropped_mass_worst")}


def gpu_share(strategy, num_tokens: int) -> float:
    """Bytes on the GPU that one context of `num_tokens` takes in bfloat16, once it is computed, of those that a plain
    block pool takes. From the shapes alone, whatever dtype and device the accuracy was measured in.
    """
    from kv_strategies.base import OnDevice, Plain

    own = strategy.retention.num_blocks(num_tokens, 1, BLOCK_SIZE) * gpu_bytes_per_block(strategy, torch.bfloat16)
    plain = _bytes_per_block(strategy.shape, Plain(), OnDevice(), torch.bfloat16)
    return own / (math.ceil(num_tokens / BLOCK_SIZE) * plain)


def gpu_bytes_per_block(strategy, dtype: torch.dtype) -> int:
    """Bytes on the GPU that a block takes where the model is of `dtype`. A buffer that prompts pass through counts."""
    return _bytes_per_block(strategy.shape, strategy.codec, strategy.placement, dtype)


def _bytes_per_block(shape, codec: Codec, placement: Placement, dtype: torch.dtype) -> int:
    gpu = torch.device("cuda")
    planes = codec.planes(shape.num_kv_heads, BLOCK_SIZE, shape.head_dim, dtype)
    return placement.bytes_per_block(planes, [gpu] * len(shape.layer_devices))[gpu]


def cases(to: Target) -> Iterable[Case]:
    """A case for each kind of setting; on a CPU in full, what a GPU would find."""
    in_full = to.full and not to.on_gpu
    sizes, kinds = (ON_GPU, SETTINGS_ON_GPU) if to.on_gpu or in_full else (ON_CPU, SETTINGS_ON_CPU)
    for kind, settings in kinds.items():
        yield to.case(kind, "float32", sizes | {"settings": settings}, timeout=3 * 3600 if in_full else 550)


def tables(found: Found, model: str) -> str:
    cases = [*found.of("cost", model).values()]
    done = [line for line in cases if line["status"] == "ok"]
    rows = [
        row
        for line in cases
        for row in (
            map(_row, line["result"]["rows"]) if line["status"] == "ok" else [[line["system"], cell(line, str)]]
        )
    ]
    head = ["setting", "perplexity", "of the baseline", "mean KL, nats", "same likeliest token"]
    head += ["tokens read", "mass dropped: mean", "worst", "KV on the GPU, of paged bf16"]
    return f"**Cost of the lossy strategies, {cases[0]['dtype']}**\n\n{_note(done)}\n\n" + table(head, rows)


def _row(row: dict) -> list[str]:
    if "error" in row:
        return [row["label"], row["error"]]
    kept, mean, worst = (row[name] for name in ("kept_tokens_mean", "dropped_mass_mean", "dropped_mass_worst"))
    return [
        row["label"],
        f"{row['perplexity']:.3f}",
        f"{row['perplexity'] / row['baseline_perplexity'] - 1:+.2%}",
        f"{row['mean_kl']:.2e}" if row["mean_kl"] > ROUNDING else "0 (rounding)",
        f"{row['top1_agreement']:.1%}",
        f"{kept:.0f}" if kept else "all",
        f"{mean:.2e}" if kept else NONE,
        f"{worst:.2e}" if kept else NONE,
        f"{row['gpu_share']:.3f}",
    ]


def _note(done: Sequence[dict]) -> str:
    if not done:
        return ""
    result = done[-1]["result"]
    length = result["prompt"] + result["judged"] // result["texts"]
    return (
        f"Natural text, {result['texts']} stretches of {length + 1} tokens; judged are the last {result['judged']}, "
        f"each behind at least {result['prompt']} others, against the native cache's logits. Top-N and mass are for "
        "decode steps: the judged tokens were fed one at a time, and what is before them was computed exactly. Windows "
        "and codes are lossy from the first token on. KL: of the native cache's next-token distribution from the "
        "strategy's. Tokens read: those whose V a head reads in a step, on average; the mass is that of the softmax. "
        "KV on the GPU: bytes of a context of this length in bfloat16, as a share of the plain block pool's; V on the "
        "host not counted. What is found again in long texts: quality_table.md."
    )


def _words(result: dict) -> str:
    rows = [row for row in result["rows"] if "error" not in row]
    return ", ".join(f"{row['label']}: KL {row['mean_kl']:.1e}" for row in rows)


register(
    Workload(
        "cost",
        run_cost,
        "what lossy settings cost in perplexity and logits",
        cases={"cost": cases},
        tables=tables,
        words=_words,
    )
)
