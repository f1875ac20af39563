"""All prompts handed over at once: the time to the last first token, and to each token after it, prompts included."""

from __future__ import annotations

from collections.abc import Iterable

from bench import measure
from bench.case import Bench, Case
from bench.lines import Found
from bench.markdown import points_in_words
from bench.suites.limit.table import GQA, MHA, Row, rows_table
from bench.systems import Capacity, open_system
from bench.workload import Target, Workload, register

#: (model, system, rows, context) -> ms to the last first token at most, ms a token at most (None: nothing is asked),
#: and vLLM's: (of which codec, ms to the first, ms a token).
REACH = {
    (MHA, "paged", 1, 16384): (435, None, ("", 447, 8.78)),
    (MHA, "paged", 32, 1024): (670, None, ("", 697, 12.33)),
    (MHA, "paged", 16, 2048): (680, None, ("", 707, 11.95)),
    (GQA, "paged", 1, 32768): (1130, None, ("", 1173, 7.97)),
    (GQA, "paged", 32, 8192): (6500, 16.8, ("", 6738, 18.23)),
    (GQA, "int8", 1, 32768): (1120, 6.5, ("fp8 ", 1097, 7.52)),
    (GQA, "fp8", 1, 32768): (1120, None, ("fp8 ", 1097, 7.52)),
    (GQA, "int8", 32, 8192): (6500, 12.0, ("fp8 ", 6588, 13.99)),
    (GQA, "fp8", 32, 8192): (6500, 12.0, ("fp8 ", 6588, 13.99)),
    (GQA, "int4", 32, 8192): (None, 10.5, ("int4 ", 28056, 44.16)),
}


def run_outside(bench: Bench) -> dict:
    """A step is (t(n) - t(1)) / (n - 1), where t(n) is the whole run with n new tokens a row: best of `repeats`."""
    found = []
    for system, rows, context in bench.params["points"]:
        bench.say(f"{system}: {rows} x {context}")
        point = measure.attempt(lambda at=(system, rows, context): _point(bench, *at))
        found.append({"system": system, "batch": rows, "context": context} | point)
        bench.free()
    return {"points": found}


def _point(bench: Bench, name: str, rows: int, context: int) -> dict:
    new_tokens, repeats = bench.params["new_tokens"], bench.params["repeats"]
    capacity = Capacity([[context + new_tokens] * rows])
    system = open_system(name, bench.model, capacity, max_batch_tokens=bench.params["chunk"])
    times: dict[int, list[float]] = {1: [], new_tokens: []}
    for repeat in range(1 + repeats):  # the first one compiles and captures
        for count in times:
            prompts = bench.prompts([context] * rows, seed=1000 * repeat + count)
            times[count].append(system(prompts, count).seconds)
    first, whole = (min(times[count][1:]) for count in times)
    return {"first": first, "step": (whole - first) / (new_tokens - 1)}


def cases(to: Target) -> Iterable[Case]:
    if not to.on_gpu:
        params = {"points": [["paged", 4, 256], ["int8", 4, 256]], "new_tokens": 16, "repeats": 1, "chunk": 256}
        yield to.case("paged", "float32", params, timeout=300)
        return
    for model in [to.model] if to.model else [MHA, GQA]:
        points = [list(key[1:]) for key in REACH if key[0] == (model if model in (MHA, GQA) else MHA)]
        params = {"points": points, "new_tokens": 64, "repeats": 2, "chunk": 8192}
        yield to.case("paged", "bfloat16", params, timeout=550, model=model)


def tables(found: Found, model: str) -> str:
    rows = []
    for line in found.of("from outside", model).values():
        points = line["result"]["points"] if line["status"] == "ok" else []
        if not points:
            rows.append(Row("from outside", None, f"{line['status']}: {line['error']}"))
        for point in points:
            key = tuple(point[name] for name in ("system", "batch", "context"))
            most_first, most_step, peer = REACH.get((model, *key), (None, None, None))
            work = "{}, {} x {}".format(*key)
            for name, what, most, at in (("first", "TTFT", most_first, 1), ("step", "ms a token", most_step, 2)):
                rows.append(
                    Row(
                        f"{work}: {what}", most, point[name] * 1e3 if name in point else point.get("error"),
                        "{:.0f} ms" if name == "first" else "{:.2f} ms", at_most=True,
                        vllm=f"{peer[0]}{peer[at]} ms" if peer and found.on_gpu else "",
                    )
                )  # fmt: skip
    note = "All prompts at once; a token's time is (t(n) - t(1)) / (n - 1), chunks of prompts beside decoding included."
    return f"**From outside**\n\n{note}\n\n{rows_table(rows)}" if rows else ""


def _words(result: dict) -> str:
    return points_in_words(
        result["points"],
        lambda point: f"{point['system']} {point['batch']} x {point['context']}",
        lambda point: f"{point['first'] * 1e3:.0f} and {point['step'] * 1e3:.2f} ms",
    )


register(
    Workload(
        "from outside",
        run_outside,
        "all prompts at once: the time to the last first token, and to each token after it",
        cases={"limit": cases},
        tables=tables,
        words=_words,
    )
)
