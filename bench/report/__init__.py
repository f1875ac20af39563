"""From result lines to tables, plots, one page of both, and the README's table (`python -m bench report`). Nothing is
typed.

Every machine has its own section, every model its own tables. Of several runs of the same case the latest counts.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from bench import lines, machine, records
from bench.lines import file_name, write_whole
from bench.report import frontier, losses, page, plots, questions, readme, web
from kv_strategies.losses import PATH as LOSSES

RESULTS = machine.ROOT / "bench" / "results"
README = machine.ROOT / "README.md"


def write(folder: Path = RESULTS) -> Path:
    """Writes the tables and plots of all lines in `folder` there, `report.html` with all of both, and every figure as
    `results.csv`. From the committed results it writes what others show of them, too: the README's table, and what
    `kv-strategies plan` says of losses. Returns the path of the comparison table.

    Raises:
        ValueError: a line that is no result; nothing is written then.
        OSError: a file that cannot be written; it is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = lines.read(folder)
    compared = [line for line in found if line["suite"] in page.COMPARISON]
    pages = {"default": page.render(compared, "Comparison of KV-cache strategies")}
    for suite in sorted({line["suite"] for line in found} - set(page.COMPARISON)):
        own = [line for line in found if line["suite"] == suite]
        pages[suite] = page.render(own, f"Suite {suite}", f"`make bench SUITE={suite}`")
    asked = questions.render(found)
    # a machine that only measures may lack what the page takes
    html = web.render(found, frontier.rows(found)) if importlib.util.find_spec("vl_convert") else None
    for suite, text in pages.items():
        write_whole(page_of(suite, folder), lambda path, text=text: path.write_text(text, encoding="utf-8"))
    write_whole(folder / "questions.md", lambda path: path.write_text(asked, encoding="utf-8"))
    plots.comparison(compared, folder)
    plots.cost(found, folder)
    frontier.write(found, folder)
    write_whole(folder / "results.csv", lambda path: records.write_csv(records.of_lines(found), path))
    if html:
        write_whole(folder / "report.html", lambda path: path.write_text(html, encoding="utf-8"))
    else:
        print("report.html is not written anew: that takes vl-convert-python", file=sys.stderr)
    if folder.resolve() == RESULTS:
        text = readme.with_headline(README.read_text(encoding="utf-8"), found, compared)
        write_whole(README, lambda path: path.write_text(text, encoding="utf-8"))
        losses.write(found, LOSSES)
    return page_of("default", folder)


def page_of(suite: str, folder: Path) -> Path:
    """Where the tables of a suite stand."""
    return folder / page.page_of(file_name(suite))
