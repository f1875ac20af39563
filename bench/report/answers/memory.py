"""How much memory K and V take, how it is handed out, and what happens when there is no more."""

from __future__ import annotations

from bench.markdown import milliseconds, spread
from bench.report.answers.measured import Answer, Measured, batch_of, empty_share, rate_of
from bench.suites.default import pool


def growing_or_fixed(measured: Measured) -> Answer | None:
    lines = {name: line for name, line in measured.of("throughput").items() if line["result"]["kv"]}
    if not {"baseline", "paged"} <= set(lines):
        return None
    paged, native = (lines[name]["result"]["kv"] for name in ("paged", "baseline"))
    text = (
        f"A pool fixed at the start and handed out block by block holds {paged['tokens']} tokens in {paged['places']} "
        f"places ({empty_share(paged)} of them empty); a cache that grows with a padded batch takes {native['places']} "
        f"({empty_share(native)} empty)."
    )
    sizes = measured.of("pool", lines["paged"]).get("paged")
    others = [p for p in _against_one_that_fits(sizes) if p["share"] != 1 and p["way"] == pool.AGAIN]
    if others:
        text += " Against a pool of just the blocks that all requests need at once, " + ", ".join(
            f"one of {point['share']:g} times that size gives {point['rate']:.2f}x the tokens/s" for point in others
        )
        text += "."
    rows = [
        [
            _GROWTH[name],
            f"{line['result']['kv']['bytes'] / 1e9:.2f}",
            str(line["result"]["kv"]["places"]),
            empty_share(line["result"]["kv"]),
            spread(line["result"]["tokens_per_second"], 1, 1),
        ]
        for name, line in lines.items()
        if name in _GROWTH
    ]
    head = ["cache", "KV, GB", "places for tokens", "empty", "tokens/s"]
    used = [line for name, line in lines.items() if name in _GROWTH] + [sizes] * bool(others)
    return Answer(text, used, batch_of(lines["paged"]), head, rows)


def mapping_or_copying(measured: Measured) -> Answer | None:
    line = measured.of("fan-out").get("prefix")
    if line is None:
        return _samples(measured)
    result, params = line["result"], line["params"]
    mapped, copied = (result[name] * result["bytes_per_block"] for name in ("blocks_used", "blocks_apart"))
    candidates = params["candidates"]
    text = (
        f"Map: {candidates} requests behind one history hold {mapped / 1e9:.1f} GB where each refers to the same "
        f"blocks, and would hold {copied / 1e9:.1f} GB where each had a copy, {copied / mapped:.0f} times as much."
    )
    if "copy" in measured.found.limits:
        seconds = 2 * (copied - mapped) / measured.found.limits["copy"]  # read and written
        text += f" To make these copies would take {seconds * 1e3:.0f} ms at the measured copy bandwidth."
    text += (
        f" A step that reads the shared blocks once for all takes {milliseconds(result['cascade'])} ms, one that reads "
        f"them for every row {milliseconds(result['apart'])} ms."
    )
    about = f"{candidates} requests of {params['candidate_tokens']} tokens behind {params['history']}"
    return Answer(text, [line], about)


def out_of_memory(measured: Measured) -> Answer | None:
    sentences = {"pool": _small_pools, "pressure": _all_finish, "batching": _preempted}
    lines = {name: line for name in sentences if (line := measured.of(name).get("paged"))}
    texts = {name: text for name, line in lines.items() if (text := sentences[name](line))}
    if not texts:
        return None
    head, rows, conditions = (), (), ""
    if "pool" in texts:
        head, rows, conditions = [*pool.COLUMNS], pool.rows(lines["pool"]["result"]["points"]), batch_of(lines["pool"])
    return Answer(" ".join(texts.values()), [lines[name] for name in texts], conditions, head, rows)


def kv_and_parameters(measured: Measured) -> Answer | None:
    lines = {name: line for name, line in measured.of("throughput").items() if line["result"]["kv"]}
    if "paged" not in lines:
        return None
    result = lines["paged"]["result"]
    weights = result["parameter_bytes"]
    text = (
        f"The parameters take {weights / 1e9:.2f} GB; in blocks, K and V of this batch take "
        f"{result['kv']['bytes'] / weights:.2f} times as much."
    )
    if "kv_bytes_per_token" in result:
        per_token = result["kv_bytes_per_token"]
        text += (
            f" A token takes {per_token / 1e3:.0f} kB, so that {weights / per_token:.0f} tokens take as much as the "
            "parameters."
        )
    rows = [
        [name, f"{line['result']['kv']['bytes'] / 1e9:.2f}", f"{line['result']['kv']['bytes'] / weights:.2f}"]
        for name, line in lines.items()
    ]
    head = ["system", "KV on all tiers, GB", "KV / parameters"]
    return Answer(text, [*lines.values()], batch_of(lines["paged"]), head, rows)


def peak_and_card(measured: Measured) -> Answer | None:
    lines = measured.of("throughput")
    if not lines:
        return None
    used = [*lines.values()]
    first = used[0]
    peaks = {name: line["result"]["peak"] for name, line in lines.items()}
    rows = [[name, f"{peak / 1e9:.2f}"] for name, peak in peaks.items()]
    most, least = max(peaks, key=peaks.get), min(peaks, key=peaks.get)
    text = f"From {peaks[least] / 1e9:.2f} GB ({least}) to {peaks[most] / 1e9:.2f} GB ({most}), parameters included"
    card = first["machine"].get("gpu_memory")
    if card is None:
        text += "; that is the peak of the process, there is no card to fill."
        return Answer(text, used, batch_of(first), ["system", "peak, GB"], rows)
    text += f": {peaks[least] / card:.0%} to {peaks[most] / card:.0%} of the card's {card / 1e9:.1f} GB."
    if line := measured.of("batching", first).get("paged"):
        fullest = max((b for b in line["result"]["batches"] if "peak" in b), key=lambda b: b["peak"], default=None)
        if fullest:
            used.append(line)
            text += f" {fullest['requests']} requests{_pool_of(line, fullest)} reach {fullest['peak'] / card:.0%}."
    rows = [[*row, f"{peaks[row[0]] / card:.0%}"] for row in rows]
    return Answer(text, used, batch_of(first), ["system", "peak, GB", "of the card"], rows)


_GROWTH = {
    "baseline": "grows every step (native, padded)",
    "static": "fixed at the longest (native, padded)",
    "contiguous": "fixed: a block of the longest length for every request",
    "paged": "fixed pool, handed out block by block",
}


def _against_one_that_fits(line: dict | None) -> list[dict]:
    """The points of a line of `pool`, each with its speed over that of the pool that fits; none without such a one."""
    points = [point for point in line["result"]["points"] if "error" not in point] if line else []
    fits = [rate_of(point) for point in points if point["share"] == 1]
    return [point | {"rate": rate_of(point) / fits[0]} for point in points if fits]


def _samples(measured: Measured) -> Answer | None:
    lines = {name: line for name, line in measured.of("sharing").items() if "samples" in line["result"]}
    if not lines:
        return None
    line = lines.get("paged") or next(iter(lines.values()))
    result = line["result"]
    text = (
        f"Map: {result['samples']} samples of one prompt take {result['blocks_together']} blocks where they refer to "
        f"the same ones, and {result['blocks_apart']} where each has a copy. A block is copied only when one of them "
        "writes to it."
    )
    return Answer(text, [line])


def _small_pools(line: dict) -> str:
    small = [point for point in _against_one_that_fits(line) if point["share"] < 1]
    if not small:
        return ""
    ways = "; ".join(
        f"{point['way']}: {point['preemptions']:g} preemptions, {point['rate']:.2f}x the tokens/s" for point in small
    )
    text = (
        "Requests are preempted and go on later. By where their blocks go meanwhile, with "
        f"{small[0]['share']:g} of the blocks needed: {ways}."
    )
    if same := [point["identical"] for point in small if "identical" in point]:
        text += f" {min(same)} of {len(line['params']['lengths'])} end with the tokens they have where all fit."
    return text


def _all_finish(line: dict) -> str:
    found = line["result"]
    return (
        f"With {found['blocks_given']} of {found['blocks_needed']} blocks, {found['finished']} of {found['requests']} "
        f"requests finish, {found['identical']} with the tokens they have where all fit; {found['preemptions']} times "
        "one was preempted and computed again."
    )


def _preempted(line: dict) -> str:
    return " ".join(
        f"{batch['requests']} requests{_pool_of(line, batch)}, which does not hold all at once: "
        f"{batch['preemptions']} times one was preempted and computed again, at "
        f"{spread(batch['tokens_per_second'], 1, 0)} tokens/s in all."
        for batch in line["result"]["batches"]
        if batch.get("preemptions")
    )


def _pool_of(line: dict, batch: dict) -> str:
    """Of a batch of `batching`; "" where it takes whatever its requests need."""
    places = [asked.get("places") for asked in line["params"]["batches"] if len(asked["lengths"]) == batch["requests"]]
    return f" in a pool of {places[0]} tokens" if any(places) else ""
