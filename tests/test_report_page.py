"""The page in a real browser: it draws, sorts and filters without a network, and says all of it without scripts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from bench import lines, report
from bench.__main__ import main
from bench.report import browse, web
from bench.report.browse import DESKTOP, PHONE, opened

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of the committed results."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(web.render(lines.read(report.RESULTS)), encoding="utf-8")
    return path


@pytest.fixture(scope="class")
def page(path):
    with opened(path) as page:
        yield page


def texts(page, selector):
    return page.eval_on_selector_all(selector, "found => found.map(one => one.textContent)")


def test_it_is_one_small_file(path):
    assert path.stat().st_size < web.LARGEST
    outside = re.findall(r'(?:src|href)="(?!#)[^"]+"', re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.S))
    assert not outside


class TestDrawn:
    def test_every_plot_is_drawn(self, page):
        drawn = json.loads(page.locator("#data").text_content())["charts"]
        assert {"step", "ttft", "roofline", "memory", "loss", "concurrency"} <= set(drawn)
        assert {row["workload"] for row in drawn["step"]["data"]["values"]} == {"context", "long context"}
        for name, spec in drawn.items():
            marks = page.locator(f"#plot-{name} svg .mark-symbol path, #plot-{name} svg .mark-line path").count()
            assert marks > 0 and spec["data"]["values"], name
            assert all(row["command"].startswith("make bench ") and row["commit"] for row in spec["data"]["values"])
        assert not page.problems

    def test_hover_says_value_command_and_commit(self, page):
        page.locator("#plot-memory .mark-symbol path").first.hover(force=True)
        tip = page.locator("#vg-tooltip-element.visible")
        tip.wait_for(timeout=10_000)
        said = tip.text_content()
        assert "tokens/s" in said and "make bench SUITE=" in said and "commit" in said

    def test_tables_sort_both_ways(self, page):
        first_number = re.compile(r"-?[\d.]+")

        def column():
            shown = texts(page, "#comparison tbody tr:not([hidden]) td:nth-child(3)")
            return [float(found[0]) for text in shown if (found := first_number.match(text))], shown

        button = page.locator("#comparison th:nth-child(3) button")
        button.click()
        up, shown = column()
        assert up == sorted(up) and len(up) > 3 and page.get_attribute("#comparison th:nth-child(3)", "aria-sort")
        button.click()
        down, shown_again = column()
        assert down == sorted(down, reverse=True) and sorted(shown) == sorted(shown_again)
        assert shown_again[0] not in ("-", "not run")  # what there is none of comes last, whichever way

    def test_filters_leave_what_was_asked_for(self, page):
        for name, value in (("system", "int8"), ("workload", "context")):
            before = page.locator("body").get_attribute("data-drawn")
            page.select_option(f"[data-filter={name}]", value)
            page.wait_for_function(f"document.body.dataset.drawn > {before}")
        rows = page.locator("#points tbody tr:not([hidden])")
        assert rows.count() > 0
        assert set(rows.evaluate_all("rows => rows.map(row => row.dataset.system + row.dataset.workload)")) == {
            "int8context"
        }
        assert page.get_attribute("#plot-step", "data-drawn") == "1"
        for name in ("system", "workload"):
            before = page.locator("body").get_attribute("data-drawn")
            page.select_option(f"[data-filter={name}]", "")
            page.wait_for_function(f"document.body.dataset.drawn > {before}")
        assert int(page.get_attribute("#plot-step", "data-drawn")) > 3

    def test_block_tables_move(self, page):
        grids = set()
        for step in range(int(page.get_attribute("#step", "max")) + 1):
            move = "(slider, step) => { slider.value = step; slider.dispatchEvent(new Event('input')); }"
            page.locator("#step").evaluate(move, step)
            grids.add("".join(texts(page, "#grid i")) + page.locator("#moment").text_content())
        assert len(grids) > 5


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_in_light_and_dark(path, size, scheme):
    with opened(path, size, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        widths = page.eval_on_selector_all("figure:not(.empty) svg", "found => found.map(s => s.clientWidth)")
        assert all(0 < width <= size[0] for width in widths)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", background)[:3]))
        assert brightness > 600 if scheme == "light" else brightness < 150
        assert not page.problems


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows = 0

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"


def test_without_scripts_tables_and_pictures_are_there(path):
    cells = Cells()
    cells.feed(re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.S))
    with opened(path, scripts=False) as page:
        assert page.locator("tr:visible").count() == cells.rows > 200
        assert page.locator("figure svg:visible").count() == page.locator("figure").count()
        assert not page.locator("#filters").is_visible() and not page.locator("#player").is_visible()


def test_the_picture(path, tmp_path):
    for picture in browse.take_pictures(path, tmp_path):
        assert picture.stat().st_size > 20_000


def test_a_picture_takes_what_plots_there_are(tmp_path, capsys):
    assert main(["picture", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"bench: there is no {tmp_path / 'report.html'}: run `make report` first\n"
    few, none = tmp_path / "report.html", tmp_path / "none.html"
    none.write_text(web.render([]))
    few.write_text(web.render([line for line in lines.read(report.RESULTS) if line["workload"] == "batching"][:1]))
    with opened(few) as page:
        assert page.locator("figure:not(.empty)").count() < 4
    for found in (few, none):
        assert all(picture.stat().st_size > 5_000 for picture in browse.take_pictures(found, tmp_path))


def test_a_page_that_is_not_shown_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "report.html").write_text("")
    monkeypatch.setattr(browse, "LONGEST", 100)
    assert main(["picture", "--out", str(tmp_path)]) == 1
    assert f"bench: no picture of {tmp_path / 'report.html'}: TimeoutError" in capsys.readouterr().err


def test_no_browser_is_said(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"no browser found .* apt-get install chromium"):
        browse.chromium()


def test_a_frontier_is_drawn_with_what_it_dominates(tmp_path):
    point = {"model": "m", "dtype": "bfloat16", "machine": "a card", "commit": "0123", "length": 4096, "batch": 1}
    costs = {"kv_bytes": 10, "step_ms": 5.0, "itl_ms": None, "low": 0.8, "high": 1.0, "tokens_per_s": 200.0}
    best = point | costs | {"strategy": "paged", "setting": "paged", "accuracy": 0.9, "dominated": ""}
    worse = best | {"setting": "worse", "kv_bytes": 20, "accuracy": 0.5, "dominated": "kv_bytes step_ms"}
    path = tmp_path / "report.html"
    path.write_text(web.render([], [best, worse]), encoding="utf-8")
    with opened(path) as page:
        for name in ("kv_bytes", "step_ms"):
            marks = page.locator(f"#plot-frontier-{name} svg .mark-symbol.role-mark path")
            assert marks.evaluate_all("marks => marks.map(m => getComputedStyle(m).opacity)") == ["1", "0.3"]
        assert page.locator("#plot-frontier-itl_ms").count() == 0 and not page.problems


def test_no_results_are_a_page_as_well(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(web.render([]), encoding="utf-8")
    with opened(path) as page:
        assert "Not measured yet." in page.locator("main").text_content() and not page.problems
