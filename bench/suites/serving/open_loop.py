"""Requests arrive by themselves: how long is the first token held up, and each of the next?"""

from __future__ import annotations

from collections.abc import Iterable

from bench.case import Bench, Case
from bench.lines import Found
from bench.serving import arrivals_of, open_for, serve, waits
from bench.suites.limit.table import GQA, Row, rows_table
from bench.workload import Target, Workload, register

#: requests/s -> TTFT at p50 and p90, ITL at p50, p90 and p99, ms: what must be reached, and vLLM's.
REACH = {
    9: ({"ttft": {"p50": 34, "p90": 85}, "itl": {"p90": 11}}, {"ttft": (37, 94, 157), "itl": (7.7, 14.0, 40.7)}),
    12: (
        {"ttft": {"p50": 38, "p90": 95}, "itl": {"p50": 7.5, "p90": 14, "p99": 42}},
        {"ttft": (42, 108, 168), "itl": (8.5, 16.6, 48.6)},
    ),
}
#: Lengths (mu, sigma, least, most) of prompts and answers: a chat's, short ones many and long ones few.
PROMPTS, ANSWERS = (6.6, 0.9, 32, 6000), (5.0, 0.6, 16, 600)
#: name -> options of `Runner`; each a case. The target is what half of the steps keep, p99 is to be at 42 ms.
SYSTEMS: dict[str, dict] = {
    "paged": {"warm_up": True},
    "paged, target ITL 36 ms": {"warm_up": True, "target_itl": 0.036},
    "paged, short prompts first": {"warm_up": True, "shortest_first": 0.0001},
    "generate_batch": {},
}


def run_open_loop(bench: Bench) -> dict:
    """Each rate, after a warm-up and a round of other requests. Nothing of a prompt is known before."""
    warm = arrivals_of(bench, bench.params["rates"][-1], seed=100)
    system = open_for(bench, warm)
    bench.say("a round to warm up")
    serve(system, warm)
    rows = []
    for rate in bench.params["rates"]:
        bench.say(f"{rate} requests/s")
        arrivals = arrivals_of(bench, rate, seed=int(rate * 10))
        moments = serve(system, arrivals)
        seconds = max(row[-1] for row in moments)
        tokens = sum(map(len, moments))
        rows.append({"rate": rate, "tokens_per_second": tokens / seconds, **waits(arrivals, moments)})
    return {"rows": rows}


def cases(to: Target) -> Iterable[Case]:
    if to.on_gpu:
        dtype, model, timeout = "bfloat16", to.model or GQA, 900  # which the peer comes near to
        params = {"rates": [9, 12], "requests": 200, "slots": 128, "chunk": 2048, "prompts": PROMPTS}
        params |= {"answers": ANSWERS}
    else:
        dtype, model, timeout = "float32", to.model, 300
        params = {"rates": [2], "requests": 8, "slots": 8, "chunk": 256, "prompts": (4.0, 0.7, 16, 200)}
        params |= {"answers": (2.0, 0.4, 4, 16)}
    for name, options in SYSTEMS.items():
        yield to.case(name, dtype, params | {"options": options}, timeout=timeout, model=model)


def tables(found: Found, model: str) -> str:
    rows, native, own = [], {}, []
    for line in found.of("open loop", model).values():
        if line["status"] != "ok":
            rows.append(Row(f"open loop, {line['system']}", None, f"{line['status']}: {line['error']}"))
        elif line["system"] == "generate_batch":
            native = {row["rate"]: row for row in line["result"]["rows"]}
        else:
            own += [(line["system"], row) for row in line["result"]["rows"]]
    for system, row in own:
        rows += _rows(system, row, native.get(row["rate"], {}), found.on_gpu and model == GQA)
    note = (
        "Poisson arrivals; prompts and answers of lognormal lengths; a request waits from when it was due. Native: "
        "`generate_batch` under the same driver."
    )
    return f"**Open loop**\n\n{note}\n\n{rows_table(rows)}" if rows else ""


def _rows(system: str, own: dict, native: dict, is_compared: bool) -> Iterable[Row]:
    most, vllm = REACH.get(own["rate"], ({}, {})) if is_compared else ({}, {})
    for name, title in (("ttft", "TTFT"), ("itl", "ITL")):
        for place, at in enumerate(("p50", "p90", "p99")):
            yield Row(
                f"{system}, {own['rate']:g} requests/s: {title} {at}", most.get(name, {}).get(at),
                own[name][at] * 1e3, "{:.1f} ms", at_most=True,
                native=f"{native[name][at] * 1e3:.1f} ms" if native else "",
                vllm=f"{vllm[name][place]} ms" if name in vllm else "",
            )  # fmt: skip


def _words(result: dict) -> str:
    def waited(row: dict, what: str) -> str:
        return f"{what.upper()} p90 {row[what]['p90'] * 1e3:.1f} ms"

    return "; ".join(f"{row['rate']:g}/s: {waited(row, 'ttft')}, {waited(row, 'itl')}" for row in result["rows"])


register(
    Workload(
        "open loop",
        run_open_loop,
        "requests arrive by themselves: how long is the first token held up, and each of the next",
        cases={"limit": cases},
        tables=tables,
        words=_words,
    )
)
