"""Result lines as one flat table: a row for every figure, whatever the workload.

A spread (`measure.spread`) is one row with the smallest and largest beside the median. A figure inside a list is told
apart by what its neighbours say of it ("batch=1 context=4096"). Lists of plain numbers, such as tokens, are left out.
"""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.case import DEFAULT_MODEL
from bench.lines import Found, machine_of
from bench.markdown import unique

#: What tells the items of a list apart, where they have it.
NAMES = ("system", "label", "name", "shape", "batch", "context", "requests", "shared", "new", "tokens", "length")


@dataclass(frozen=True)
class Record:
    """One figure, in the unit that its workload gives it (bytes and seconds), and where it comes from."""

    machine: str
    model: str
    dtype: str
    suite: str
    workload: str
    system: str
    at: str
    measure: str
    value: float | None
    low: float | None
    high: float | None
    repeats: int | None
    status: str
    error: str
    commit: str
    time: str


def of_lines(lines: Iterable[dict]) -> list[Record]:
    """Of several runs of a case on a machine the latest."""
    lines = list(lines)
    machines = unique(machine_of(line) for line in lines)
    own = ([line for line in lines if machine_of(line) == machine] for machine in machines)
    return [record for found in own for line in Found(found).lines for record in of_line(line)]


def of_line(line: dict) -> Iterator[Record]:
    head = [machine_of(line), *(line[name] for name in ("model", "dtype", "suite", "workload", "system"))]
    commit = line["commit"][:12] + ("+" if line["dirty"] else "")
    tail = [line["status"], line.get("error", ""), commit, line["time"]]
    if line["status"] != "ok":
        yield Record(*head, "", "", None, None, None, None, *tail)
        return
    for at, measure, found in _figures(line["result"]):
        yield Record(*head, at, measure, *found, *tail)


def _figures(value: object, at: str = "", path: str = "") -> Iterator[tuple[str, str, tuple]]:
    """Where, what, and (median, smallest, largest, repeats)."""
    if isinstance(value, dict) and {"median", "min", "max", "repeats"} <= set(value):
        yield at, path, tuple(value[name] for name in ("median", "min", "max", "repeats"))
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _figures(inner, at, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        items = [item for item in value if isinstance(item, dict)]
        names = [_name(item) for item in items]
        for index, (item, name) in enumerate(zip(items, names, strict=True)):
            own = name if name and names.count(name) == 1 else f"{name} #{index}".strip()
            yield from _figures(_without_names(item), f"{at} {own}".strip(), path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield at, path, (value, None, None, None)


def _name(item: dict) -> str:
    return " ".join(f"{name}={item[name]}" for name in NAMES if isinstance(item.get(name), (str, int)))


def _without_names(item: dict) -> dict:
    return {name: value for name, value in item.items() if name not in NAMES or not isinstance(value, (str, int))}


def command(line: dict) -> str:
    """What measures it again."""
    if line["workload"] == "machine":
        only = "machine"
    else:
        names = " / ".join((line["workload"], line["system"], line["model"], line["dtype"]))
        only = re.sub(r"([()\[\]+*?^$|\\])", r"\\\1", names)
    model = "" if line["model"] == DEFAULT_MODEL else f" MODEL={shlex.quote(line['model'])}"
    return f"make bench SUITE={shlex.quote(line['suite'])} ONLY={shlex.quote(only)}{model}"


def write_csv(records: Iterable[Record], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)])
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)
