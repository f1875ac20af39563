"""`report.html`: all results on one page that needs no network.

Everything is in the file: the tables as HTML, which are all there is without JavaScript; the plots as pictures, which
the same specifications then replace where JavaScript runs; Vega-Lite itself. Vega-Lite was chosen among maintained
libraries since a plot is JSON that Python writes and a test can read, since its whole bundle is 0.9 MB (plotly's is 4.5
MB, bokeh's 1.2 MB and needs a model of its own for every glyph), and since the package that brings the bundle,
vl-convert, draws the same specification without a browser.

    bench/report/web/   template.html, style.css, page.js: what the page looks like and does
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from bench.lines import Found, machine_of
from bench.markdown import NONE, spread, unique
from bench.records import command
from bench.report import comparison, predictions, questions
from bench.report.charts import Chart, charts, colours, systems_of, with_rows
from bench.report.page import blame

WEB = Path(__file__).parent / "web"
VEGA_LITE = "6.4"
LARGEST = 5_000_000  # bytes


def render(lines: Sequence[dict], frontier: Sequence[dict] = ()) -> str:
    """The page. `frontier` as `charts` takes it.

    Raises:
        ImportError: vl-convert-python is not installed.
        ValueError: results that are not what a plot or table shows.
    """
    with blame("this folder"):
        return _render(lines, frontier)


def _render(lines: Sequence[dict], frontier: Sequence[dict]) -> str:
    import vl_convert

    machines = unique(machine_of(line) for line in lines)
    found = [Found([line for line in lines if machine_of(line) == machine]) for machine in machines]
    drawn = charts(found, frontier)
    first = _headline(found)
    data = {
        "charts": {chart.name: chart.spec for chart in drawn},
        "colours": colours(systems_of(drawn)),
        "first": first,
        "replays": _replays(found),
    }
    return Template((WEB / "template.html").read_text(encoding="utf-8")).substitute(
        style=(WEB / "style.css").read_text(encoding="utf-8"),
        filters=_filters(lines),
        comparison=_comparison(found),
        charts="\n".join(_figure(chart, first, data["colours"]) for chart in drawn),
        questions=questions.as_html(lines),
        replays=_replay_table(found),
        points=_points(found),
        losses=_losses(found),
        predictions=_predictions(lines),
        data=_in_script(json.dumps(data, separators=(",", ":"))),
        vega=_in_script(vl_convert.javascript_bundle(vl_version=VEGA_LITE)),
        script=(WEB / "page.js").read_text(encoding="utf-8"),
    )


def _in_script(text: str) -> str:
    return re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE)


def _headline(found: Sequence[Found]) -> dict[str, str]:
    """What the page shows first: the largest model on a GPU, as the README does."""
    lines = [line for own in found for line in own.lines if line["workload"] == "throughput" and line["status"] == "ok"]
    if not lines:
        return {}
    best = max(lines, key=lambda line: ("gpu" in line["machine"], line["result"]["parameter_bytes"], line["time"]))
    return {"machine": machine_of(best), "model": best["model"]}


# --- tables


def table(name: str, head: Sequence[str], rows: Iterable[tuple[dict[str, str], Sequence[str]]]) -> str:
    """A table that sorts by its columns. A row is what it is filtered by, and its cells."""
    shown = []
    for about, cells in rows:
        data = "".join(f' data-{key}="{html.escape(value)}"' for key, value in about.items())
        hover = html.escape(f"{about.get('command', '')}\ncommit {about.get('commit', '')}")
        inner = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        shown.append(f'<tr{data} title="{hover}">{inner}</tr>')
    if not shown:
        return "<p>Not measured yet.</p>"
    titles = "".join(f'<th scope="col"><button type="button">{html.escape(title)}</button></th>' for title in head)
    return (
        f'<div class="scroll" tabindex="0"><table id="{name}"><thead><tr>{titles}</tr></thead>\n<tbody>'
        + "\n".join(shown)
        + "</tbody></table></div>"
    )


def _about(line: dict, system: str | None = None) -> dict[str, str]:
    commit = line["commit"][:12] + (" with local changes" if line["dirty"] else "")
    return {
        "machine": machine_of(line),
        "model": line["model"],
        "system": system or line["system"],
        "workload": line["workload"],
        "command": command(line),
        "commit": commit,
    }


def _comparison(found: Sequence[Found]) -> str:
    rows = []
    for own in found:
        for model in own.models():
            for dtype in own.dtypes("throughput", model):
                lines = own.of("context", model, dtype) | own.of("throughput", model, dtype)
                for cells in comparison.rows(own, model, dtype):
                    about = _about(lines[cells[0]]) | {"workload": "throughput"}
                    rows.append((about, [*cells, model, dtype, about["machine"]]))
    return table("comparison", [*comparison.HEAD, "model", "dtype", "machine"], rows)


_POINT_HEAD = (
    "system", "workload", "requests", "context", "TTFT (ms)", "decode step (ms)", "tokens/s", "of the limit",
    "peak (GB)", "model", "dtype", "machine",
)  # fmt: skip


def _points(found: Sequence[Found]) -> str:
    rows = []
    for own in found:
        for line in own.lines:
            if line["workload"] not in ("context", "batch", "decode") or line["status"] != "ok":
                continue
            for point in line["result"]["points"]:
                about = _about(line, point.get("system"))
                rows.append((about, [about["system"], line["workload"], *_figures(own, line, point)]))
                rows[-1][1].extend([line["model"], line["dtype"], about["machine"]])
    return table("points", _POINT_HEAD, rows)


def _figures(found: Found, line: dict, point: dict) -> list[str]:
    at = [str(point["batch"]), str(point["context"])]
    if "error" in point:
        return [*at, NONE, point["error"], NONE, NONE, NONE]
    step, ttft = point.get("step"), point.get("ttft")
    share = found.share(line, point["step_bytes"] / step["median"]) if step else None
    return [
        *at,
        spread(ttft, 1e3, 1) if ttft else NONE,
        spread(step, 1e3, 2) if step else NONE,
        f"{point['batch'] / step['median']:.1f}" if step else NONE,
        f"{share:.2f}" if share else NONE,
        f"{point['peak'] / 1e9:.2f}" if "peak" in point else NONE,
    ]


def _losses(found: Sequence[Found]) -> str:
    rows = []
    for own in found:
        for line in own.lines:
            if line["workload"] == "cost" and line["status"] == "ok":
                for row in line["result"]["rows"]:
                    about = _about(line, row.get("strategy"))
                    rows.append((about, [*_loss(row), line["model"], about["machine"]]))
    head = ["setting", "perplexity", "mean KL (nats)", "same likeliest token", "KV on the GPU", "model", "machine"]
    return table("losses", head, rows)


def _loss(row: dict) -> list[str]:
    if "error" in row:
        return [row["label"], row["error"], NONE, NONE, NONE]
    return [
        row["label"],
        f"{row['perplexity'] / row['baseline_perplexity'] - 1:+.2%}",
        f"{max(0.0, row['mean_kl']):.2g}",
        f"{row['top1_agreement']:.1%}",
        f"{row['gpu_share']:.1%}",
    ]


def _replays(found: Sequence[Found]) -> dict[str, dict]:
    """Strategy -> the steps of its small batch, of whoever recorded it last."""
    lines = [line for own in found for line in own.lines if line["workload"] == "replay" and line["status"] == "ok"]
    wanted = ("seconds", "blocks", "bytes_per_block", "block_size", "num_preemptions")
    return {
        line["system"]: {name: line["result"][name] for name in wanted}
        for line in sorted(lines, key=lambda line: line["time"])
    }


def _replay_table(found: Sequence[Found]) -> str:
    from bench.suites.replay import COLUMNS

    rows = [
        (_about(line), [line["system"], *(show(line["result"]) for show in COLUMNS.values())])
        for own in found
        for line in own.lines
        if line["workload"] == "replay" and line["status"] == "ok"
    ]
    return table("replays", ["system", *COLUMNS], rows)


def _predictions(lines: Sequence[dict]) -> str:
    compared = predictions.compare(lines)
    rows = []
    for one in compared:
        about = {"machine": one.machine, "model": one.model, "system": one.system, "workload": one.workload}
        about |= {"command": "make plan-check", "commit": ""}
        predicted, measured = one.in_words
        cells = [one.system, one.what, f"{one.workload}, {one.at}", predicted, measured, f"{one.error:+.1%}"]
        rows.append((about, [*cells, "" if one.is_within else "missed", one.model, one.machine]))
    head = ["system", "what", "workload", "predicted", "measured", "error", "", "model", "machine"]
    said = "".join(f"<li>{html.escape(line)}</li>" for line in predictions.summary(compared).splitlines())
    return f"<ul>{said}</ul>" + table("predictions", head, rows)


def _filters(lines: Sequence[dict]) -> str:
    measured = [line for line in lines if line["workload"] != "machine"]
    choices = {
        "machine": unique(map(machine_of, measured)),
        "model": unique(line["model"] for line in measured),
        "system": sorted(unique(line["system"] for line in measured)),
        "workload": sorted(unique(line["workload"] for line in measured)),
    }
    titles = {"system": "strategy"}
    return "\n".join(
        f'<label>{titles.get(name, name)} <select data-filter="{name}"><option value="">all</option>'
        + "".join(f"<option>{html.escape(value)}</option>" for value in values)
        + "</select></label>"
        for name, values in choices.items()
    )


# --- plots


def _figure(chart: Chart, first: dict[str, str], palette: dict[str, str]) -> str:
    """A plot, as a picture until JavaScript draws it: of what the page shows first, else of all."""
    import vl_convert

    values = chart.spec["data"]["values"]
    rows = [row for row in values if all(row[key] == value for key, value in first.items())] or values
    spec = with_rows(chart, rows, palette) | {"width": 420, "background": "white"}
    picture = vl_convert.vegalite_to_svg(json.dumps(spec), vl_version=VEGA_LITE)
    picture = re.sub(r"<svg ", f'<svg role="img" aria-label="{html.escape(chart.title)}" ', picture, count=1)
    return (
        f'<figure id="plot-{chart.name}"><h3>{html.escape(chart.title)}</h3><div class="plot">{picture}</div>'
        f'<figcaption>{html.escape(chart.note)} <span class="of"></span></figcaption></figure>'
    )
