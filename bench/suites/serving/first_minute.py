"""A process has just started: how soon is it ready, and how long do the first requests take, sent all at once?"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from bench.case import Bench, Case, ragged
from bench.lines import Found
from bench.serving import arrivals_of, open_for, serve, waits
from bench.suites.limit.first_token import no_compiled_kernels
from bench.suites.limit.table import GQA, MHA, Row, rows_table
from bench.suites.serving.open_loop import ANSWERS, PROMPTS
from bench.systems import Capacity, open_system
from bench.workload import Target, Workload, register

#: name -> options of `Runner`; each a case.
SYSTEMS: dict[str, dict] = {"paged": {}, "paged, warmed up": {"warm_up": True}, "generate_batch": {}}
#: Seconds for the first 200 requests at most, until ready at most, and vLLM's.
REACH = {"all": (12, "11.7 s"), "ready": (20, "60 to 75 s")}
#: Requests of a batch -> tokens/s at least, the first time in a process and again, and vLLM's.
BATCHES = {64: (3700, 4050, 3738), 256: (3800, 4050, 3727)}


def run_first_minute(bench: Bench) -> dict:
    """No kernel is compiled. `batches` are of (lengths, new tokens, places of the pool), each twice, by a runner as it
    is unless told otherwise: warmed up.
    """
    with no_compiled_kernels():
        if "batches" in bench.params:
            return {"batches": [_batch(bench, *batch) for batch in bench.params["batches"]]}
        return _start(bench)


def _start(bench: Bench) -> dict:
    start = time.perf_counter()
    bench.model  # noqa: B018
    loaded = time.perf_counter() - start
    arrivals = arrivals_of(bench, math.inf, seed=1)
    start = time.perf_counter()
    system = open_for(bench, arrivals)
    ready = loaded + time.perf_counter() - start
    moments = serve(system, arrivals)
    return {"load": loaded, "ready": ready, "all": max(row[-1] for row in moments), **waits(arrivals, moments)}


def _batch(bench: Bench, lengths: list[int], new_tokens: int | list[int], places: int) -> dict:
    slots = min(len(lengths), 128)
    capacity = Capacity([[places // slots] * slots])
    system = open_system("paged", bench.model, capacity, max_batch_tokens=8192, warm_up=True)
    rates = []
    for repeat in range(2):
        run = system(bench.prompts(lengths, seed=repeat), new_tokens)
        rates.append(run.num_tokens / run.seconds)
    del system
    bench.free()
    return {"requests": len(lengths), "first": rates[0], "again": rates[1]}


def cases(to: Target) -> Iterable[Case]:
    if to.on_gpu:
        dtype, model = "bfloat16", to.model or GQA
        params = {"requests": 200, "slots": 128, "chunk": 2048, "prompts": PROMPTS, "answers": ANSWERS}
    else:
        dtype, model = "float32", to.model
        params = {"requests": 6, "slots": 4, "chunk": 256, "prompts": (4.0, 0.7, 16, 200), "answers": (2.0, 0.4, 4, 16)}
    for name, options in SYSTEMS.items():
        if to.on_gpu or not options:
            yield to.case(name, dtype, params | {"options": options}, timeout=300, model=model)
    if not to.on_gpu:
        return
    many = ragged(256, 100, 1024)
    for lengths, new_tokens, places in ((ragged(64, 100, 1024), 256, 64 * 1280), (many, many[::-1], 120 * 1024)):
        params = {"batches": [[lengths, new_tokens, places]]}
        yield to.case(f"paged, {len(lengths)} requests", "bfloat16", params, timeout=300, model=to.model or MHA)


def tables(found: Found, model: str) -> str:
    rows: list[Row] = []
    for line in found.of("first minute", model).values():
        if line["status"] != "ok":
            rows.append(Row(f"first minute, {line['system']}", None, f"{line['status']}: {line['error']}"))
            continue
        result = line["result"]
        for batch in result.get("batches", []):
            first, again, vllm = BATCHES[batch["requests"]] if found.on_gpu else (None, None, "")
            for name, least in (("first", first), ("again", again)):
                work = f"`Runner`, {batch['requests']} requests, {name if name == 'again' else 'first time'}: tokens/s"
                rows.append(Row(work, least, batch[name], "{:.0f}", vllm=str(vllm)))
        if "batches" in result:
            continue
        is_compared = found.on_gpu and model == GQA and line["system"] != "generate_batch"
        whole = f"the first {line['params']['requests']} requests"
        system = "paged, `warm_up=False`" if line["system"] == "paged" else line["system"]
        for name, what in (("ready", "from a start to ready"), ("all", whole)):
            most, vllm = REACH[name] if is_compared else (None, "")
            time = f"TTFT p50 {result['ttft']['p50']:.2f} s" if name == "all" else ""
            rows.append(Row(f"{system}: {what}", most, result[name], "{:.1f} s", True, time, vllm=vllm))
    note = "No kernel is compiled when it starts. All requests are sent at once."
    return f"**The first minute**\n\n{note}\n\n{rows_table(rows)}" if rows else ""


def _words(result: dict) -> str:
    if "batches" in result:
        return ", ".join(f"{b['requests']}: {b['first']:.0f}, {b['again']:.0f} tokens/s" for b in result["batches"])
    return f"ready {result['ready']:.1f} s, all {result['all']:.1f} s"


register(
    Workload(
        "first minute",
        run_first_minute,
        "a process has just started: how soon is it ready, and how long do the first requests take",
        cases={"limit": cases},
        tables=tables,
        words=_words,
    )
)
