"""The page of the suite `cost`: a table and a picture of what every lossy setting costs and saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.markdown import NONE, cell, table, unique

ROUNDING = 1e-7  # nats: differences of float32 logits alone


def section(lines: Sequence[dict], model: str) -> str:
    cases = [line for line in lines if line["workload"] == "cost" and line["model"] == model]
    if not cases:
        return ""
    done = [line for line in cases if line["status"] == "ok"]
    lengths = unique(tokens for line in done for row in line["result"]["rows"] for tokens in row.get("needles", ()))
    rows = [
        row
        for line in cases
        for row in (
            [_row(row, lengths) for row in line["result"]["rows"]]
            if line["status"] == "ok"
            else [[line["system"], cell(line, str)]]
        )
    ]
    head = ["setting", "perplexity", "of the baseline", "mean KL, nats", "same likeliest token"]
    head += [f"needles found, {tokens} tokens" for tokens in lengths]
    head += ["tokens read", "mass dropped: mean", "worst", "KV on the GPU, of paged bf16"]
    return f"**Cost of the lossy strategies, {cases[0]['dtype']}**\n\n{_note(done)}\n\n" + table(head, rows)


def _row(row: dict, lengths: Sequence[str]) -> list[str]:
    if "error" in row:
        return [row["label"], row["error"]]
    needles = []
    for tokens in lengths:
        rates = row["needles"].get(tokens)
        worst = f" (worst depth {min(rates.values()):.0%})" if rates else ""
        needles.append(f"{sum(rates.values()) / len(rates):.0%}{worst}" if rates else NONE)
    kept, mean, worst = (row[name] for name in ("kept_tokens_mean", "dropped_mass_mean", "dropped_mass_worst"))
    return [
        row["label"],
        f"{row['perplexity']:.3f}",
        f"{row['perplexity'] / row['baseline_perplexity'] - 1:+.2%}",
        f"{row['mean_kl']:.2e}" if row["mean_kl"] > ROUNDING else "0 (rounding)",
        f"{row['top1_agreement']:.1%}",
        *needles,
        f"{kept:.0f}" if kept else "all",
        f"{mean:.2e}" if kept else NONE,
        f"{worst:.2e}" if kept else NONE,
        f"{row['gpu_share']:.3f}",
    ]


def _note(done: Sequence[dict]) -> str:
    if not done:
        return ""
    result, params = done[-1]["result"], done[-1]["params"]
    length = result["prompt"] + result["judged"] // result["texts"]
    return (
        f"Natural text, {result['texts']} stretches of {length + 1} tokens; judged are the last {result['judged']}, "
        f"each behind at least {result['prompt']} others, against the native cache's logits. Top-N and mass are for "
        "decode steps: the judged tokens were fed one at a time, and what is before them, like a needle's prompt, was "
        "computed exactly. Window, int8 and fp8 are lossy from the first token on. KL: of the native cache's "
        "next-token distribution from the strategy's. Needles: "
        f"{len(params['depths'])} depths x {len(params['seeds'])} seeds, chat form, greedy. Tokens read: those whose V "
        "a head reads in a step, on average; the mass is that of the softmax. KV on the GPU: bytes of a context of "
        "this length in bfloat16, as a share of the plain block pool's; V on the host not counted."
    )


def in_words(line: dict) -> str:
    rows = [row for row in line["result"]["rows"] if "error" not in row]
    return ", ".join(f"{row['label']}: KL {row['mean_kl']:.1e}" for row in rows)


def plot(lines: Sequence[dict], folder: Path) -> list[Path]:
    """KL and perplexity against the tokens whose V is read, for every machine and model; int8 and fp8 as levels."""
    import matplotlib

    matplotlib.use("Agg")
    cases = [line for line in lines if line["workload"] == "cost" and line["status"] == "ok"]
    written = []
    for device, model in unique((line["device"], line["model"]) for line in cases):
        rows = {
            row["label"]: row
            for line in sorted(cases, key=lambda line: line["time"])
            if (line["device"], line["model"]) == (device, model)
            for row in line["result"]["rows"]
            if "error" not in row
        }
        path = folder / f"cost-{device}-{model}.png".lower()
        if _figure(list(rows.values()), f"{model}, {device}", path):
            written.append(path)
    return written


def _kind(row: dict) -> str:
    name = "mass" if "mass" in row["options"] else "top-N"
    return name + (", renormalised" if row["options"].get("renormalise") else "")


def _figure(rows: Sequence[dict], title: str, path: Path) -> bool:
    from matplotlib import pyplot

    chosen = [row for row in rows if row["kept_tokens_mean"]]
    if not chosen:
        return False
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, name in zip(axes, ("mean_kl", "perplexity"), strict=True):
        for kind, mark in zip(unique(map(_kind, chosen)), ("o-", "^-", "s--"), strict=False):
            line = sorted((row["kept_tokens_mean"], row[name]) for row in chosen if _kind(row) == kind)
            axis.plot(*zip(*line, strict=True), mark, label=kind)
        levels = [row for row in rows if row["label"] in ("int8", "fp8")]
        for index, row in enumerate(levels):
            axis.axhline(row[name], color=f"C{index + 3}", linestyle=":", label=row["label"])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(xlabel="tokens whose V a head reads")
    axes[0].set(yscale="log", ylabel="mean KL from the native cache, nats")
    axes[1].axhline(rows[0]["baseline_perplexity"], color="k", linestyle="--", linewidth=0.8, label="native")
    axes[1].set(ylabel="perplexity")
    axes[1].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True
