"""How long a decode step takes, and what it is made of."""

from __future__ import annotations

from bench.lines import Found
from bench.markdown import milliseconds, unique
from bench.report.answers.measured import Answer, Measured, shape_of, steps_of

TOO_SLOW = 0.1  # seconds a step
BUSY = 0.8


def step_time(measured: Measured) -> Answer | None:
    lines = {name: line for name, line in measured.of("context").items() if steps_of(line)}
    if "paged" not in lines:
        return None
    slow = [f"`{name}`" for name, line in lines.items() if any(p["step"]["median"] >= TOO_SLOW for p in steps_of(line))]
    longest = steps_of(lines["paged"])[-1]
    text = f"The median is under {TOO_SLOW * 1e3:.0f} ms at every length measured for {len(lines) - len(slow)} of "
    text += f"{len(lines)} systems" + f" (not {', '.join(slow)})" * bool(slow)
    text += f". `paged` takes {milliseconds(longest['step'])} ms behind {longest['context']} tokens."
    used = [*lines.values()]
    profiled = [line for line in measured.all("profile") if line["model"] == used[0]["model"]]
    entries = [entry for line in profiled for entry in line["result"]["entries"] if entry["name"] == "paged"]
    if entries and "kernels" in entries[0]:
        used += profiled
        text += f" Of the time of its kernels behind {profiled[0]['params']['context']} tokens {_parts(entries[0])}."
        alone = [entry for line in profiled for entry in _of_one_row(line) if entry["name"] != "paged"]
        others = [f"{entry['name']}: {_parts(entry)}" for entry in alone]
        text += f" Of others: {'; '.join(others)}." * bool(others)
    lengths = unique(point["context"] for line in lines.values() for point in steps_of(line))
    rows = [
        [name, *(milliseconds(found[n]["step"]) if n in found else "not run" for n in lengths)]
        for name, line in lines.items()
        for found in [{point["context"]: point for point in steps_of(line)}]
    ]
    head = ["decode step, ms", *(f"{length} tokens" for length in lengths)]
    return Answer(text, used, "one request", head, rows)


def kv_access(measured: Measured) -> Answer | None:
    """From bytes alone: what a step has to read of K and V, and what of weights."""
    line = measured.of("context").get("paged")
    if line is None or not steps_of(line) or "kv_bytes_per_token" not in line["result"]:
        return None
    per_token = line["result"]["kv_bytes_per_token"]
    others = [measured.of(workload, line).get("paged") for workload in ("batch", "decode")]
    used = [line, *filter(None, others)]
    points = [(line, point) for point in steps_of(line)]
    points += [(other, point) for other in used[1:] for point in steps_of(other) if point["batch"] > 1]

    def share_of(point: dict) -> float:
        return point["batch"] * point["context"] * per_token / point["step_bytes"]

    points = [(line, point) for line, point in points if point.get("system", "paged") == "paged"]
    first, last = points[0][1], max((point for _, point in points), key=share_of)
    tokens = first["batch"] * (first["context"] + line["params"]["new_tokens"] // 2)  # in the middle of the run
    equal = (first["step_bytes"] - tokens * per_token) / per_token
    text = (
        f"With more than {equal:.0f} tokens in a batch: from there on a step reads more bytes of K and V than of "
        "weights (but for the embedding, of which it reads a row a token). Of all "
        f"that it reads, K and V are {share_of(first):.0%} at {shape_of(first)} (requests x tokens) "
        f"and {share_of(last):.0%} at {shape_of(last)}."
    )
    rows = [
        [
            shape_of(point),
            of["suite"],
            milliseconds(point["step"]),
            f"{share_of(point):.0%}",
            *_of_limit(measured.found, of, point),
        ]
        for of, point in points
    ]
    head = ["requests x tokens", "suite", "decode step, ms", "K and V, of the bytes read"]
    head += ["of the measured bandwidth", "measured bandwidth, GB/s"]
    return Answer(text, used, "`paged`", head, rows)


def busy(measured: Measured) -> Answer | None:
    shares: dict[str, float] = {}
    lines = []
    for line in measured.of("busy").values():
        lines.append(line)
        shares[f"{line['system']}, {shape_of(line['result'])}"] = line["result"]["busy_share"]
    for line in measured.of("profile").values():
        lines.append(line)
        shares |= {e["name"]: e["busy_share"] for e in line["result"]["entries"] if "busy_share" in e}
    if not shares:
        return None
    idle = [name for name, share in shares.items() if share <= BUSY]
    least = min(shares, key=shares.get)
    text = (
        f"{'Not always' if idle else 'Yes'}: it works more than {BUSY:.0%} of the time in "
        f"{len(shares) - len(idle)} of {len(shares)} kinds of step; least in {least}, {shares[least]:.0%}. "
        "The profiler slows the host: in a step without a CUDA graph the GPU works more than this says."
    )
    rows = [[name, f"{share:.1%}"] for name, share in shares.items()]
    context = {line["params"]["context"] for line in measured.of("profile").values()}
    about = f"one request behind {context.pop()} tokens unless a row says otherwise" if context else ""
    return Answer(text, lines, about, ["step", "GPU busy"], rows)


def length(measured: Measured) -> Answer | None:
    lines = {name: line for name, line in measured.of("context").items() if steps_of(line)}
    if "paged" not in lines or len(steps_of(lines["paged"])) < 2:
        return None
    first, last = (steps_of(lines["paged"])[i] for i in (0, -1))
    text = f"`paged` makes {_speed(first)} tokens/s behind {first['context']} tokens and {_speed(last)} behind "
    text += f"{last['context']}, {first['step']['median'] / last['step']['median']:.2f} of that"
    native = {point["context"]: point for point in steps_of(lines["baseline"])} if "baseline" in lines else {}
    if {first["context"], last["context"]} <= set(native):
        text += f"; the native cache {_speed(native[first['context']])} and {_speed(native[last['context']])}"
    text += "."
    lengths = unique(point["context"] for line in lines.values() for point in steps_of(line))
    rows = [
        [name, *(_speed_and_ttft(found[n]) if n in found else "not run" for n in lengths)]
        for name, line in lines.items()
        for found in [{point["context"]: point for point in steps_of(line)}]
    ]
    head = ["tokens/s while decoding / TTFT, ms", *(f"{length} tokens" for length in lengths)]
    return Answer(text, [*lines.values()], "one request", head, rows)


def _of_one_row(line: dict) -> list[dict]:
    """Of a line of `profile` the decode steps of one row at the context that the line has."""
    entries = line["params"].get("entries", [])
    names = [asked["name"] for asked in entries if asked["rows"] == 1 and "prefill" not in asked]
    return [entry for entry in line["result"]["entries"] if entry["name"] in names and "kernels" in entry]


def _parts(entry: dict) -> str:
    total = sum(seconds for _, _, seconds in entry["kernels"])
    return ", ".join(f"{seconds / total:.0%} is `{name}`" for name, _, seconds in entry["kernels"][:3])


def _speed(point: dict) -> str:
    return f"{point['batch'] / point['step']['median']:.1f}"


def _speed_and_ttft(point: dict) -> str:
    return f"{_speed(point)} / {milliseconds(point['ttft'], 0)}"


def _of_limit(found: Found, line: dict, point: dict) -> list[str]:
    read = found.read_bandwidth(line)
    if read is None:
        return ["bandwidth not measured", "-"]
    return [f"{point['step_bytes'] / point['step']['median'] / read:.0%}", f"{read / 1e9:.0f}"]
