"""Cells and tables of Markdown: what every page of the report is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

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


def milliseconds(values: dict, digits: int = 2) -> str:
    return spread(values, 1e3, digits)


def unique(items: Iterable) -> list:
    return list(dict.fromkeys(items))


def by_system(lines: Mapping[str, dict], columns: Mapping[str, Callable[[dict], str]]) -> str:
    """A row for each system, a column for each function of its result; a failed case is a row that says why."""
    rows = [[system, *(cell(line, show) for show in columns.values())] for system, line in lines.items()]
    return table(["system", *columns], rows) if rows else ""


def of_points(
    points: Iterable[dict], columns: Mapping[str, Callable[[dict], str]], num_names: int = 1
) -> list[list[str]]:
    """A row a point, a cell for each function of it; one that failed has its first `num_names` cells, and says why."""
    shows = [*columns.values()]
    return [
        [*(show(point) for show in shows[:num_names]), point["error"], *[""] * (len(shows) - num_names - 1)]
        if "error" in point
        else [show(point) for show in shows]
        for point in points
    ]


def points_in_words(points: Iterable[dict], name: Callable[[dict], str], show: Callable[[dict], str]) -> str:
    """For the terminal: each point by its name and what `show` says of it, or why it failed."""
    return ", ".join(f"{name(point)}: {point['error'] if 'error' in point else show(point)}" for point in points)


def of_each(workload: str, show: Callable[[dict], str]) -> Callable[..., str]:
    """The tables of a workload whose lines stand alone: `show` of the parameters and result of each that is done."""

    def tables(found, model: str) -> str:
        done = [line for line in found.of(workload, model).values() if line["status"] == "ok"]
        return "\n\n".join(show(line["params"] | line["result"]) for line in done)

    return tables
