"""What the suites `cost` and `quality` say of lossy strategies, as `kv_strategies/losses.jsonl` takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.accuracy import MIN_JUDGED
from bench.lines import write_whole
from bench.tasks import power
from kv_strategies import STRATEGIES
from kv_strategies.losses import PERPLEXITY, SOLVED, Loss, lossy_parts


def losses(lines: Sequence[dict]) -> list[Loss]:
    """Of every setting, model, dtype, length and measure the figure of most samples, of as many the newest."""
    kept: dict[str, Loss] = {}
    for line in sorted(lines, key=lambda line: line["time"]):
        if line["status"] == "ok" and line["workload"] in _LENGTHS:
            for loss in _of(line):
                parts = lossy_parts(loss.strategy, loss.options)
                key = json.dumps([parts, loss.model, loss.dtype, loss.length, loss.measure])
                if key not in kept or loss.samples >= kept[key].samples:
                    kept[key] = loss
    return sorted(kept.values(), key=lambda loss: json.dumps(asdict(loss)))


def write(lines: Sequence[dict], path: Path) -> None:
    """One figure a line."""
    text = "".join(json.dumps(asdict(loss)) + "\n" for loss in losses(lines))
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


_LENGTHS = {
    "cost": lambda params: params["prompt"] + params["judged"],
    "quality": lambda params: params["length"],
}


def _of(line: dict) -> Iterator[Loss]:
    asked = line["result"].get("asked", {})
    for row in line["result"]["rows"]:
        if "error" in row or not set(row["strategy"].split("+")) <= set(STRATEGIES):
            continue
        if not lossy_parts(row["strategy"], row["options"]):
            continue
        length = _LENGTHS[line["workload"]](line["params"])
        about = (row["strategy"], row["options"], line["model"], line["dtype"], length)
        if row["num_judged"] >= MIN_JUDGED:
            yield Loss(*about, PERPLEXITY, row["perplexity"], row["baseline_perplexity"], row["num_judged"])
        for form, right in row.get("right", {}).items():
            marks, exact = "".join(right.values()), "".join(asked[task]["right"] for task in right)
            if marks:
                shares = marks.count("1") / len(marks), exact.count("1") / len(exact)
                interval = power.interval(marks.count("1"), len(marks))
                yield Loss(*about, SOLVED[form], *shares, len(marks), *interval, tasks=sorted(right))
