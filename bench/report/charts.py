"""The plots of the page as Vega-Lite specifications: JSON that says what is drawn, and holds the figures itself.

Every mark says on hover what it is, the command that measures it again, and the commit. A plot has no size or colours
of a theme of its own: the page gives it both. See https://vega.github.io/vega-lite/docs/.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.lines import Found, machine_of
from bench.markdown import unique
from bench.records import command
from bench.systems import NATIVE, in_order

#: Distinct on light and on dark, for as many systems as there are.
COLOURS = (
    "#54a24b", "#e45756", "#4c78a8", "#f58518", "#b279a2", "#d6a400", "#72b7b2", "#ff9da6",
    "#6f8fff", "#9d755d", "#00a8a8", "#c56cf0", "#2ca02c", "#bc5090", "#a0c000", "#c06040",
)  # fmt: skip
#: Of the native ones, which stand back.
NATIVE_COLOURS = ("#8e8e8e", "#a89880", "#7c8c98", "#a890a0", "#6a6a6a")
LIMIT = "limit of the machine"
CONTEXTS = ("context", "long context")  # workloads of one request against its length


@dataclass(frozen=True)
class Chart:
    """`spec["data"]["values"]` are rows with machine, model, system and workload, by which the page filters."""

    name: str
    title: str
    note: str
    spec: dict


def charts(found: Sequence[Found], frontier: Sequence[dict] = ()) -> list[Chart]:
    """All that have something to show, of the results of each machine.

    Args:
        frontier: points with model, dtype, machine, commit, length, batch, strategy, setting, `dominated` (the names of
            the pictures in which another point is better in both ways, joined by spaces) and what `FRONTIERS` draws.
    """
    points = [row for own in found for row in _points(own)]
    drawn = [
        _against("step", "Decode step against context", "context", "step_ms", "decode step, ms", points, *CONTEXTS),
        _against("ttft", "Time to first token against context", "context", "ttft_ms", "TTFT, ms", points, *CONTEXTS),
        _throughput([row for own in found for row in _batches(own)]),
        _roofline(points, [row for own in found for row in _limits(own, points)]),
        *(_frontier(name, frontier) for name in FRONTIERS),
        _against("batch", "Throughput of decode steps against batch", "batch", "rate", "tokens/s", points, "batch"),
        _concurrency([row for own in found for row in _concurrent(own)]),
        _loss([row for own in found for row in _losses(own)]),
        _memory([row for own in found for row in _replays(own)]),
    ]
    return [chart for chart in drawn if chart.spec["data"]["values"]]


def systems_of(charts: Sequence[Chart]) -> list[str]:
    return unique(row["system"] for chart in charts for row in chart.spec["data"]["values"] if row["system"] != LIMIT)


def colours(systems: Collection[str]) -> dict[str, str]:
    """A colour a system, the same in every plot."""
    own = [system for system in in_order(systems) if system not in NATIVE]
    found = {system: COLOURS[index % len(COLOURS)] for index, system in enumerate(own)}
    return dict(zip(NATIVE, NATIVE_COLOURS, strict=True)) | found


def with_rows(chart: Chart, rows: Sequence[dict], colours: dict[str, str]) -> dict:
    """The specification with these rows alone (the page does the same when it filters)."""
    left = unique(row["system"] for row in rows if row["system"] != LIMIT)
    palette = {"range": {"category": [colours[system] for system in left]}}
    return chart.spec | {"data": {"values": list(rows)}, "config": palette}


# --- rows


def _head(line: dict) -> dict:
    commit = line["commit"][:12] + (" with local changes" if line["dirty"] else "")
    names = ("model", "dtype", "workload", "system")
    return {"machine": machine_of(line), **{n: line[n] for n in names}, "command": command(line), "commit": commit}


def _ok(found: Found, *workloads: str) -> Iterator[dict]:
    return (line for line in found.lines if line["workload"] in workloads and line["status"] == "ok")


def _points(found: Found) -> Iterator[dict]:
    """Of decode steps at a batch and context: times in ms, bytes moved, and the share of the read bandwidth."""
    for line in _ok(found, *CONTEXTS, "batch", "decode"):
        for point in line["result"]["points"]:
            if "error" in point or not point.get("step"):
                continue
            step, ttft = point["step"], point.get("ttft")
            yield _head(line) | {
                "system": point.get("system", line["system"]),
                "batch": point["batch"],
                "context": point["context"],
                "step_ms": step["median"] * 1e3,
                "range": f"{step['min'] * 1e3:.3g} to {step['max'] * 1e3:.3g} ms of {step['repeats']}",
                "ttft_ms": ttft["median"] * 1e3 if ttft else None,
                "rate": point["batch"] / step["median"],
                "gigabytes": point["step_bytes"] / 1e9,
                "share": found.share(line, point["step_bytes"] / step["median"]),
            }


def _limits(found: Found, points: Iterable[dict]) -> Iterator[dict]:
    """The two ends of the line that no point can lie under."""
    if "read" not in found.limits:
        return
    line = next(line for line in reversed(found.lines) if line["workload"] == "machine")
    for model in found.models():
        own = [p["gigabytes"] for p in points if p["machine"] == machine_of(line) and p["model"] == model]
        for gigabytes in (min(own) * 0.8, max(own) * 1.25) if own else ():
            head = _head(line) | {"model": model, "system": LIMIT, "workload": ""}
            yield head | {"gigabytes": gigabytes, "step_ms": gigabytes * 1e12 / found.limits["read"]}


def _concurrent(found: Found) -> Iterator[dict]:
    for line in _ok(found, "concurrency"):
        for point in line["result"]["points"]:
            if "tokens_per_second" in point:
                yield _head(line) | {"requests": point["requests"], "rate": point["tokens_per_second"]}
    for line in _ok(found, "batching"):
        for batch in line["result"]["batches"]:
            if "tokens_per_second" in batch:
                rate = batch["tokens_per_second"]["median"]
                yield _head(line) | {"system": batch["system"], "requests": batch["requests"], "rate": rate}
    for line in _ok(found, "throughput"):
        rate = line["result"]["tokens_per_second"]["median"]
        yield _head(line) | {"requests": len(line["params"]["lengths"]), "rate": rate}


def _batches(found: Found) -> Iterator[dict]:
    for line in _ok(found, "throughput"):
        rate, peak = line["result"]["tokens_per_second"]["median"], line["result"]["peak"] / 1e9
        yield _head(line) | {"rate": rate, "peak_gb": peak}


def _losses(found: Found) -> Iterator[dict]:
    for line in _ok(found, "cost"):
        for row in line["result"]["rows"]:
            if "error" not in row:
                yield _head(line) | {
                    "system": row["strategy"],
                    "setting": row["label"],
                    "share": row["gpu_share"],
                    "perplexity": 100 * (row["perplexity"] / row["baseline_perplexity"] - 1),
                    "kl": max(row["mean_kl"], 1e-7),
                }


def _replays(found: Found) -> Iterator[dict]:
    for line in _ok(found, "replay"):
        result = line["result"]
        for seconds, blocks in zip(result["seconds"], result["blocks"], strict=True):
            used = len(blocks) - blocks.count(".") - blocks.count("-")
            yield _head(line) | {"seconds": seconds, "megabytes": used * result["bytes_per_block"] / 1e6}


#: What is paid, and what for: the name of each is drawn to the right, less is better; upwards more is.
FRONTIERS = {
    "kv_bytes": ("accuracy", "Accuracy against KV bytes", "KV bytes of a request on the GPU", "accuracy"),
    "step_ms": ("accuracy", "Accuracy against step time", "decode step, ms", "accuracy"),
    "itl_ms": ("tokens_per_s", "Throughput against ITL", "time between tokens of a request, ms", "tokens/s"),
}


# --- plots


def _field(name: str, title: str, kind: str = "quantitative", **options: object) -> dict:
    return {"field": name, "type": kind, "title": title, **options}


_COLOUR = _field("system", None, "nominal", sort=None, legend={"orient": "bottom", "columns": 4})


_IS_NATIVE = f"indexof({list(NATIVE)}, datum.system) >= 0"
_SHAPE = {"condition": {"test": _IS_NATIVE, "value": "square"}, "value": "circle"}
_NUMBERS = {"step_ms", "ttft_ms", "rate", "share", "gigabytes", "peak_gb", "kl", "perplexity", "seconds", "megabytes"}


def _tooltip(**shown: str) -> list[dict]:
    """Field -> its title; what every mark says stands around them."""
    ends = {name: name for name in ("workload", "model", "dtype", "machine", "command", "commit")}
    return [
        {"field": name, "title": title} | ({"format": ".4~g"} if name in _NUMBERS else {})
        for name, title in {"system": "system", **shown, **ends}.items()
    ]


_POINT = {"batch": "requests", "context": "context"}
_STEP = _POINT | {"step_ms": "decode step, ms", "range": "smallest to largest", "share": "share of the limit"}


def _spec(values: Sequence[dict], **parts: object) -> dict:
    return {"data": {"values": _in_order(values)}, "width": "container", "height": 300, **parts}


def _in_order(rows: Sequence[dict]) -> list[dict]:
    """A legend is as its rows are."""
    order = in_order([row["system"] for row in rows])
    return sorted(rows, key=lambda row: order.index(row["system"]))


def _against(name: str, title: str, x: str, y: str, what: str, points: Sequence[dict], *workloads: str) -> Chart:
    own = [p for p in points if p["workload"] in workloads and p[y] is not None]
    x_axis = _field(
        x, {"context": "context, tokens", "batch": "requests at a time"}[x], scale={"type": "log", "base": 2}
    )
    encoding = {
        "x": x_axis,
        "y": _field(y, what, scale={"type": "log", "nice": False, "padding": 12}),
        "color": _COLOUR,
        "strokeDash": {"condition": {"test": _IS_NATIVE, "value": [5, 4]}, "value": [1, 0]},
        "detail": [{"field": "machine"}, {"field": "model"}, {"field": "dtype"}, {"field": "workload"}],
        "tooltip": _tooltip(**(_POINT | {"ttft_ms": "TTFT, ms"} if name == "ttft" else _STEP | {"rate": "tokens/s"})),
    }
    spec = _spec(own, mark={"type": "line", "point": {"size": 60}, "strokeWidth": 2}, encoding=encoding)
    return Chart(name, title, "Both axes are logarithmic. Dashed: native caches.", spec)


def _frontier(x: str, points: Sequence[dict]) -> Chart:
    y, title, x_title, y_title = FRONTIERS[x]
    rows = [
        point
        | {"system": point["strategy"], "workload": "frontier", "is_dominated": x in (point["dominated"] or "").split()}
        | {"commit": point["commit"][:12], "command": "make report"}
        for point in points
        if point[x] is not None and point[y] is not None
    ]
    shown = {"setting": "setting", "length": "tokens", "batch": "requests", x: x_title, y: y_title}
    interval = {"low": "95 % from", "high": "to"} if y == "accuracy" else {}
    encoding = {
        "x": _field(x, x_title, scale={"type": "log", "nice": False, "padding": 12}, axis={"format": "~s"}),
        "y": _field(y, y_title),
        "color": _COLOUR,
        "shape": _field("length", "tokens", "ordinal", legend={"orient": "bottom"}),
        "opacity": {"condition": {"test": "datum.is_dominated", "value": 0.3}, "value": 1},
        "tooltip": _tooltip(**shown, **interval),
    }
    mark = {"type": "point", "filled": True, "size": 90}
    note = "Up and to the left is better; pale where another point is better in both ways."
    return Chart(f"frontier-{x}", title, note, _spec(rows, mark=mark, encoding=encoding))


def _concurrency(rows: Sequence[dict]) -> Chart:
    encoding = {
        "x": _field("requests", "requests at once", scale={"type": "log", "base": 2}),
        "y": _field("rate", "tokens/s", scale={"zero": True}),
        "color": _COLOUR,
        "shape": _field("workload", None, "nominal", legend={"orient": "bottom", "columns": 1}),
        "tooltip": _tooltip(requests="requests", rate="tokens/s"),
    }
    spec = _spec(rows, mark={"type": "point", "filled": True, "size": 90}, encoding=encoding)
    note = "Ragged batches, prefill included. In concurrency all wait from the start, and so many run at once."
    return Chart("concurrency", "Throughput against concurrency", note, spec)


def _roofline(points: Sequence[dict], limits: Sequence[dict]) -> Chart:
    scale = {"type": "log", "nice": False, "padding": 10}
    encoding = {
        "x": _field("gigabytes", "weights and KV a step has to read, GB", scale=scale),
        "y": _field("step_ms", "decode step, ms", scale=scale),
    }
    is_limit = f"datum.system == '{LIMIT}'"
    spec = _spec(
        [*points, *limits],
        encoding=encoding,
        layer=[
            {
                "transform": [{"filter": is_limit}],
                "mark": {"type": "line", "strokeDash": [6, 4], "strokeWidth": 2},
                "encoding": {"detail": [{"field": "machine"}, {"field": "model"}], "color": {"value": "#888888"}},
            },
            {
                "transform": [{"filter": f"!({is_limit})"}],
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.8},
                "encoding": {"color": _COLOUR, "shape": _SHAPE, "tooltip": _tooltip(**_STEP, gigabytes="GB to read")},
            },
        ],
    )
    note = (
        "The dashed line is the measured read bandwidth, over the weights and the K and V that a step has to read. On "
        "it, a step is all reading. Squares: native caches."
    )
    return Chart("roofline", "How near to the limit: time against bytes", note, spec)


def _throughput(rows: Sequence[dict]) -> Chart:
    encoding = {
        "x": _field("peak_gb", "peak memory, GB", scale={"zero": False, "padding": 40}),
        "y": _field("rate", "tokens/s", scale={"zero": True}),
        "color": _COLOUR,
    }
    point = {
        "mark": {"type": "point", "filled": True, "size": 100},
        "encoding": {"shape": _SHAPE, "tooltip": _tooltip(rate="tokens/s", peak_gb="peak, GB")},
    }
    above, beside = ({"type": "text", "fontSize": 11, **at} for at in ({"dy": -12}, {"dx": 10, "align": "left"}))
    names = [
        {"transform": [{"filter": where}], "mark": mark, "encoding": {"text": {"field": "label"}}}
        for where, mark in ((f"!({_IS_NATIVE})", above), (_IS_NATIVE, beside))
    ]
    spec = _spec(_labelled(rows), encoding=encoding, layer=[point, *names])
    note = "A ragged batch. Up and to the left is better. Squares: native caches."
    return Chart("memory", "Throughput against peak memory", note, spec)


def _labelled(rows: Sequence[dict]) -> list[dict]:
    """With a `label` each: the system, and those that nearly coincide with it, which then have none of their own."""
    found: list[dict] = []
    for row in _in_order(rows):
        own = [other for other in found if all(other[name] == row[name] for name in ("machine", "model", "dtype"))]
        near = (other for other in own if all(abs(other[n] / row[n] - 1) < 0.06 for n in ("rate", "peak_gb")))
        if first := next((other for other in near if other["label"]), None):
            first["label"] += f", {row['system']}"
        found.append(row | {"label": "" if first else row["system"]})
    return found


def _loss(rows: Sequence[dict]) -> Chart:
    encoding = {
        "x": _field(
            "share", "KV on the GPU, of the plain cache in 16 bits", axis={"format": "%"}, scale={"zero": True}
        ),
        "y": _field("kl", "mean KL from the native cache, nats", scale={"type": "log"}),
        "color": _COLOUR,
        "tooltip": _tooltip(setting="setting", kl="KL, nats", perplexity="perplexity, % more", share="KV, of plain"),
    }
    mark = {"type": "point", "filled": True, "size": 100}
    note = "Down and to the left is better; 1e-7 is the rounding of float32."
    return Chart("loss", "What is lost against what is saved", note, _spec(rows, mark=mark, encoding=encoding))


def _memory(rows: Sequence[dict]) -> Chart:
    encoding = {
        "x": _field("seconds", "seconds"),
        "y": _field("megabytes", "KV blocks in use, MB"),
        "color": _COLOUR,
        "tooltip": _tooltip(seconds="s", megabytes="MB"),
    }
    mark = {"type": "line", "interpolate": "step-after", "strokeWidth": 2}
    note = "One small batch through every strategy on a CPU; the block table below is of the same runs."
    return Chart("replay", "Memory against time", note, _spec(rows, mark=mark, encoding=encoding))
