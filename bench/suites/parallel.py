"""What does a second GPU give? Decode steps and a prompt on one and on two, in turns of the same run.

    limit of a decode step    bytes that are read / (ranks x measured read bandwidth) + measured sums over ranks
    limit of a prompt         what one GPU takes / ranks + measured sums over ranks

Each number of ranks has processes of its own, which `torchrun` starts (`probes/ranks.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

import torch

from bench.case import Bench, Case
from bench.markdown import NONE, milliseconds, of_each, table
from bench.workload import Claim, Target, Workload, register

SHAPE = "llama-2-7b-random"
#: Rows x tokens. 64 x 2048 of a 7B do not fit one card of 80 GB; 32 are what is compared there.
ON_GPU = {
    "ranks": [1, 2], "decode": [[1, 16384], [32, 2048], [64, 2048]], "prefill": [16384], "new_tokens": 48, "repeats": 5,
}  # fmt: skip
#: The default model has three KV heads.
ON_CPU = {"ranks": [1, 3], "decode": [[1, 256], [4, 64]], "prefill": [256], "new_tokens": 24, "repeats": 3}


def run_parallel(bench: Bench) -> dict:
    found = [point for ranks in bench.params["ranks"] for point in _points(bench, ranks)]
    alone = {_at(point): point for point in found if point["ranks"] == 1 and "error" not in point}
    return {"points": [point | _compared(point, alone.get(_at(point))) for point in found]}


def _points(bench: Bench, ranks: int) -> list[dict]:
    bench.say(f"on {ranks}")
    case_path, points_path = bench.scratch / "ranks-case.json", bench.scratch / "ranks-points.json"
    case_path.write_text(bench.case.to_json())
    points_path.unlink(missing_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [*torchrun, "-m", "bench.probes.ranks", str(case_path), str(points_path)], stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = process.communicate(timeout=0.45 * bench.case.timeout)
    except BaseException:
        process.terminate()  # torchrun ends its ranks
        process.communicate()
        raise
    if process.returncode:
        errors = [line for line in said.splitlines() if "Error: " in line] or [f"status {process.returncode}"]
        raise RuntimeError(f"{ranks} ranks: {errors[0]}")
    return json.loads(points_path.read_text())


def _at(point: dict) -> tuple:
    return point["what"], point["rows"], point["tokens"]


def _compared(point: dict, alone: dict | None) -> dict:
    """The limit of a point in seconds, and how many times as fast it is as one GPU."""
    if "error" in point:
        return {}
    sums = point["sums"]["median"] if point["ranks"] > 1 else 0.0
    faster = alone and alone["seconds"]["median"] / point["seconds"]["median"]
    if point["what"] == "decode":
        return {"faster": faster, "limit": point["bytes"] / (point["ranks"] * point["read"]) + sums}
    return {"faster": faster, "limit": alone and alone["seconds"]["median"] / point["ranks"] + sums}


def cases(to: Target) -> Iterable[Case]:
    size = ON_GPU if to.on_gpu else ON_CPU
    model = to.model or (SHAPE if to.on_gpu else None)
    yield to.case("paged", "bfloat16" if to.on_gpu else "float32", size, timeout=580, model=model)


def _lacking(case: Case) -> str | None:
    num_needed = max(case.params["ranks"])
    if case.device.startswith("cuda") and torch.cuda.device_count() < num_needed:
        return f"needs {num_needed} GPUs, {torch.cuda.device_count()} are here"
    return None


def _largest_batch(result: dict) -> float | None:
    """Of the steps of several rows that ran on one and on several."""
    points = [p for p in result["points"] if p["what"] == "decode" and p["ranks"] > 1 and p.get("faster")]
    return max(points, key=lambda p: p["rows"])["faster"] if points else None


def _row(point: dict) -> list[str]:
    shape = f"{point['rows']} x {point['tokens']}"
    if "error" in point:
        return [point["what"], shape, point["ranks"], point["error"], *[NONE] * 4]
    limit, faster, median = point["limit"], point["faster"], point["seconds"]["median"]
    if (point["what"], point["ranks"]) == ("prefill", 1):
        limit = None  # its time is what others are compared with
    return [
        point["what"], shape, point["ranks"], milliseconds(point["seconds"]),
        NONE if limit is None else f"{limit * 1e3:.2f}",
        NONE if limit is None else f"{limit / median:.2f}",
        milliseconds(point["sums"]) if point["ranks"] > 1 else NONE,
        NONE if faster is None or point["ranks"] == 1 else f"{faster:.2f}x",
    ]  # fmt: skip


def _table(result: dict) -> str:
    head = ["work", "rows x tokens", "ranks", "time, ms", "limit, ms", "share", "sums over ranks, ms", "of one"]
    return "**One model over several ranks**\n\n" + table(head, map(_row, result["points"]))


register(
    Workload(
        "parallel",
        run_parallel,
        "what does a second GPU give? (decode steps and a prompt on one and on two, the sums between them)",
        cases={"parallel": cases},
        tables=of_each("parallel", _table),
        lacking=_lacking,
        claims=[
            Claim("decode step, largest batch: on one GPU / on two", "at least 1.7x", 1.7, _largest_batch, "{:.2f}x")
        ],
    )
)
