"""The pictures beside the tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.lines import Found, file_name, machine_of, write_whole
from bench.markdown import unique
from bench.report import charts


def comparison(lines: list[dict], folder: Path) -> list[Path]:
    """A picture for every machine, model and dtype: throughput, peak memory, and decode step against context."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for machine in unique(machine_of(line) for line in lines):
        own = [line for line in lines if machine_of(line) == machine]
        found = Found(own)
        device = own[0]["device"]
        for model, dtype in unique((line["model"], line["dtype"]) for line in own if line["workload"] == "throughput"):
            path = folder / picture_of(device, model, dtype)
            if _compared(found, model, dtype, f"{model}, {dtype}, {machine}", path):
                written.append(path)
    return written


def picture_of(device: str, model: str, dtype: str) -> str:
    return f"{file_name(device, model, dtype)}.png".lower()


def _compared(found: Found, model: str, dtype: str, title: str, path: Path) -> bool:
    from matplotlib import pyplot

    throughput = {
        system: line["result"]
        for system, line in found.of("throughput", model, dtype).items()
        if line["status"] == "ok"
    }
    context = {
        system: [point for point in line["result"]["points"] if point.get("step")]
        for system, line in found.of("context", model, dtype).items()
        if line["status"] == "ok"
    }
    if not throughput:
        return False
    colours = charts.colours([*throughput, *context])
    figure, (speed, memory, steps) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    names = list(throughput)[::-1]
    speed.barh(names, [throughput[n]["tokens_per_second"]["median"] for n in names], color=[colours[n] for n in names])
    speed.set(xlabel="tokens/s, ragged batch")
    memory.barh(names, [throughput[n]["peak"] / 1e9 for n in names], color=[colours[n] for n in names])
    memory.set(xlabel="peak memory, GB", yticklabels=[])
    for system, points in context.items():
        lengths = [point["context"] for point in points]
        steps.plot(lengths, [p["step"]["median"] * 1e3 for p in points], "o-", color=colours[system])
    if context and "read" in found.limits:
        points = next(iter(context.values()))
        floor = [point["step_bytes"] / found.limits["read"] * 1e3 for point in points]
        steps.plot([point["context"] for point in points], floor, "k--", label="all bytes / read bandwidth")
        steps.legend(fontsize="small")
    steps.set(xlabel="context, tokens (colours as beside)", ylabel="decode step, ms", yscale="log")
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)
    return True


def cost(lines: Sequence[dict], folder: Path) -> list[Path]:
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
        path = folder / f"{file_name('cost', device, model)}.png".lower()
        if _costs(list(rows.values()), f"{model}, {device}", path):
            written.append(path)
    return written


def _kind(row: dict) -> str:
    name = "mass" if "mass" in row["options"] else "top-N"
    return name + (", renormalised" if row["options"].get("renormalise") else "")


def _costs(rows: Sequence[dict], title: str, path: Path) -> bool:
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
    _save(figure, path)
    return True


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    write_whole(path, lambda draft: figure.savefig(draft, dpi=110, metadata={"Software": None}))
    pyplot.close(figure)
