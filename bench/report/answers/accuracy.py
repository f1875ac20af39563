"""What is lost: against the native cache, and by bytes of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.markdown import NONE, unique
from bench.report.answers.measured import Answer, Measured


def eight_bits(measured: Measured) -> Answer | None:
    lines, rows = _losses(measured, ("int8", "fp8"))
    if not rows:
        return None
    text = "; ".join(
        f"`{row['label']}` changes perplexity by {_more(row)} and keeps the likeliest token at "
        f"{row['top1_agreement']:.1%} of all places (mean KL {row['mean_kl']:.1e} nats)"
        for row in rows
    )
    text += "."
    line = measured.of("8 bits").get("int8")
    for name in ("int8", "fp8"):
        found = line["result"][name] if line else {"error": "not run"}
        if "error" not in found:
            plain = line["result"]["paged"]
            text += (
                f" {name} holds {plain['bytes_per_token'] / found['bytes_per_token']:.2f} times the tokens, and a step "
                f"takes {found['step']['median'] / plain['step']['median']:.2f} of the time ({line['model']})."
            )
    shown = [[row["label"], _more(row), f"{row['mean_kl']:.1e}", f"{row['top1_agreement']:.1%}"] for row in rows]
    head = ["setting", "perplexity", "mean KL, nats", "same likeliest token"]
    return Answer(text, [*lines, *filter(None, [line])], _text_judged(lines), head, shown)


def full_precision(measured: Measured) -> Answer | None:
    lines = [line for line in measured.all("accuracy") if line["model"] == measured.all("accuracy")[0]["model"]]
    if not lines:
        return None
    texts = []
    for dtype in unique(line["dtype"] for line in lines):
        found = [(line["system"], line["result"]) for line in lines if line["dtype"] == dtype]
        same = [f"`{name}`" for name, result in found if result["identical"] == result["prompts"]]
        others = [f"`{n}` {r['identical']} of {r['prompts']}" for n, r in found if r["identical"] < r["prompts"]]
        parts = [f"{', '.join(same)} give the tokens of the native cache for every prompt"] * bool(same)
        parts += [f"of prompts with the same tokens there are {', '.join(others)}"] * bool(others)
        texts.append(f"In {dtype}, {'; '.join(parts)}.")
    rows = [
        [line["system"], line["dtype"], f"{result['identical']} of {result['prompts']}", *_parting(result)]
        for line in lines
        for result in [line["result"]]
    ]
    head = ["system", "dtype", "prompts with the same tokens", "first difference", "margin of logits there"]
    lengths = [length for line in lines for length in line["params"].get("lengths", ())]
    about = f"prompts of {min(lengths)} to {max(lengths)} tokens, greedy, each alone as reference" if lengths else ""
    return Answer(" ".join(texts), lines, about, head, rows)


def _losses(measured: Measured, strategies: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """Lines, and of them the settings of these strategies that were judged; of `cost` where it ran."""
    for workload in ("cost", "quality"):
        lines = measured.all(workload)
        pairs = [
            (line, row)
            for line in lines
            for row in line["result"]["rows"]
            if row["strategy"] in strategies and "mean_kl" in row
        ]
        if pairs:
            return _each_once(line for line, _ in pairs), [row for _, row in pairs]
    return [], []


def _each_once(lines: Iterable[dict]) -> list[dict]:
    return list({id(line): line for line in lines}.values())


def _parting(result: dict) -> list[str]:
    parts = result["divergence"]
    if parts is None:
        return ["none", "0"]
    margin = parts["margin"]
    return [f"new token {parts['token']}", NONE if margin is None else f"{margin:.2g}"]


def _more(row: dict) -> str:
    return f"{row['perplexity'] / row['baseline_perplexity'] - 1:+.2%}"


def _text_judged(lines: Sequence[dict]) -> str:
    judged = lines[0]["result"].get("judged")
    return f"natural text, {judged} tokens judged" if judged else "natural text"
