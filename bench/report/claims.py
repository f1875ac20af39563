"""What each workload must reach and what it reached: one table for all of a page that claim something."""

from __future__ import annotations

from bench.lines import Found
from bench.markdown import NONE, cell, table
from bench.workload import WORKLOADS, Claim


def section(found: Found, model: str) -> str:
    """The table of claims with its heading; empty where nothing is claimed."""
    rows = claims(found, model)
    if not rows:
        return ""
    note = "Ratios of medians, both sides measured in one process."
    if not found.on_gpu:
        note += " The figures to reach are for the Llama-2-7B shape on a GPU: here the same is shown, and not judged."
    return f"**What must be reached**\n\n{note}\n\n{rows}"


def claims(found: Found, model: str) -> str:
    """The table of claims alone; empty where none of the workloads ran on `model`."""
    rows = [
        row
        for workload in WORKLOADS.values()
        for line in found.of(workload.name, model).values()
        for claim in workload.claims
        for row in _rows(claim, line)
    ]
    return table(["strategy", "what", "must reach", "reached", ""], rows) if rows else ""


def _rows(claim: Claim, line: dict) -> list[list[str]]:
    if line["status"] != "ok":
        return [[line["workload"], _loosely(claim.what, line["params"]), claim.target, cell(line, str), ""]]
    rows = []
    for found in claim.of(line):
        value = claim.value(found)
        shown, verdict = (NONE, "not run") if value is None else (claim.shown.format(value), claim.verdict(value))
        if "gpu" not in line["machine"]:
            verdict = NONE
        rows.append([line["workload"], claim.what.format(**found), claim.target, shown, verdict])
    return rows


class _Unknown(dict):
    def __missing__(self, name: str) -> str:
        return "..."


def _loosely(what: str, params: dict) -> str:
    """The text of a claim whose case has failed: there may be no number for it."""
    return what.format_map(_Unknown(params))
