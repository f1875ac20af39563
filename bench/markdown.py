"""Cells and tables of Markdown: what every page of the report is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

NONE = "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def cell(line: dict | None, show: Callable[[dict], str]) -> str:
    """What a case found; where it failed, that."""
    if line is None:
        return NONE
    if line["status"] == "skipped":
        return "not run"
    if line["status"] != "ok":
        return f"{line['status']}: {line['error']}"
    return show(line["result"])


def spread(values: dict, scale: float, digits: int) -> str:
    """The median of repeats, and where there were several the smallest and largest."""
    median, low, high = (values[name] * scale for name in ("median", "min", "max"))
    if values["repeats"] == 1:
        return f"{median:.{digits}f}"
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def unique(items: Iterable) -> list:
    return list(dict.fromkeys(items))
