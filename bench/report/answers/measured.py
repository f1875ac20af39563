"""What one machine measured, as the answers look it up, and what several of them say in the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.lines import Found, machine_of
from bench.systems import in_order


@dataclass(frozen=True)
class Answer:
    """One or two sentences, the lines they are made of, under which conditions, and a table beside them."""

    text: str
    lines: Sequence[dict]
    conditions: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


class Measured:
    """The lines of one machine that are done, those of its largest model first; systems in their one order."""

    def __init__(self, found: Found) -> None:
        self.found, self.name = found, machine_of(found.lines[0])
        self._done = [line for line in found.lines if line["status"] == "ok" and line["workload"] != "machine"]
        sizes: dict[str, int] = {}
        for line in self._done:
            sizes[line["model"]] = max(sizes.get(line["model"], 0), line["result"].get("parameter_bytes", 0))
        order = in_order([line["system"] for line in self._done])
        self._done.sort(key=lambda line: (-sizes[line["model"]], order.index(line["system"])))

    def all(self, workload: str) -> list[dict]:
        """Of all models and dtypes."""
        return [line for line in self._done if line["workload"] == workload]

    def of(self, workload: str, like: dict | None = None) -> dict[str, dict]:
        """System -> its line: of one model and dtype, those of the line `like` where one is given."""
        lines = self.all(workload)
        like = like or next(iter(lines), {})
        return {line["system"]: line for line in lines if _kind(line) == _kind(like)}


def _kind(line: Mapping) -> tuple:
    return line.get("model"), line.get("dtype")


def batch_of(line: dict) -> str:
    """The batch of a workload of ragged prompts, in words."""
    lengths, new_tokens = line["params"]["lengths"], line["params"]["new_tokens"]
    return f"{len(lengths)} requests of {min(lengths)} to {max(lengths)} tokens, {new_tokens} new each"


def empty_share(kv: dict | None) -> str:
    """Of the places for tokens in a KV store, those that hold none."""
    return f"{1 - kv['tokens'] / kv['places']:.1%}" if kv and kv["tokens"] else "it does not say"


def rate_of(point: dict) -> float:
    """Tokens a second, the median."""
    return point["tokens_per_second"]["median"]


def steps_of(line: dict) -> list[dict]:
    """Its points with a decode step, the shortest context first."""
    points = [point for point in line["result"]["points"] if point.get("step")]
    return sorted(points, key=lambda point: (point["context"], point["batch"]))


def shape_of(point: dict) -> str:
    """Requests x tokens of context."""
    return f"{point['batch']} x {point['context']}"
