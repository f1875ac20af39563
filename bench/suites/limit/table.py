"""The tables of the suite: each kind of work, what it must reach, what it reached and what others reach.

Shares are of the read bandwidth measured ahead of the case, in the same call of the bench; native figures are of the
same process, but for the static cache, whose compilation has one of its own. vLLM's are fixed: they were measured once,
on one H100, from outside, with the same shapes and dummy weights (0.26.0, FlashAttention 3). Compare shares, not times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.lines import Found
from bench.markdown import NONE, milliseconds, spread, table

MHA, GQA = "llama-2-7b-random", "llama-3.1-8b-random"
LINEAR_RATE = 700e12  # operations/s: what large products reach on an H100, by which prefill is bounded

#: (model, rows, context) -> the share a decode step must reach, and what vLLM does: (ms, share).
DECODE = {
    (MHA, 1, 512): (0.88, (6.07, 0.73)),
    (MHA, 1, 4096): (0.89, (6.72, 0.75)),
    (MHA, 1, 16384): (0.92, (8.78, 0.81)),
    (MHA, 32, 1024): (0.92, (12.33, 0.83)),
    (MHA, 16, 2048): (0.93, (11.95, 0.85)),
    (GQA, 1, 4096): (0.87, (6.64, 0.76)),
    (GQA, 1, 32768): (0.90, (7.97, 0.79)),
    (GQA, 32, 2048): (0.90, (9.83, 0.79)),
    (GQA, 32, 8192): (0.95, (18.23, 0.89)),
}
#: shape -> the share the attention kernel must reach alone, and FlashAttention 3's.
ATTENTION = {
    "mha-32x1024": (0.94, 0.94),
    "mha-64x2048": (0.94, 0.95),
    "mha-1x4096": (0.75, 0.69),
    "mha-1x16384": (0.92, 0.89),
}
#: prompt tokens -> ms to the first token at most, and vLLM's.
PREFILL = {4096: (92, 92.3), 16384: (435, 447)}
#: (shared, new) -> likewise, where the shared tokens are found.
HITS = {(4096, 64): (10, 12.4), (16184, 64): (17, 16.4)}
#: requests -> tokens/s at least, and vLLM's.
BATCHING = {64: (4050, 3738), 256: (4050, 3727)}
TIMES_GENERATE_BATCH = 11
BUSY = 0.97
FIRST_TOKEN = 60  # seconds without any compiled kernel
HEAD = ["work", "must reach", "reached", "", "time", "moved or computed", "native", "vLLM 0.26.0 on an H100"]


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure, what it must be at least (or at most), and what is beside it."""

    work: str
    bound: float | None  # None: nothing is asked of it
    figure: float | str | None  # a text: why there is none; None: not measured
    show: str = "{:.2f}"
    at_most: bool = False
    time: str = ""
    rate: str = ""
    native: str = ""
    vllm: str = ""

    def cells(self) -> list[str]:
        aim = verdict = ""
        if self.bound is not None:
            aim = f"{'at most' if self.at_most else 'at least'} {self.show.format(self.bound)}"
        if self.figure is None or isinstance(self.figure, str):
            shown, verdict = self.figure or NONE, "failed" if self.figure else "not run"
        elif self.bound is None:
            shown = self.show.format(self.figure)
        else:
            reached = self.figure <= self.bound if self.at_most else self.figure >= self.bound
            shown = self.show.format(self.figure)
            verdict = "reached" if reached else f"missed by {abs(self.figure / self.bound - 1):.1%}"
        return [self.work, aim, shown, verdict, self.time, self.rate, self.native, self.vllm]


class Steps:
    """What the workloads found, by what was measured."""

    def __init__(self, found: Found) -> None:
        self.share = found.share
        self._found = found

    def result(self, workload: str, system: str, model: str, dtype: str = "bfloat16") -> tuple[dict, dict]:
        """(line, its result); empty where there is none, with an "error" where it failed."""
        line = self._found.of(workload, model, dtype).get(system)
        if line is None:
            return {}, {}
        return line, line["result"] if line["status"] == "ok" else {"error": f"{line['status']}: {line['error']}"}

    def step(
        self, model: str, system: str, rows: int, context: int, dtype: str = "bfloat16", case: str = "paged"
    ) -> dict:
        """A point of a case of `decode`, with its share; empty where there is none, or with an "error"."""
        line, result = self.result("decode", "static" if system == "static" else case, model, dtype)
        if not result or "error" in result:
            return result
        for point in result["points"]:
            if (point["system"], point["batch"], point["context"]) == (system, rows, context):
                if "error" in point:
                    return point
                rate = point["step_bytes"] / point["step"]["median"]
                return point | {"share": self.share(line, rate), "rate": rate}
        return {}


def tables(lines: Found, model: str) -> str:
    """The tables of all workloads of the suite that ran on `model`."""
    ran = [line for line in lines.lines if line["model"] == model]
    found = Steps(lines)
    rows = [*(_gpu_rows(found, model) if lines.on_gpu else _cpu_rows(found, model))]
    parts = [_table(rows, lines.on_gpu)] if rows else []
    parts += [_steps(ran, found), _start(found, model), _batches(ran), _profiles(found, model)]
    return "\n\n".join(part for part in parts if part)


NOTE = "Shares: bytes that had to move / measured read bandwidth / time; medians. "
PEERS_NOTE = (
    "vLLM's figures are fixed references of another card (H100: 3062 GB/s), there in ms and its share of that card's "
    "limit. Native: share and step of transformers' `DynamicCache`, and of `StaticCache` compiled. They wait for the "
    "host, and differ by up to 2.7 times between runs on machines of one kind: a ratio to them is an order of "
    "magnitude. `generate()` behind a strategy waits for it, too. `generate_batch` runs on torch's SDPA; with the "
    "flash-attn package it is several times faster upstream (1373 to 6729 tokens/s in transformers #42839)."
)


def _table(rows: Iterable[Row], on_gpu: bool) -> str:
    note = NOTE + (PEERS_NOTE if on_gpu else "Ratios to native `generate()` of the same process, in turns with it.")
    return f"**Against the limits**\n\n{note}\n\n" + rows_table(rows)


def headline(lines: Found, model: str) -> str:
    """Of the table of a GPU, the work that others were measured at as well, kernels alone left out."""
    rows = [row for row in _gpu_rows(Steps(lines), model) if row.vllm or "generate_batch" in row.work]
    chosen = [row for row in rows if row.figure is not None and "kernel alone" not in row.work]
    return NOTE + PEERS_NOTE + "\n\n" + rows_table(chosen, [name for name in HEAD if name != "moved or computed"])


def rows_table(rows: Iterable[Row], names: Sequence[str] = HEAD) -> str:
    """The columns of these names, but for those that all rows leave empty."""
    cells = [row.cells() for row in rows]
    kept = [i for i, name in enumerate(HEAD) if name in names and (i < 4 or any(row[i] for row in cells))]
    return table([HEAD[i] for i in kept], [[row[i] for i in kept] for row in cells]) if cells else ""


# --- the rows on a GPU


def _gpu_rows(found: Steps, model: str) -> Iterator[Row]:
    if model == MHA:
        yield from _decode_rows(found, MHA)
        yield from _attention_rows(found)
        yield from _prefill_rows(found)
        yield from _batching_rows(found)
        yield from _other_steps(found)
        _, first = found.result("first token", "paged", MHA)
        cold = first.get("cold", first)
        yield Row(
            "first token after a start, no kernel compiled", FIRST_TOKEN, _figure(cold, lambda: cold["first"]),
            "{:.1f} s", at_most=True, time=f"{cold['tokens']} tokens" if "tokens" in cold else "",
        )  # fmt: skip
    elif model == GQA:
        yield from _decode_rows(found, GQA)
        own, codes, half = (found.step(GQA, name, 32, 8192) for name in ("paged", "int8", "int4"))
        yield Row(
            "GQA shape, int8 KV, 32 x 8192: step / bf16 step", 0.70, _ratio(codes, own), at_most=True,
            time=step_ms(codes), rate=_moved(codes), native="dequantises all", vllm="fp8: 0.77 (13.99 ms)",
        )  # fmt: skip
        yield Row(
            "GQA shape, int4 KV, 32 x 8192: step / bf16 step", 0.61, _ratio(half, own), at_most=True,
            time=step_ms(half), rate=_moved(half), native="dequantises all", vllm="int4: 2.40 (44.16 ms)",
        )  # fmt: skip


def _decode_rows(found: Steps, model: str) -> Iterator[Row]:
    for (shape, rows, context), (share, (ms, vllm)) in DECODE.items():
        if shape != model:
            continue
        own = found.step(model, "paged", rows, context)
        peers = {"dynamic": found.step(model, "baseline", rows, context)}
        peers["static, compiled"] = found.step(model, "static", rows, context)
        yield Row(
            f"{'GQA shape, d' if model == GQA else 'd'}ecode step, {rows} x {context}: share",
            share, _figure(own, lambda own=own: own.get("share")), time=step_ms(own), rate=_moved(own),
            native="; ".join(f"{name} {_peer(peer)}" for name, peer in peers.items() if peer),
            vllm=f"{vllm:.2f} ({ms:.2f} ms)",
        )  # fmt: skip


def _attention_rows(found: Steps) -> Iterator[Row]:
    line, result = found.result("attention", "paged", MHA)
    points = {point["shape"]: point for point in result.get("points", [])}
    for shape, (share, vllm) in ATTENTION.items():
        point = points.get(shape, {"error": result["error"]} if "error" in result else {})
        rows, context = shape.removeprefix("mha-").split("x")
        done = "seconds" in point
        rate = point["bytes"] / point["seconds"] if done else 0.0
        yield Row(
            f"attention kernel alone, {rows} x {context}: share", share,
            _figure(point, lambda rate=rate: found.share(line, rate)),
            time=f"{point['seconds'] * 1e6:.1f} us" if done else "",
            rate=f"{rate / 1e9:.0f} GB/s" if done else "", vllm=f"{vllm:.2f} (FlashAttention 3)",
        )  # fmt: skip


def _prefill_rows(found: Steps) -> Iterator[Row]:
    _, result = found.result("first token", "paged", MHA)
    rows = {row["tokens"]: row for row in result.get("prefill", [])}
    for tokens, (most, vllm) in PREFILL.items():
        row = rows.get(tokens, {"error": result["error"]} if "error" in result else {})
        done = "own" in row
        rate = row["operations"] / row["own"]["median"] if done else 0
        bound = row["operations"] / LINEAR_RATE if done else 0
        yield Row(
            f"prefill, {tokens} tokens in one chunk: TTFT", most,
            _figure(row, lambda row=row: row["own"]["median"] * 1e3), "{:.1f} ms", at_most=True,
            time=f"{milliseconds(row['own'], 1)}, {row['own']['median'] / bound:.2f}x of the bound" if done else "",
            rate=f"{rate / 1e12:.0f} TFLOP/s" if done else "",
            native=f"{milliseconds(row['native'], 1)}" if done else "", vllm=f"{vllm} ms",
        )  # fmt: skip
    hits = result.get("hits", {"error": result["error"]} if "error" in result else {})
    points = {(point["shared"], point["new"]): point for point in hits.get("points", [])}
    for (shared, new), (most, vllm) in HITS.items():
        point = points.get((shared, new), {"error": hits["error"]} if "error" in hits else {})
        done = "hit" in point
        yield Row(
            f"prefix hit, {shared} shared + {new} new: TTFT", most,
            _figure(point, lambda point=point: point["hit"]["median"] * 1e3), "{:.1f} ms", at_most=True,
            time=f"{milliseconds(point['hit'], 1)}; without the hit {milliseconds(point['cold'], 1)}" if done else "",
            native=milliseconds(point["native"], 1) if done else "", vllm=f"{vllm} ms",
        )  # fmt: skip


def _batching_rows(found: Steps) -> Iterator[Row]:
    _, result = found.result("batching", "paged", MHA)
    rows = {(row["system"], row["requests"]): row for row in result.get("batches", [])}
    texts = {64: "64 requests, 100-1024 in, 256 out", 256: "256 requests, 100-1024 in, 100-1024 out"}
    peer = rows.get(("generate_batch", 64), {})
    for requests, (least, vllm) in BATCHING.items():
        row = rows.get(("paged", requests), {"error": result["error"]} if "error" in result else {})
        rate = _figure(row, lambda row=row: row["tokens_per_second"]["median"])
        native = _figure(peer, lambda: f"{peer['tokens_per_second']['median']:.0f} (`generate_batch`)")
        native = native or "" if requests == 64 else ""
        yield Row(f"`Runner`, {texts[requests]}: tokens/s", least, rate, "{:.0f}", native=native, vllm=f"{vllm}")
        if requests == 64:
            times = row.get("error") or peer.get("error")
            if not times and isinstance(rate, float) and peer:
                times = rate / peer["tokens_per_second"]["median"]
            yield Row("the same / `generate_batch`", TIMES_GENERATE_BATCH, times or None, "{:.1f}x", native=native)


def _other_steps(found: Steps) -> Iterator[Row]:
    _, result = found.result("profile", "every strategy", MHA)
    entry = next((row for row in result.get("entries", []) if row["name"] == "paged, 32 x 1024"), result)
    yield Row("`Runner`, decoding at 32 x 1024: GPU busy", BUSY, _figure(entry, lambda: entry["busy_share"]))
    own, plain = found.step(MHA, "paged", 1, 4096), found.step(MHA, "paged, generate()", 1, 4096)
    native = found.step(MHA, "baseline", 1, 4096)
    yield Row(
        "plain `generate()`, 1 x 4096: step / the runner's", 1.4, _ratio(plain, own), at_most=True, time=step_ms(plain),
        native=f"dynamic {_peer(native)}" if native else "", vllm="not applicable",
    )  # fmt: skip
    for rows, context in ((1, 4096), (32, 1024)):
        other = found.step(MHA, "contiguous", rows, context)
        yield Row(
            f"paged / contiguous step, {rows} x {context}", 1.02,
            _ratio(found.step(MHA, "paged", rows, context), other), "{:.3f}", at_most=True,
            time=f"contiguous {step_ms(other)}" if other else "",
        )  # fmt: skip


# --- and on a CPU


def _cpu_rows(found: Steps, model: str) -> Iterator[Row]:
    own = found.step(model, "paged", 1, 4200, "float32", case="int8")
    for name, most in (("int8", 1.0), ("offload", 1.1)):
        other = found.step(model, name, 1, 4200, "float32", case="int8")
        yield Row(
            f"decode, float32, 1 x 4200: {name} / paged step", most, _ratio(other, own), at_most=True,
            time=step_ms(other), rate=_moved(other),
        )  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        _, result = found.result("decode", "paged", model, dtype)
        for _, rows, context in [p.values() for p in _keys(result) if p["system"] == "paged"]:
            own, native = (found.step(model, name, rows, context, dtype) for name in ("paged", "baseline"))
            yield Row(
                f"decode, {dtype}, {rows} x {context}: tokens/s / native", 1.0, _ratio(native, own), time=step_ms(own),
                rate=_moved(own), native=_peer(native),
            )  # fmt: skip
        _, result = found.result("batching", "paged", model, dtype)
        rows = {row["system"]: row for row in result.get("batches", [])}
        own, native = rows.get("paged", result), rows.get("baseline", result)
        if own or native:
            rates = [row.get("tokens_per_second", {}).get("median") for row in (own, native)]
            yield Row(
                f"ragged batch of {own.get('requests', '...')}, {dtype}: tokens/s / native", 1.6,
                rates[0] / rates[1] if all(rates) else own.get("error") or native.get("error"),
                time=f"{rates[0]:.1f} tokens/s" if rates[0] else "",
                native=f"{rates[1]:.1f} tokens/s" if rates[1] else "",
            )  # fmt: skip


def _keys(result: dict) -> list[dict]:
    return [{name: point[name] for name in ("system", "batch", "context")} for point in result.get("points", [])]


# --- the figures behind


def _steps(lines: Sequence[dict], found: Steps) -> str:
    rows = []
    for line in lines:
        if line["workload"] != "decode" or line["status"] != "ok":
            continue
        for key in _keys(line["result"]):
            point = found.step(line["model"], *key.values(), line["dtype"], case=line["system"])
            name = [key["system"], line["dtype"], f"{key['batch']} x {key['context']}"]
            if "error" in point:
                rows.append([*name, point["error"], "", "", "", ""])
                continue
            rate = key["batch"] / point["step"]["median"]
            share = f"{point['share']:.3f}" if point["share"] else NONE
            extra = f"{max(0.0, point['unsteady']):.2f}"
            rows.append([*name, milliseconds(point["step"], 3), f"{rate:.1f}", _moved(point) or NONE, share, extra])
    note = (
        "Median (smallest to largest) of steps in which all rows decode. Contexts of a runner's rows are written with "
        "random numbers, not computed. Extra: what the first three steps took beyond three more, in which kernels "
        "compile and the graph is captured (the prompts of native rows are computed before that)."
    )
    head = ["system", "dtype", "rows x context", "step, ms", "tokens/s", "moved", "share", "extra, s"]
    return rows and f"**Decode steps**\n\n{note}\n\n" + table(head, rows)


def _start(found: Steps, model: str) -> str:
    _, result = found.result("first token", "paged", model)
    cold = result.get("cold", {})
    if "first" not in cold:
        return ""
    return (
        f"**Compilation and capture.** With no kernel compiled, the first token of {cold['tokens']} came after "
        f"{cold['first']:.1f} s, {cold['new_tokens']} of them after {cold['all']:.1f} s, the decode graph captured "
        f"by then. The model was made in {cold['load']:.1f} s before."
    )


def _batches(lines: Sequence[dict]) -> str:
    rows = []
    for line in lines:
        if line["workload"] != "batching" or line["status"] != "ok":
            continue
        for row in line["result"]["batches"]:
            name = [row["system"], line["dtype"], row["requests"]]
            if "error" in row:
                rows.append([*name, row["error"], "", "", "", ""])
                continue
            captured = row["captures"]
            text = f"{captured['count']} in {captured['seconds']:.2f} s" if captured["count"] else NONE
            preempted = NONE if row["preemptions"] is None else row["preemptions"]
            rate = spread(row["tokens_per_second"], 1, 1)
            rows.append([*name, row["tokens"], rate, text, preempted, f"{row['peak'] / 1e9:.2f}"])
    head = ["system", "dtype", "requests", "tokens made", "tokens/s", "graphs captured meanwhile", "preemptions"]
    return rows and "**Batching**\n\n" + table([*head, "peak memory, GB"], rows)


def _profiles(found: Steps, model: str) -> str:
    _, result = found.result("profile", "every strategy", model)
    entries = result.get("entries", [])
    if not entries:
        return ""
    rows = []
    for entry in entries:
        if "error" in entry:
            rows.append([entry["name"], entry["error"], "", "", "", ""])
            continue
        step, busy = entry["step"], entry["busy_share"]
        idle = step * (1 - busy) * 1e6
        kernels = ", ".join(
            f"{name.strip()} {seconds / step:.0%}" for name, _, seconds in entry["kernels"] if seconds > step / 50
        )
        rows.append(
            [entry["name"], f"{step * 1e3:.3f}", f"{busy:.1%}", f"{idle:.0f}", f"{entry['launches']:.0f}", kernels]
        )
    note = (
        "One decode step as the profiler saw it, one row of 4096 tokens unless it is said otherwise; the mean of "
        "consecutive ones. The profiler slows a step that a CUDA graph holds a little, and one that the host launches "
        "kernel by kernel (exact offload, more than 2048 tokens) up to twice: the GPU idles less than it says. Busy: "
        "the union of all GPU work over the time from the first kernel to the end of the last. Kernels of 2 % of a "
        "step and more; one that starts before the one ahead has ended counts from there, waiting included, so that "
        "they add up to more than the step. All of them, with their "
        "launches, are in the `.jsonl` files."
    )
    head = ["strategy", "step, ms", "GPU busy", "idle, us a step", "kernels and copies a step", "of the step"]
    return f"**Profile of one step of each strategy**\n\n{note}\n\n" + table(head, rows)


# --- cells


def _figure(found: dict, of: Callable[[], object]):
    """The figure of what was measured; a text where it failed; None where there is nothing."""
    if not found:
        return None
    return found["error"] if "error" in found else of()


def _ratio(above: dict, below: dict) -> float | str | None:
    for found in (above, below):
        if not found or "error" in found:
            return found.get("error")
    return above["step"]["median"] / below["step"]["median"]


def step_ms(point: dict) -> str:
    return f"{point['step']['median'] * 1e3:.2f} ms" if "step" in point else point.get("error", "")


def _moved(point: dict) -> str:
    """The bytes that had to move, and how fast they did."""
    return f"{point['step_bytes'] / 1e9:.2f} GB, {point['rate'] / 1e9:.0f} GB/s" if "rate" in point else ""


def _peer(point: dict) -> str:
    if not point.get("share"):
        return step_ms(point)
    return f"{point['share']:.2f} ({point['step']['median'] * 1e3:.2f} ms)"
