"""The page of the suite `strategies`: what each must reach, what it reached, and the times behind that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.markdown import NONE, cell, spread, table


@dataclass(frozen=True)
class Claim:
    """One figure that a workload must reach."""

    workload: str
    what: str  # may name numbers of the result: "{context} tokens"
    target: str
    bound: float
    value: Callable[[dict], float | None]  # of one point of the result, or of the result where it has no points
    shown: str = "{:.1f}x"
    at_most: bool = False
    only: Callable[[dict], bool] = lambda point: True  # the points that it is about

    def is_reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def verdict(self, value: float) -> str:
        if self.is_reached(value):
            return "reached"
        return f"missed by {abs(value / self.bound - 1):.1%}"


def _median(part: dict) -> float:
    return part["median"]


def _step(result: dict, name: str) -> float | None:
    """Median time a decode step of a variant; None where it did not run."""
    return _median(result[name]["step"]) if "step" in result.get(name, {}) else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _times_lower(point: dict) -> float:
    return _ratio(_median(point["cold"]), _median(point["hit"]))


def _growth(of: Callable[[dict], float]) -> Callable[[dict], float]:
    """The last point over the first."""
    return lambda result: _ratio(of(result["points"][-1]), of(result["points"][0]))


def _link_share(result: dict) -> float | None:
    if "host_to_device" not in result:
        return None
    return result["exact"]["bytes"] / result["host_to_device"] / _step(result, "exact")


def _history_copies(result: dict) -> float:
    return result["blocks_used"] / result["blocks_needed"]


def _bytes_ratio(name: str) -> Callable[[dict], float | None]:
    return lambda result: _ratio(result["paged"]["bytes_per_token"], result[name].get("bytes_per_token"))


#: The figures of the project's requirements: the Llama-2-7B shape on a GPU, peers in the same run.
CLAIMS = [
    Claim(
        "prefix", "TTFT, {shared} shared + {new} new: cold / hit", "at least 10x lower than without a hit", 10,
        _times_lower, only=lambda point: point["shared"] < 8192,
    ),
    Claim(
        "prefix", "TTFT, {shared} shared + {new} new: cold / hit", "at least 25x lower", 25, _times_lower,
        only=lambda point: point["shared"] >= 8192,
    ),
    Claim(
        "fan-out", "step without cascade / with, {candidates} candidates of {candidate_tokens} behind {history}",
        "at least 8x faster", 8, lambda result: _ratio(_median(result["apart"]), _median(result["cascade"])),
    ),
    Claim(
        "fan-out", "blocks in use / blocks of one history and of all candidates", "KV stored once", 1, _history_copies,
        "{:.2f}", at_most=True,
    ),
    Claim(
        "window", "decode step after the longest prompt / after the shortest", "within 3 %", 1.03,
        _growth(lambda point: _median(point["step"])), "{:.3f}", at_most=True,
    ),
    Claim(
        "window", "KV bytes, likewise", "within 3 %", 1.03, _growth(lambda point: point["kv_bytes"]), "{:.3f}",
        at_most=True,
    ),
    Claim(
        "stream", "time a chunk at the end of {tokens} tokens / at {early_token}", "within 3 %", 1.03,
        lambda result: _ratio(_median(result["late"]["chunk"]), _median(result["early"]["chunk"])), "{:.3f}",
        at_most=True,
    ),
    Claim(
        "stream", "KV bytes, likewise", "within 3 %", 1.03,
        lambda result: _ratio(result["late"]["kv_bytes"], result["early"]["kv_bytes"]), "{:.3f}", at_most=True,
    ),
    Claim(
        "stream", "perplexity / that of recomputing the window, at {places} places", "within 1 % (or lower)", 1.01,
        lambda result: _ratio(result["perplexity_at_places"], result["recomputed_at_places"]), "{:.4f}", at_most=True,
    ),
    Claim(
        "offload", "exact, {context} tokens: bytes / measured link rate / step", "at least 0.92 of the link", 0.92,
        _link_share, "{:.2f}",
    ),
    Claim(
        "offload", "exact: native offloaded step / step", "at least 2.4x the native offloaded cache", 2.4,
        lambda result: _ratio(_step(result, "native"), _step(result, "exact")),
    ),
    Claim(
        "offload", "top-{top_n}, {context} tokens: step / resident paged step", "at most 1.2x", 1.2,
        lambda result: _ratio(_step(result, "heaviest"), _step(result, "paged")), "{:.2f}x", at_most=True,
    ),
    Claim(
        "offload", "top-{top_n}: KV bytes on the GPU / of paged", "at most 0.52", 0.52,
        lambda result: _ratio(result["heaviest"]["kv_bytes"], result["paged"]["kv_bytes"]), "{:.3f}", at_most=True,
    ),
    Claim(
        "offload", "top-{top_n}: native offloaded step / step", "at least 20x the native offloaded cache", 20,
        lambda result: _ratio(_step(result, "native"), _step(result, "heaviest")),
    ),
    *(
        claim
        for name in ("int8", "fp8")
        for claim in (
            Claim(
                "8 bits", f"{name}, {{batch}} x {{context}}: step / paged step",
                "at most 0.7" if name == "int8" else "at most 0.7 (as int8)", 0.7,
                lambda result, name=name: _ratio(_step(result, name), _step(result, "paged")), "{:.2f}", at_most=True,
            ),
            Claim(
                "8 bits", f"{name}: tokens in the same memory",
                "at least 1.9x" if name == "int8" else "at least 1.9x (as int8)", 1.9, _bytes_ratio(name), "{:.2f}x",
            ),
        )
    ),
]  # fmt: skip


def _instances(claim: Claim, line: dict) -> list[dict]:
    """What a claim is evaluated on: the points it is about, or the whole result; its parameters with it."""
    result = line["result"]
    if claim.workload == "prefix":
        return [line["params"] | point for point in result["points"] if claim.only(point)]
    return [line["params"] | result]


def section(lines: Sequence[dict], model: str) -> str:
    """The table of claims and the tables behind it, of the workloads that ran on `model`."""
    ran = _ran(lines, model)
    if not ran:
        return ""
    note = "Ratios of medians, both sides measured in one process."
    if not any("gpu" in line["machine"] for line in ran.values()):
        note += " The figures to reach are for the Llama-2-7B shape on a GPU: here the same is shown, and not judged."
    details = [DETAILS[workload](line["params"] | line["result"]) for workload, line in ran.items() if _is_ok(line)]
    return "\n\n".join([f"**What must be reached**\n\n{note}\n\n" + claims(lines, model), *details])


def claims(lines: Sequence[dict], model: str) -> str:
    """The table of claims alone; empty where none of the workloads ran on `model`."""
    ran = _ran(lines, model)
    rows = [row for claim in CLAIMS if claim.workload in ran for row in _rows(claim, ran[claim.workload])]
    return table(["strategy", "what", "must reach", "reached", ""], rows) if rows else ""


def _ran(lines: Sequence[dict], model: str) -> dict[str, dict]:
    return {line["workload"]: line for line in lines if line["model"] == model and line["workload"] in DETAILS}


def _rows(claim: Claim, line: dict) -> list[list[str]]:
    if not _is_ok(line):
        return [[claim.workload, _loosely(claim.what, line["params"]), claim.target, cell(line, str), ""]]
    rows = []
    for found in _instances(claim, line):
        value = claim.value(found)
        shown, verdict = (NONE, "not run") if value is None else (claim.shown.format(value), claim.verdict(value))
        if "gpu" not in line["machine"]:
            verdict = NONE
        rows.append([claim.workload, claim.what.format(**found), claim.target, shown, verdict])
    return rows


class _Unknown(dict):
    def __missing__(self, name: str) -> str:
        return "..."


def _loosely(what: str, params: dict) -> str:
    """The text of a claim whose case has failed: there may be no number for it."""
    return what.format_map(_Unknown(params))


def _is_ok(line: dict) -> bool:
    return line["status"] == "ok"


# --- the times behind


def _ms(values: dict, digits: int = 2) -> str:
    return spread(values, 1e3, digits)


def _prefix(result: dict) -> str:
    rows = [
        [
            f"{point['shared']} + {point['new']}",
            *(_ms(point[name], 1) for name in ("cold", "hit", "native")),
            f"{_ratio(_median(point['native']), _median(point['hit'])):.1f}x",
            f"{point['hit_rate']:.1%}",
        ]
        for point in result["points"]
    ]
    head = ["shared + new tokens", "cold, ms", "hit, ms", "native `generate()`, ms", "native / hit", "hit rate"]
    return "**Prefix: time to first token**\n\nMedian (smallest to largest).\n\n" + table(head, rows)


def _fan_out(result: dict) -> str:
    gigabytes = result["bytes_per_block"] / 1e9
    rows = [
        ["history read once (cascade)", _ms(result["cascade"]), result["blocks_used"],
         f"{result['blocks_used'] * gigabytes:.2f}"],
        ["history read for every row", _ms(result["apart"]), result["blocks_used"],
         f"{result['blocks_used'] * gigabytes:.2f}"],
        ["every row with a history of its own", "not run", result["blocks_apart"],
         f"{result['blocks_apart'] * gigabytes:.2f}"],
    ]  # fmt: skip
    title = f"**Fan-out: {result['candidates']} candidates of {result['candidate_tokens']} tokens behind one history"
    return f"{title} of {result['history']}**\n\n" + table(["", "decode step, ms", "blocks", "KV, GB"], rows)


def _window(result: dict) -> str:
    rows = [[point["tokens"], _ms(point["step"]), f"{point['kv_bytes'] / 1e6:.1f}"] for point in result["points"]]
    title = f"**Window of {result['window']} tokens and {result['sinks']} sinks: one request**\n\n"
    return title + table(["prompt, tokens", "decode step, ms", "KV blocks in use, MB"], rows)


def _stream(result: dict) -> str:
    rows = [
        [f"at {result['early_token']}", _ms(result["early"]["chunk"]), f"{result['early']['kv_bytes'] / 1e6:.1f}"],
        ["at the end", _ms(result["late"]["chunk"]), f"{result['late']['kv_bytes'] / 1e6:.1f}"],
    ]
    parts = ", ".join(f"{value:.2f}" for value in result["perplexity_by_part"])
    note = (
        f"{result['tokens']:,} tokens in chunks of {result['chunk']}, window {result['window']}, "
        f"{result['sinks']} sinks: {result['seconds']:.1f} s. Perplexity {result['perplexity']:.3f} over all; "
        f"in sixteenths of the text: {parts}. At {result['places']} places: "
        f"{result['perplexity_at_places']:.3f}, and {result['recomputed_at_places']:.3f} "
        f"where the window was computed from scratch (standard error of the ratio {result['ratio_error']:.4f})."
    )
    return "**Stream**\n\n" + note + "\n\n" + table(["", "chunk, ms", "KV blocks in use, MB"], rows)


def _offload(result: dict) -> str:
    names = {"paged": "resident (paged)", "exact": "V on the host, exact", "native": "native offloaded"}
    names["heaviest"] = f"V on the host, top-{result['top_n']}"
    rows = []
    for name, text in names.items():
        found = result.get(name)
        kv, moved = (found or {}).get("kv_bytes"), (found or {}).get("bytes")
        rows.append(
            [
                text,
                _ms(found["step"]) if found else "not run",
                f"{kv / 1e9:.2f}" if kv else NONE,
                f"{moved / 1e9:.3f}" if moved else NONE,
            ]
        )
    rate = f", link {result['host_to_device'] / 1e9:.1f} GB/s in the same run" if "host_to_device" in result else ""
    head = ["", "decode step, ms", "KV on the GPU, GB", "brought to it a step, GB"]
    return f"**Offload: one request of {result['context']} tokens{rate}**\n\n" + table(head, rows)


def _eight_bits(result: dict) -> str:
    rows = []
    for name in ("paged", "int8", "fp8"):
        found = result[name]
        if "error" in found:
            rows.append([name, found["error"], ""])
        else:
            rows.append([name, _ms(found["step"]), f"{found['bytes_per_token'] / 1024:.1f}"])
    title = f"**8 bits: {result['batch']} requests of {result['context']} tokens**\n\n"
    return title + table(["", "decode step, ms", "KV, KiB a token"], rows)


DETAILS: dict[str, Callable[[dict], str]] = {
    "prefix": _prefix,
    "fan-out": _fan_out,
    "window": _window,
    "stream": _stream,
    "offload": _offload,
    "8 bits": _eight_bits,
}


def in_words(line: dict) -> str:
    """What was reached, for the terminal."""
    found = [(claim, claim.value(point)) for claim in CLAIMS if claim.workload == line["workload"]
             for point in _instances(claim, line)]  # fmt: skip
    return ", ".join(f"{claim.shown.format(value)} ({claim.target})" for claim, value in found if value is not None)
