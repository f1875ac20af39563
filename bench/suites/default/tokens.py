"""Are the tokens those of the native cache, and how many need not be computed when prompts come again?

The workload is named `accuracy`: greedy tokens, in a case of its own, apart from all that is timed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch

from bench.case import RAGGED_SEED, Bench, Case, is_random, ragged
from bench.lines import Found
from bench.markdown import NONE, table
from bench.measure import num_same
from bench.systems import EVERY, EVERY_GENERATE, EVERYTHING, PAGED_GENERATE, Capacity, Native
from bench.workload import Target, Workload, register


def run_accuracy(bench: Bench) -> dict:
    """Greedy tokens of all prompts as one ragged batch, against the native DynamicCache with each prompt alone."""
    lengths, new_tokens = bench.params["lengths"], bench.params["new_tokens"]
    prompts = bench.prompts(lengths, seed=RAGGED_SEED)
    expected = _reference(bench, prompts, new_tokens)
    bench.say(f"{len(prompts)} prompts")
    system = bench.open(Capacity([[n + new_tokens for n in lengths]]))
    run = system(prompts, new_tokens)
    found = {"prompts": len(prompts), "identical": num_same(run.token_ids, expected)}
    found["divergence"] = _divergence(bench, prompts, expected, run)
    if run.cached_tokens is not None:  # a second time: what is found computed already must not change a token
        bench.say("the same prompts again")
        again = system(prompts, new_tokens)
        found["identical_again"] = num_same(again.token_ids, run.token_ids)
        found["hit_rate"] = sum(again.cached_tokens) / sum(lengths)
    return found


def _reference(bench: Bench, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Tokens of the native cache, one prompt at a time. The first case of a bench run makes them, the others read."""
    case = bench.case
    key = json.dumps([case.model, case.dtype, case.device, prompts, new_tokens])
    path = bench.scratch / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())
    native, expected = Native(bench.model, None), []
    for index, prompt in enumerate(prompts):
        bench.say(f"reference, prompt {index + 1} of {len(prompts)}")
        expected += native([prompt], new_tokens).token_ids
    path.write_text(json.dumps(expected))
    return expected


def _divergence(bench: Bench, prompts: list, expected: list, run) -> dict | None:
    """Where the first prompt that differs parts from the reference, and by how much the logits of the two tokens
    differ there (of a plain forward over the tokens both agree on)."""
    for index, (prompt, want, got) in enumerate(zip(prompts, expected, run.token_ids, strict=True)):
        if want == got:
            continue
        token = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
        found = {"prompt": index, "prompt_length": len(prompt), "token": token, "margin": None}
        if token < min(len(want), len(got)):
            ids = torch.tensor([list(prompt) + want[:token]], device=bench.model.device)
            with torch.inference_mode():
                logits = bench.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            found["margin"] = float(logits[want[token]] - logits[got[token]])
        return found
    return None


def default_cases(to: Target) -> Iterable[Case]:
    if is_random(to.model):
        return
    if not to.on_gpu:
        yield from to.each(EVERYTHING, "float32", {"lengths": [1, 17, 63, 300], "new_tokens": 16})
        return
    params = {"lengths": ragged(24, 1, 2000), "new_tokens": 48}
    yield from to.each([*EVERYTHING, EVERY_GENERATE], "float32", params, timeout=400)
    yield from to.each(["baseline", EVERY], "bfloat16", params, timeout=400)


def equality_cases(to: Target) -> Iterable[Case]:
    params = {"lengths": ragged(64, 1, 3000), "new_tokens": 128}
    yield from to.each(["baseline", EVERY, "prefix+offload", PAGED_GENERATE], "float32", params, timeout=3600)
    if to.on_gpu:  # equality is a float32 statement: in bfloat16, where they part and by how much
        params = params | {"lengths": ragged(16, 1, 3000)}
        yield from to.each(["baseline", EVERY, PAGED_GENERATE], "bfloat16", params, timeout=3600)


def tables(found: Found, model: str) -> str:
    rows = []
    for dtype in found.dtypes("accuracy", model):
        for line in found.of("accuracy", model, dtype).values():
            if line["status"] != "ok":
                continue
            result = line["result"]
            parts = result["divergence"]
            first = f"prompt of {parts['prompt_length']} tokens, new token {parts['token']}" if parts else NONE
            margin = f"{parts['margin']:.2g}" if parts and parts["margin"] is not None else NONE
            same = f"{result['identical']} of {result['prompts']}"
            again = f"{result['identical_again']} of {result['prompts']}" if "identical_again" in result else NONE
            hit = f"{result['hit_rate']:.1%}" if "hit_rate" in result else NONE
            rows.append([line["system"], line["dtype"], same, first, margin, hit, again])
    note = (
        "Greedy tokens of a ragged batch against the native DynamicCache with each prompt alone. "
        "Margin: by how much the logits of the two tokens differ where they first part; negative where one pass over "
        "the text before them prefers the other to the native cache's own."
    )
    head = ["system", "dtype", "prompts identical", "first divergence", "margin"]
    head += ["hit rate when sent again", "same tokens then"]
    return f"**Equality**\n\n{note}\n\n" + table(head, rows) if rows else ""


register(
    Workload(
        "accuracy",
        run_accuracy,
        "are the tokens those of the native cache, each prompt run alone? else where do they part? Sent a second time, "
        "how many prompt tokens need not be computed, and are the new tokens the same?",
        cases={"default": default_cases, "equality": equality_cases},
        tables=tables,
        words=lambda result: f"{result['identical']} of {result['prompts']} prompts as the native cache",
    )
)
