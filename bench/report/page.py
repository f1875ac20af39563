"""A page: a section for every machine, in it the tables of every model, from result lines alone."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import bench.suites.all  # noqa: F401  registers the workloads
from bench.lines import Found, commits_of, hosts_of, machine_of
from bench.markdown import table, unique
from bench.measure import reason
from bench.report import claims
from bench.report.comparison import comparison
from bench.workload import WORKLOADS

COMPARISON = ("default", "equality")  # suites that share a page


def page_of(suite: str) -> str:
    """The name of the file with the tables of a suite."""
    return "comparison_table.md" if suite in COMPARISON else f"{suite}_table.md"


def render(lines: Sequence[dict], title: str, command: str = "`make bench`") -> str:
    parts = [f"# {title}", f"Measured by {command}, written by `make report` from the `.jsonl` files beside it."]
    for machine in unique(machine_of(line) for line in lines):
        found = Found([line for line in lines if machine_of(line) == machine])
        parts += [f"## {machine}", section(found)]
    if not lines:
        parts.append("No results yet: run `make bench`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def section(found: Found) -> str:
    """The section of one machine."""
    parts = [conditions(found), limits(found)]
    for model in found.models():
        parts.append(f"### {model}")
        dtypes = {line["dtype"] for line in found.lines if line["model"] == model and line["workload"] != "machine"}
        if len(dtypes) == 1:  # else the tables say which is which
            parts.append(f"All in {dtypes.pop()}.")
        if model.endswith("-random"):
            parts.append("Random weights: the shape only, for speed and memory. Its tokens mean nothing.")
        with blame(f"{model} on {machine_of(found.lines[0])}"):
            parts += [comparison(found, model, dtype) for dtype in found.dtypes("throughput", model)]
            parts += [claims.section(found, model), *tables(found, model)]
    parts += [not_measured(found), not_known(found)]
    return "\n\n".join(part for part in parts if part)


@contextmanager
def blame(of: str) -> Iterator[None]:
    """A table that does not find what it shows says whose results these are."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"the results of {of} are not what {Path(at.filename).name} shows ({reason(error)}): were they written by "
            "another version of the bench? Delete those lines or measure again"
        ) from error


def tables(found: Found, model: str) -> list[str]:
    """Of all workloads that ran on `model`, in the order of their registration; once where several share them."""
    ran = {line["workload"] for line in found.lines if line["model"] == model}
    return [show(found, model) for show in unique(w.tables for w in WORKLOADS.values() if w.tables and w.name in ran)]


def conditions(found: Found) -> str:
    versions = unique(
        ", ".join(f"{name} {value}" for name, value in line["versions"].items() if value) for line in found.lines
    )
    days = sorted({line["time"][:10] for line in found.lines})
    dates = " to ".join(unique([days[0], days[-1]]))
    return f"{hosts_of(found.lines)}; {'; '.join(versions)}; commit {commits_of(found.lines)}; {dates}."


def limits(found: Found) -> str:
    names = {
        "read": "memory read",
        "copy": "copy (read + write)",
        "host_to_device": "pinned host to device",
        "device_to_host": "device to host",
    }
    measured = [f"{text} {found.limits[name] / 1e9:.1f} GB/s" for name, text in names.items() if name in found.limits]
    return f"Measured limits: {', '.join(measured)}." if measured else ""


def not_measured(found: Found) -> str:
    missing = {line["system"]: line["error"] for line in found.lines if line["status"] == "skipped"}
    rows = [["all", system, "", "", "not run", error] for system, error in missing.items()]
    rows += [
        [line["workload"], line["system"], line["model"], line["dtype"], line["status"], line["error"]]
        for line in found.lines
        if line["status"] not in ("ok", "skipped")
    ]
    head = ["workload", "system", "model", "dtype", "status", "reason"]
    return "### Failed, or not run here\n\n" + table(head, rows) if rows else ""


def not_known(found: Found) -> str:
    names = unique(line["workload"] for line in found.lines if line["workload"] not in WORKLOADS)
    if not names:
        return ""
    return f"Not shown, since no workload of this name is known here (`--load MODULE`): {', '.join(names)}."
