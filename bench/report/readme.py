"""The README's picture and tables, from the machine and model that show most."""

from __future__ import annotations

from collections import Counter

from bench.lines import Found, commits_of, hosts_of, machine_of
from bench.markdown import unique
from bench.report.claims import claims
from bench.report.comparison import comparison
from bench.suites.limit.table import headline

PICTURE = "bench/results/report-desktop.png"  # `make picture` takes it
#: What stands between such a mark and the next `END`: the picture and the table of all strategies; the figures.
TABLE, FIGURES = "<!-- table, made by make report -->", "<!-- figures, made by make report -->"
END = "<!-- end -->"


def with_headline(readme: str, lines: list[dict], compared: list[dict]) -> str:
    """The README with what stands between its marks made anew: from the largest model on a GPU among the lines
    `compared`, else from what there is: from the machine that ran most of it, or did last."""
    throughput = [line for line in compared if line["workload"] == "throughput" and line["status"] == "ok"]
    if not throughput:
        return readme
    shown = Counter((machine_of(line), line["model"]) for line in throughput)
    best = max(
        throughput,
        key=lambda line: (
            "gpu" in line["machine"],
            line["result"]["parameter_bytes"],
            shown[machine_of(line), line["model"]],
            line["time"],
        ),
    )
    found = Found([line for line in compared if machine_of(line) == machine_of(best)])
    model, dtype = best["model"], best["dtype"]
    table = [
        f"![The page of all results: comparison, step and first token of every strategy]({PICTURE})",
        f"{model} ({dtype}) on {machine_of(best)}{_with(throughput, best, model)}. All tables, conditions and losses: "
        "[bench/results/comparison_table.md](bench/results/comparison_table.md); every figure: "
        "[bench/results/results.csv](bench/results/results.csv); `make report` writes the page above, "
        "`bench/results/report.html`, which needs no network.",
        comparison(found, model, dtype).split("\n\n", 1)[1],
    ]
    figures = []
    if limit := _on_a_gpu(lines, "limit", model, machine_of(best)):
        figures += [
            f"Against the limits of the card: {model}, bfloat16, rows x tokens of context, on {machine_of(limit[-1])}"
            f"{_with(limit, limit[-1], model)} (`make bench SUITE=limit`; the whole table, attention alone and query "
            "groups in it: [bench/results/limit_table.md](bench/results/limit_table.md); what is missed and why: "
            "[docs/limits.md](docs/limits.md)).",
            headline(Found(limit), model),
        ]
    if measured := _on_a_gpu(lines, "strategies", model, machine_of(best)):
        dtypes = unique(line["dtype"] for line in measured if line["model"] == model and line["workload"] != "machine")
        figures += [
            f"What each strategy is for: {model}, {', '.join(dtypes)}, on {machine_of(measured[-1])}"
            f"{_with(measured, measured[-1], model)}, against the figure it was built to reach, both sides of a ratio "
            "in one process (`make bench SUITE=strategies`, "
            "[bench/results/strategies_table.md](bench/results/strategies_table.md)):",
            claims(Found(measured), model),
        ]
    return _between(_between(readme, TABLE, table), FIGURES, figures)


def _with(lines: list[dict], shown: dict, model: str) -> str:
    """The hosts and commits behind a model's table, on the machine of the line `shown`; a ratio to what waits for its
    host is that host's.
    """
    own = [line for line in lines if machine_of(line) == machine_of(shown) and line["model"] == model]
    own = [line for line in Found(own).lines if line["workload"] != "machine"]
    return f" (host {hosts_of(own)}; commit {commits_of(own)})" if "gpu" in shown["machine"] else ""


def _between(readme: str, mark: str, text: list[str]) -> str:
    begin, rest = readme.split(mark)
    _, end = rest.split(END, 1)
    return "\n\n".join([begin + mark, *text, END + end])


def _on_a_gpu(lines: list[dict], suite: str, model: str, machine: str) -> list[dict]:
    """The lines of a suite on this GPU, or else on the one that ran it on `model` last, oldest first; none where none
    did.
    """
    ran = [line for line in lines if line["suite"] == suite and "gpu" in line["machine"]]
    measured = [line for line in ran if line["model"] == model and line["status"] == "ok"]
    chosen = max(measured, key=lambda line: (machine_of(line) == machine, line["time"]), default=None)
    own = [line for line in ran if chosen is not None and machine_of(line) == machine_of(chosen)]
    return sorted(own, key=lambda line: line["time"])
