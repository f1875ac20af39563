"""From result lines to `comparison_table.md` and plots (`make report`, `python -m bench report`). Nothing is typed.

Every machine has its own section, every model its own tables. Of several runs of the same case the latest counts.
A case that failed, or that this machine cannot run, is a row that says why.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bench import report_claims, report_cost, report_limit
from bench.markdown import NONE, cell, spread, table, unique

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parent.parent / "README.md"
MARKS = ("<!-- made by make report -->", "<!-- end -->")
COMPARISON = ("default", "equality")  # suites that make comparison_table.md; any other makes <suite>_table.md
GENERATE_BATCH_NOTE = (
    "`generate_batch` runs on torch's SDPA here. With the flash-attn package it is several times faster upstream "
    "(1373 to 6729 tokens/s in transformers #42839)."
)


@dataclass(frozen=True)
class Key:
    workload: str
    system: str
    model: str
    dtype: str


def read(folder: Path) -> list[dict]:
    """All result lines of a folder, in the order they were written, file by file."""
    return [
        json.loads(text)
        for path in sorted(folder.glob("*.jsonl"))
        for text in path.read_text().splitlines()
        if text.strip()
    ]


def write(folder: Path = RESULTS) -> Path:
    """Writes the tables and plots of all lines in `folder` there. Returns the path of the comparison table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = read(folder)
    path = page_of("default", folder)
    compared = [line for line in lines if line["suite"] in COMPARISON]
    path.write_text(render(compared, "Comparison of KV-cache strategies"))
    for suite in sorted({line["suite"] for line in lines} - set(COMPARISON)):
        own = [line for line in lines if line["suite"] == suite]
        text = render(own, f"Suite {suite}", f"`make bench SUITE={suite}`")
        page_of(suite, folder).write_text(text)
    plot(compared, folder)
    report_cost.plot(lines, folder)
    if folder == RESULTS:
        README.write_text(with_headline(README.read_text(), lines))
    return path


def page_of(suite: str, folder: Path) -> Path:
    """Where the tables of a suite stand."""
    return folder / ("comparison_table.md" if suite in COMPARISON else f"{suite}_table.md")


def with_headline(readme: str, lines: list[dict]) -> str:
    """The README with its picture and table, between the two marks, made anew: from the largest model on a GPU, else
    from what there is."""
    compared = [line for line in lines if line["suite"] in COMPARISON]
    throughput = [line for line in compared if line["workload"] == "throughput" and line["status"] == "ok"]
    if not throughput:
        return readme
    best = max(throughput, key=lambda line: ("gpu" in line["machine"], line["result"]["parameter_bytes"]))
    section = Machine([line for line in compared if _machine(line) == _machine(best)])
    model, dtype, picture = best["model"], best["dtype"], _picture(best["device"], best["model"], best["dtype"])
    text = [
        f"![{model}: throughput, memory and decode step](bench/results/{picture})",
        f"{model} ({dtype}) on {_machine(best)}. All tables, conditions and losses: "
        "[bench/results/comparison_table.md](bench/results/comparison_table.md).",
        section.comparison(model, dtype).split("\n\n", 1)[1],
    ]
    if limit := _newest_on_a_gpu(lines, "limit", model):
        text += [
            f"Against the limits of the card: {model}, bfloat16, rows x tokens of context, on {_machine(limit[-1])} "
            "(`make bench SUITE=limit`; the whole table, attention alone and query groups in it: "
            "[bench/results/limit_table.md](bench/results/limit_table.md); what is missed and why: "
            "[bench/limit_notes.md](bench/limit_notes.md)).",
            report_limit.headline(limit, model, [line for line in limit if line["workload"] == "machine"]),
        ]
    if measured := _newest_on_a_gpu(lines, "strategies", model):
        text += [
            f"What each strategy is for, on {_machine(measured[-1])}, against the figure it was built to reach, both "
            "sides of a ratio in one process (`make bench SUITE=strategies`, "
            "[bench/results/strategies_table.md](bench/results/strategies_table.md)):",
            report_claims.claims(measured, model),
        ]
    begin, rest = readme.split(MARKS[0])
    _, end = rest.split(MARKS[1])
    return "\n\n".join([begin + MARKS[0], *text, MARKS[1] + end])


def _newest_on_a_gpu(lines: list[dict], suite: str, model: str) -> list[dict]:
    """The lines of a suite on the GPU that ran it on `model` last, oldest first; none where none did."""
    ran = [line for line in lines if line["suite"] == suite and "gpu" in line["machine"]]
    measured = [line for line in ran if line["model"] == model and line["status"] == "ok"]
    newest = max(measured, key=lambda line: line["time"], default=None)
    own = [line for line in ran if newest is not None and _machine(line) == _machine(newest)]
    return sorted(own, key=lambda line: line["time"])


def render(lines: list[dict], title: str, command: str = "`make bench`") -> str:
    """The whole page, from result lines alone."""
    parts = [f"# {title}", f"Measured by {command}, written by `make report` from the `.jsonl` files beside it."]
    for machine in unique(_machine(line) for line in lines):
        own = [line for line in lines if _machine(line) == machine]
        parts += [f"## {machine}", Machine(own).render()]
    if not lines:
        parts.append("No results yet: run `make bench`.")
    return "\n\n".join(part for part in parts if part) + "\n"


class Machine:
    """The section of one machine."""

    def __init__(self, lines: list[dict]) -> None:
        self.latest: dict[Key, dict] = {}
        for line in sorted(lines, key=lambda line: line["time"]):
            self.latest[Key(line["workload"], line["system"], line["model"], line["dtype"])] = line
        self.lines = list(self.latest.values())
        every_limit = [line for line in lines if line["workload"] == "machine" and line["status"] == "ok"]
        self.every_limit = sorted(every_limit, key=lambda line: line["time"])
        limits = [line for line in self.lines if line["workload"] == "machine" and line["status"] == "ok"]
        self.limits: dict[str, float] = limits[-1]["result"]["limits"] if limits else {}

    def render(self) -> str:
        parts = [self.conditions(), self.limits_line()]
        for model in self._models():
            parts.append(f"### {model}")
            if model.endswith("-random"):
                parts.append("Random weights: the shape only, for speed and memory. Its tokens mean nothing.")
            dtypes = unique(line["dtype"] for line in self.lines if self._is_speed(line) and line["model"] == model)
            for dtype in dtypes:
                parts += [self.comparison(model, dtype), self.memory(model, dtype)]
                parts += [self.latency("context", model, dtype), self.latency("batch", model, dtype)]
                parts.append(self.busy(model, dtype))
            parts += [self.accuracy(model), self.sharing(model), self.pressure(model)]
            parts += [report_claims.section(self.lines, model), report_cost.section(self.lines, model)]
            parts.append(report_limit.section(self.lines, model, self.every_limit))
        parts.append(self.not_measured())
        return "\n\n".join(part for part in parts if part)

    def _models(self) -> list[str]:
        return unique(line["model"] for line in self.lines if line["workload"] != "machine")

    def _is_speed(self, line: dict) -> bool:
        return line["workload"] in ("throughput", "context", "batch", "busy")

    def _of(self, workload: str, model: str, dtype: str | None = None) -> dict[str, dict]:
        """System -> its line."""
        found = [line for line in self.lines if line["workload"] == workload and line["model"] == model]
        return {line["system"]: line for line in found if dtype is None or line["dtype"] == dtype}

    # --- conditions

    def conditions(self) -> str:
        versions = unique(
            ", ".join(f"{name} {value}" for name, value in line["versions"].items() if value) for line in self.lines
        )
        commits = unique(line["commit"] + (" with local changes" if line["dirty"] else "") for line in self.lines)
        about = self.lines[-1]["machine"]
        days = sorted({line["time"][:10] for line in self.lines})
        return (
            f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; {'; '.join(versions)}; "
            f"commit {', '.join(commits)}; {' to '.join(unique([days[0], days[-1]]))}."
        )

    def limits_line(self) -> str:
        names = {
            "read": "memory read",
            "copy": "copy (read + write)",
            "host_to_device": "pinned host to device",
            "device_to_host": "device to host",
        }
        measured = [f"{text} {self.limits[name] / 1e9:.1f} GB/s" for name, text in names.items() if name in self.limits]
        return f"Measured limits: {', '.join(measured)}." if measured else ""

    # --- the main table

    def comparison(self, model: str, dtype: str) -> str:
        throughput, context = self._of("throughput", model, dtype), self._of("context", model, dtype)
        accuracy = self._of("accuracy", model, "float32") or self._of("accuracy", model)
        hits = {
            system: line
            for workload in ("accuracy", "sharing")
            for system, line in self._of(workload, model).items()
            if "hit_rate" in line.get("result", {})
        }
        systems = unique([*throughput, *context])
        if not throughput:
            return ""
        rows = []
        for system in systems:
            line = throughput.get(system)
            rows.append(
                [
                    system,
                    cell(line, lambda result: f"{result['peak'] / 1e9:.2f}"),
                    cell(line, lambda result: spread(result["tokens_per_second"], 1, 1)),
                    cell(accuracy.get(system), lambda result, system=system: _equality(result, system)),
                    self._beyond_4k(context, system),
                    cell(hits.get(system), lambda result: f"{result['hit_rate']:.0%} of repeated prompts"),
                ]
            )
        sample = next((line["result"] for line in throughput.values() if line["status"] == "ok"), None)
        params = next(iter(throughput.values()))["params"]
        lengths, new_tokens = params["lengths"], params["new_tokens"]
        text = (
            f"Batch: {len(lengths)} requests of {min(lengths)} to {max(lengths)} tokens, {new_tokens} new each, greedy."
        )
        if sample:
            text += f" Weights: {sample['parameter_bytes'] / 1e9:.2f} GB."
        on_gpu = any("gpu" in line["machine"] for line in self.lines)
        peak = "`torch.cuda.max_memory_allocated`" if on_gpu else "peak resident size of the process"
        text += f" Peak memory: {peak}, weights included. Throughput: generated tokens over total time, median"
        text += " (smallest to largest)."
        if any(line["status"] == "ok" for system, line in throughput.items() if system == "generate_batch"):
            text += " " + GENERATE_BATCH_NOTE
        head = ["system", "peak memory (GB)", "throughput (tokens/s)", "equal to baseline", "handles > 4k tokens"]
        return f"**All systems, {dtype}**\n\n{text}\n\n" + table([*head, "shared across requests"], rows)

    def _beyond_4k(self, context: dict[str, dict], system: str) -> str:
        def points(line: dict | None) -> dict[int, dict]:
            ran = line["result"]["points"] if line and line["status"] == "ok" else []
            return {point["context"]: point for point in ran if point["context"] > 4096}

        line, own, native = context.get(system), points(context.get(system)), points(context.get("baseline"))
        if not own:
            return cell(line, lambda result: NONE)
        done = [length for length, point in own.items() if "error" not in point]
        if not done:
            return "; ".join(f"{length}: {point['error']}" for length, point in own.items())
        length = max(done)
        same = system != "baseline" and own[length]["tokens"] == native.get(length, {}).get("tokens")
        return f"yes, {length}" + (", tokens as baseline" if same else "")

    # --- tables around it

    def memory(self, model: str, dtype: str) -> str:
        rows = []
        for system, line in self._of("throughput", model, dtype).items():
            result = line.get("result", {})
            kv = result.get("kv")
            if not kv:
                continue
            allocated = result.get("kv_allocated")
            rows.append(
                [
                    system,
                    f"{kv['bytes'] / 1e6:.1f}",
                    f"{allocated / 1e6:.1f}" if allocated else NONE,
                    f"{kv['bytes'] / result['parameter_bytes']:.2f}",
                    str(kv["tokens"]),
                    str(kv["places"]),
                    f"{1 - kv['tokens'] / kv['places']:.1%}" if kv["places"] else NONE,
                ]
            )
        head = ["system", "KV memory (MB)", "by the allocator", "KV / weights", "tokens held", "token places", "wasted"]
        note = "KV memory of the same batch at its fullest moment; wasted: places that hold no token."
        return rows and f"**KV memory, {dtype}**\n\n{note}\n\n" + table(head, rows)

    def latency(self, workload: str, model: str, dtype: str) -> str:
        lines = self._of(workload, model, dtype)
        points = unique(tuple(point) for line in lines.values() for point in line["params"]["points"])
        if not points:
            return ""
        rows = []
        for system, line in lines.items():
            if line["status"] != "ok":
                rows.append([system, cell(line, str)] + [""] * (len(points) - 1))
                continue
            found = {(point["batch"], point["context"]): point for point in line["result"]["points"]}
            rows.append([system, *(self._point(found.get(point), workload) for point in points)])
        if workload == "context":
            head = ["system", *(f"{context}" for _, context in points)]
            title, what = "One request against context length", "TTFT ms / decode step ms"
        else:
            head = ["system", *(f"{batch} x {context}" for batch, context in points)]
            title, what = "Decode step against batch size (requests x context)", "decode step ms / tokens/s"
        bandwidth = " (share of the limit: bytes of weights and KV that had to move / read bandwidth / time)"
        return f"**{title}, {dtype}**\n\n{what}{bandwidth if self.limits else ''}.\n\n" + table(head, rows)

    def _point(self, point: dict | None, workload: str) -> str:
        if point is None:
            return NONE
        if "error" in point:
            return point["error"]
        step = point["step"]
        if step is None:
            return f"{point['ttft']['median'] * 1e3:.1f} / {NONE}"
        first = f"{point['ttft']['median'] * 1e3:.1f} / " if workload == "context" else ""
        rate = "" if workload == "context" else f" / {point['batch'] / step['median']:.1f}"
        return f"{first}{step['median'] * 1e3:.2f}{rate}{self._share(point)}"

    def _share(self, point: dict) -> str:
        if "read" not in self.limits:
            return ""
        return f" ({point['step_bytes'] / self.limits['read'] / point['step']['median']:.2f})"

    def busy(self, model: str, dtype: str) -> str:
        rows = []
        for system, line in self._of("busy", model, dtype).items():
            rows.append(
                [
                    system,
                    cell(line, lambda result: f"{result['batch']} x {result['context']}"),
                    cell(line, lambda result: f"{result['busy_share']:.1%}"),
                    cell(line, lambda result: ", ".join(f"{name} {part:.0%}" for name, part in result["kernels"][:3])),
                ]
            )
        head = ["system", "requests x context", "GPU busy", "heaviest kernels (share of GPU time)"]
        return rows and f"**GPU busy share while decoding, {dtype}**\n\n" + table(head, rows)

    def accuracy(self, model: str) -> str:
        rows = []
        for line in self.lines:
            if line["workload"] == "accuracy" and line["model"] == model and line["status"] == "ok":
                result = line["result"]
                parts = result["divergence"]
                first = NONE
                if parts:
                    first = f"prompt of {parts['prompt_length']} tokens, new token {parts['token']}"
                margin = f"{parts['margin']:.2g}" if parts and parts["margin"] is not None else NONE
                same = f"{result['identical']} of {result['prompts']}"
                again = f"{result['identical_again']} of {result['prompts']}" if "identical_again" in result else NONE
                hit = f"{result['hit_rate']:.1%}" if "hit_rate" in result else NONE
                rows.append([line["system"], line["dtype"], same, first, margin, hit, again])
        note = (
            "Greedy tokens of a ragged batch against the native DynamicCache with each prompt alone. "
            "Margin: by how much the logits of the two tokens differ where they first part."
        )
        head = ["system", "dtype", "prompts identical", "first divergence", "margin"]
        head += ["hit rate when sent again", "same tokens then"]
        return rows and f"**Equality**\n\n{note}\n\n" + table(head, rows)

    def sharing(self, model: str) -> str:
        def samples(result: dict) -> str:
            return f"{result['samples']}: {result['blocks_together']} instead of {result['blocks_apart']}"

        rows = [
            [system, cell(line, samples)]
            for system, line in self._of("sharing", model).items()
            if "hit_rate" not in line.get("result", {})
        ]
        return rows and "**Parallel samples**\n\n" + table(["system", "samples of one prompt: blocks in use"], rows)

    def pressure(self, model: str) -> str:
        rows = []
        for system, line in self._of("pressure", model).items():
            rows.append(
                [
                    system,
                    cell(line, lambda result: f"{result['blocks_given']} of {result['blocks_needed']}"),
                    cell(line, lambda result: f"{result['finished']} of {result['requests']}"),
                    cell(line, lambda result: str(result["preemptions"])),
                    cell(line, lambda result: f"{result['identical']} of {result['requests']}"),
                ]
            )
        head = ["system", "blocks given of needed", "finished", "preemptions", "tokens as with room for all"]
        return rows and "**Out of memory: a pool too small for all requests at once**\n\n" + table(head, rows)

    def not_measured(self) -> str:
        missing = {line["system"]: line["error"] for line in self.lines if line["status"] == "skipped"}
        rows = [["all", system, "", "", "not run", error] for system, error in missing.items()]
        rows += [
            [line["workload"], line["system"], line["model"], line["dtype"], line["status"], line["error"]]
            for line in self.lines
            if line["status"] not in ("ok", "skipped")
        ]
        head = ["workload", "system", "model", "dtype", "status", "reason"]
        return rows and "### Failed, or not run here\n\n" + table(head, rows)


def in_words(line: dict) -> str:
    """One line for the terminal when a case is done."""
    if line["status"] != "ok":
        return f"{line['status']}: {line['error']}"
    result = line["result"]
    match line["workload"]:
        case "machine":
            return ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in result["limits"].items())
        case "accuracy":
            return f"{result['identical']} of {result['prompts']} prompts as the native cache"
        case "throughput":
            return f"{result['tokens_per_second']['median']:.1f} tokens/s, peak {result['peak'] / 1e9:.2f} GB"
        case "context" | "batch":
            steps = [point["step"] for point in result["points"] if point.get("step")]
            return "decode step " + ", ".join(f"{step['median'] * 1e3:.1f}" for step in steps) + " ms"
        case "sharing":
            if "hit_rate" in result:
                return f"{result['hit_rate']:.0%} of repeated prompts not computed again"
            return f"{result['samples']} samples in {result['blocks_together']} blocks, not {result['blocks_apart']}"
        case "pressure":
            return f"{result['finished']} of {result['requests']} finished, {result['preemptions']} preemptions"
        case "busy":
            return f"GPU busy {result['busy_share']:.1%}"
        case "cost":
            return report_cost.in_words(line)
        case workload if workload in report_limit.WORKLOADS:
            return report_limit.in_words(line)
        case workload if workload in report_claims.DETAILS:
            return report_claims.in_words(line)
    return "done"


def _equality(result: dict, system: str) -> str:
    if result["divergence"] is None:
        return "yes" if system != "baseline" else "yes (padded batch)"
    text = f"{result['identical']} of {result['prompts']} prompts"
    margin = result["divergence"]["margin"]
    return text if margin is None else f"{text}; margin {margin:.2g}"


def _machine(line: dict) -> str:
    about = line["machine"]
    return about.get("gpu") or f"CPU: {about['cpu']}, {about['cores']} cores"


# --- plots


def plot(lines: list[dict], folder: Path) -> list[Path]:
    """A picture for every machine, model and dtype: throughput, peak memory, and decode step against context."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for machine in unique(_machine(line) for line in lines):
        own = [line for line in lines if _machine(line) == machine]
        section = Machine(own)
        device = own[0]["device"]
        for model, dtype in unique((line["model"], line["dtype"]) for line in own if line["workload"] == "throughput"):
            path = folder / _picture(device, model, dtype)
            if _figure(section, model, dtype, f"{model}, {dtype}, {machine}", path):
                written.append(path)
    return written


def _picture(device: str, model: str, dtype: str) -> str:
    return f"{device}-{model}-{dtype}.png".lower()


def _figure(section: Machine, model: str, dtype: str, title: str, path: Path) -> bool:
    from matplotlib import pyplot

    throughput = {
        system: line["result"]
        for system, line in section._of("throughput", model, dtype).items()
        if line["status"] == "ok"
    }
    context = {
        system: [point for point in line["result"]["points"] if point.get("step")]
        for system, line in section._of("context", model, dtype).items()
        if line["status"] == "ok"
    }
    if not throughput:
        return False
    colours = {system: f"C{i % 10}" for i, system in enumerate(unique([*throughput, *context]))}
    figure, (speed, memory, steps) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    names = list(throughput)[::-1]
    speed.barh(names, [throughput[n]["tokens_per_second"]["median"] for n in names], color=[colours[n] for n in names])
    speed.set(xlabel="tokens/s, ragged batch")
    memory.barh(names, [throughput[n]["peak"] / 1e9 for n in names], color=[colours[n] for n in names])
    memory.set(xlabel="peak memory, GB", yticklabels=[])
    for system, points in context.items():
        lengths = [point["context"] for point in points]
        steps.plot(lengths, [p["step"]["median"] * 1e3 for p in points], "o-", color=colours[system], label=system)
    if context and "read" in section.limits:
        points = next(iter(context.values()))
        floor = [point["step_bytes"] / section.limits["read"] * 1e3 for point in points]
        steps.plot([point["context"] for point in points], floor, "k--", label="bytes / read bandwidth")
    if context:
        steps.legend(fontsize="small")
    steps.set(xlabel="context, tokens", ylabel="decode step, ms", ylim=(0, None))
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    print(write())
