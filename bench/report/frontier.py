"""What is paid for what: every strategy and setting a point, of a model, a machine and a length; `frontier.csv`.

    kv_bytes   accuracy against the bytes that a request holds on the GPU
    step_ms    accuracy against the time of a decode step, one request
    itl_ms     tokens a second against the time between tokens, a batch

A point is dominated in a picture where another is at least as good in both ways, and better in one. The exact baseline
is a point like others. Models with random weights have no accuracy, only the last picture.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from bench.lines import Found, machine_of, write_whole
from bench.markdown import unique
from bench.suites.quality import of_the_latest_tasks
from bench.tasks import power

PICTURES = {"kv_bytes": "accuracy", "step_ms": "accuracy", "itl_ms": "tokens_per_s"}  # less is better: more is better
COLUMNS = [
    *("model", "dtype", "machine", "commit", "length", "batch", "strategy", "setting", "kv_bytes", "accuracy"),
    *("low", "high", "step_ms", "tokens_per_s", "itl_ms", "dominated"),
]


def rows(lines: Sequence[dict]) -> list[dict]:
    """One dict of COLUMNS a point, None where nothing was measured.

    `accuracy` is the share of all samples of tasks that count, `low` and `high` its 95 % interval. `dominated` names
    the pictures in which the point is, joined by spaces.
    """
    points = []
    for machine in unique(map(machine_of, lines)):
        found = Found([line for line in lines if machine_of(line) == machine])
        for line in of_the_latest_tasks(found.lines):
            if line["status"] == "ok" and line["workload"] in _POINTS:
                about = {name: line[name] for name in ("model", "dtype", "commit")} | {"machine": machine}
                points += [dict.fromkeys(COLUMNS) | about | point for point in _POINTS[line["workload"]](line)]
    for point in points:
        group = [other for other in points if all(other[name] == point[name] for name in _COMPARED)]
        point["dominated"] = " ".join(x for x, y in PICTURES.items() if any(_beats(o, point, x, y) for o in group))
    return points


def write(lines: Sequence[dict], folder: Path) -> Path | None:
    """Writes `frontier.csv` where there is a point."""
    found = rows(lines)
    if not found:
        return None

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(found)

    write_whole(folder / "frontier.csv", write)
    return folder / "frontier.csv"


_COMPARED = ("model", "dtype", "machine", "length")


def _beats(other: dict, point: dict, x: str, y: str) -> bool:
    if None in (other[x], other[y], point[x], point[y]):
        return False
    at_least = other[x] <= point[x] and other[y] >= point[y]
    return at_least and (other[x], other[y]) != (point[x], point[y])


def _quality(line: dict) -> list[dict]:
    points = []
    batch = line["params"]["batch"]
    for row in line["result"]["rows"]:
        for form, right in row.get("right", {}).items():
            marks = "".join(right.values())
            low, high = power.interval(marks.count("1"), len(marks)) if marks else (None, None)
            points.append(
                {
                    "length": line["params"]["length"],
                    "batch": batch,
                    "strategy": row["strategy"],
                    "setting": row["label"] + ", question hidden" * (form == "hidden"),
                    "kv_bytes": row["kv_bytes"],
                    "accuracy": marks.count("1") / len(marks) if marks else None,
                    "low": low,
                    "high": high,
                    "step_ms": row["step"]["median"] * 1e3,
                    "tokens_per_s": batch / row["batch_step"]["median"],
                    "itl_ms": row["batch_step"]["median"] * 1e3,
                }
            )
    return points


def _batch(line: dict) -> list[dict]:
    """Of the workload `batch`: the same context, more and more rows."""
    return [
        {
            "length": point["context"],
            "batch": point["batch"],
            "strategy": line["system"],
            "setting": f"batch {point['batch']}",
            "step_ms": point["step"]["median"] * 1e3 if point["batch"] == 1 else None,
            "tokens_per_s": point["batch"] / point["step"]["median"],
            "itl_ms": point["step"]["median"] * 1e3,
        }
        for point in line["result"]["points"]
        if point.get("step")
    ]


_POINTS = {"quality": _quality, "batch": _batch}
