"""How prompts are put together: padded, preloaded, many at once."""

from __future__ import annotations

from bench.markdown import milliseconds, spread
from bench.report.answers.measured import Answer, Measured, batch_of, empty_share, rate_of, steps_of
from bench.suites.default import concurrency

NEAR_BEST = 0.95  # of the most tokens a second


def padded_or_ragged(measured: Measured) -> Answer | None:
    lines = measured.of("throughput")
    if not {"baseline", "paged"} <= set(lines):
        return None
    how = {
        "baseline": "padded",
        "paged, generate()": "padded, without K and V of the padding",
        "generate_batch": "ragged",
        "paged": "ragged",
    }
    shown = {name: lines[name] for name in how if name in lines}
    ragged, padded = (lines[name]["result"] for name in ("paged", "baseline"))
    text = (
        f"Ragged: the same requests run at {rate_of(ragged) / rate_of(padded):.1f} times the tokens/s of the native "
        "padded batch"
    )
    if ragged["kv"] and padded["kv"]:
        text += f" and hold {ragged['kv']['bytes'] / padded['kv']['bytes']:.2f} of its K and V"
    text += "."
    if "paged, generate()" in lines:
        own = rate_of(lines["paged, generate()"]["result"])
        text += (
            f" With the same kernels and blocks but handed over padded, `generate()`, they run at {own:.1f} tokens/s, "
            f"ragged at {rate_of(ragged):.1f}."
        )
    rows = [
        [
            name,
            how[name],
            spread(line["result"]["tokens_per_second"], 1, 1),
            empty_share(line["result"]["kv"]),
        ]
        for name, line in shown.items()
    ]
    head = ["system", "batch", "tokens/s", "empty places"]
    return Answer(text, list(shown.values()), batch_of(lines["paged"]), head, rows)


def preload(measured: Measured) -> Answer | None:
    line = measured.of("prefix").get("prefix")
    if line is None:
        return None
    points = line["result"]["points"]
    text = "The first token of a prompt whose start is in the cache already comes " + ", ".join(
        f"{point['cold']['median'] / point['hit']['median']:.1f} times sooner with {point['shared']} tokens there"
        for point in points
    )
    text += (
        f". To preload is to compute that start once, ahead: with the longest, {milliseconds(points[-1]['hit'], 1)} ms "
        f"instead of {milliseconds(points[-1]['cold'], 1)} ms."
    )
    rows = [
        [
            f"{point['shared']} + {point['new']}",
            *(milliseconds(point[name], 1) for name in ("cold", "hit", "native")),
        ]
        for point in points
    ]
    head = ["shared + new tokens", "TTFT without, ms", "with, ms", "native `generate()`, ms"]
    return Answer(text, [line], "one request", head, rows)


def best_batch(measured: Measured) -> Answer | None:
    line, points = _sizes(measured)
    if line is None:
        return None
    best = max(points, key=lambda point: point["rate"])
    enough = next(point for point in points if point["rate"] >= NEAR_BEST * best["rate"])
    text = (
        f"Of the sizes measured, {enough['size']} gives {enough['rate']:.1f} tokens/s"
        + (f", within {1 - NEAR_BEST:.0%} of the most ({best['size']})" if enough is not best else ", the most")
        + f": {enough['rate'] / points[0]['rate']:.1f} times those of {points[0]['size']}, for "
        f"{enough['step'] * 1e3:.1f} ms between tokens against {points[0]['step'] * 1e3:.1f} ms."
    )
    if best is points[-1]:
        text += " The largest size measured is the fastest, so a larger one may be faster still."
    rows = [
        [str(p["size"]), f"{p['rate']:.1f}", f"{p['rate'] / best['rate']:.0%}", f"{p['step'] * 1e3:.1f}"]
        for p in points
    ]
    head = ["requests at once", "tokens/s", "of the most", "ms between tokens"]
    about = f"`{line['system']}`" + (f"; {batch_of(line)}" if "lengths" in line["params"] else "")
    return Answer(text, [line], about, head, rows)


def more_at_once(measured: Measured) -> Answer | None:
    line = measured.of("concurrency").get("paged")
    done = _done(line) if line else []
    if len(done) < 2:
        return None
    first, last = done[0], done[-1]
    text = (
        f"From {first['requests']} to {last['requests']} requests at once tokens/s grow "
        f"{last['tokens_per_second'] / first['tokens_per_second']:.1f} times, to {last['tokens_per_second']:.1f}; the "
        f"time between two tokens of a request grows {last['itl']['p50'] / first['itl']['p50']:.1f} times, and half of "
        f"all requests wait {last['ttft']['p50']:.2f} s for their first token instead of {first['ttft']['p50']:.2f} s, "
        "the queue included."
    )
    rows = concurrency.rows(line["result"]["points"])
    return Answer(text, [line], f"{batch_of(line)}, all sent at once", list(concurrency.COLUMNS), rows)


def _sizes(measured: Measured) -> tuple[dict | None, list[dict]]:
    """Batch sizes with tokens/s and the time between tokens: prompts included where that was measured."""
    line = measured.of("concurrency").get("paged")
    if line and (done := _done(line)):
        return line, [{"size": p["requests"], "rate": p["tokens_per_second"], "step": p["itl"]["p50"]} for p in done]
    line = measured.of("batch").get("paged")
    if line and (done := steps_of(line)):
        return line, [
            {"size": p["batch"], "rate": p["batch"] / p["step"]["median"], "step": p["step"]["median"]} for p in done
        ]
    return None, []


def _done(line: dict) -> list[dict]:
    return [point for point in line["result"]["points"] if "error" not in point]
