"""What `kv-strategies plan` would have said of every run in the results, beside what was measured there.

Bytes of K and V are compared to the byte, peaks and times within `WITHIN`. A time is compared where the planner names
one: decode steps and first tokens of this project's strategies on a GPU, at the read bandwidth and link rate that the
machine itself reached. Where nobody measured these (`make bench ONLY=machine`), times are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from bench.lines import Found, machine_of
from bench.markdown import table, unique
from bench.suites.limit.table import LINEAR_RATE
from bench.systems import BLOCK_SIZE, CHUNK, Capacity
from kv_strategies import STRATEGIES
from kv_strategies.models.load import DEFAULT_MODEL, RANDOM_MODELS, model_shape
from kv_strategies.planner import TOO_SOON, Card, Model, Native, Ours, Work, waits_for_host

WITHIN = {"KV bytes": 0.0, "peak": 0.03, "step": 0.15, "TTFT": 0.15}
SHOWN = {"KV bytes": (1e-6, "MB", 1), "peak": (1e-9, "GB", 2), "step": (1e3, "ms", 2), "TTFT": (1e3, "ms", 1)}


@dataclass(frozen=True)
class Compared:
    """`what` of a system on a workload; values in bytes or seconds, measured ones with the smallest and largest, on
    the `day` of the run.
    """

    machine: str
    day: str
    model: str
    workload: str
    system: str
    at: str
    what: str
    predicted: float
    measured: float
    low: float
    high: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def is_within(self) -> bool:
        return abs(self.error) <= WITHIN[self.what]

    @property
    def in_words(self) -> tuple[str, str]:
        """What was predicted and what was measured."""
        scale, unit, digits = SHOWN[self.what]
        measured = f"{self.measured * scale:.{digits}f} {unit}"
        if self.low < self.high:
            measured += f" ({self.low * scale:.{digits}f} to {self.high * scale:.{digits}f})"
        return f"{self.predicted * scale:.{digits}f} {unit}", measured


def compare(lines: Sequence[dict]) -> list[Compared]:
    """All that can be compared, GPU by GPU; of several runs of a case the latest. A CPU's store leaves no gaps between
    planes, and its peak is that of a whole process.
    """
    found = []
    for own in _gpus(lines):
        for line in own.lines:
            if _is_compared(line) and not _waits_for_host(line, own):
                found += _READ[line["workload"]](line, own)
    return found


def _is_compared(line: dict) -> bool:
    is_planned = _is_known(line["model"]) and _is_planned(line["system"])
    return line["status"] == "ok" and line["workload"] in _READ and is_planned


def unmeasured(lines: Sequence[dict]) -> list[str]:
    """What is left out: the times of a GPU whose limits were not measured, and models too small for a GPU."""
    found = []
    for own in _gpus(lines):
        machine = machine_of(own.lines[0])
        if _card(own) is None:
            found.append(
                f"{machine}: no times, since its limits were not measured; `make bench ONLY=machine` does that"
            )
        found += [
            f"{machine}, {model}: not compared, since this card reads its weights in less than {TOO_SOON * 1e3:g} ms: "
            "steps wait for the host as much, and what nobody counts is a good part of its memory (docs/plan.md)"
            for model in unique(one["model"] for one in own.lines if _is_compared(one) and _waits_for_host(one, own))
        ]
    return found


def _gpus(lines: Sequence[dict]) -> Iterator[Found]:
    for machine in unique(machine_of(line) for line in lines if "gpu" in line["machine"]):
        yield Found([line for line in lines if machine_of(line) == machine])


def _is_planned(system: str) -> bool:
    """What the planner knows: the native cache, and strategies behind the runner, not behind `generate()`."""
    return system == "baseline" or set(system.split("+")) <= set(STRATEGIES)


def _is_known(model: str) -> bool:
    """Results name a model without its place: only those that the project itself knows can be looked at again."""
    return model in RANDOM_MODELS or (model == DEFAULT_MODEL.name and DEFAULT_MODEL.is_dir())


def render(found: Sequence[Compared], only_missed: bool = False) -> str:
    """A table, and how many of what are within which error."""
    if not found:
        return "Nothing that the planner predicts is among these results."
    rows = [
        [
            c.machine,
            c.model,
            f"{c.workload}, {c.at}",
            c.system,
            c.what,
            *c.in_words,
            f"{c.error:+.1%}",
            "" if c.is_within else "missed",
        ]
        for c in found
        if not (only_missed and c.is_within)
    ]
    head = ["machine", "model", "workload", "system", "what", "predicted", "measured", "error", ""]
    return table(head, rows) + "\n\n" + summary(found)


def summary(found: Sequence[Compared]) -> str:
    """Machine by machine, as the planner's rates are those of the newest code, and not every machine has run that; and
    model by model, as steps of a small one are the host's.
    """
    parts = []
    for machine, model in unique((c.machine, c.model) for c in found):
        days = sorted({c.day for c in found if (c.machine, c.model) == (machine, model)})
        where = f"{machine}, {model}, {' to '.join(unique((days[0], days[-1])))}"
        for what, within in WITHIN.items():
            own = [c for c in found if (c.machine, c.model, c.what) == (machine, model, what)]
            if own:
                errors = sorted(abs(c.error) for c in own)
                limit = f"within {within:.0%}" if within else "to the byte"
                parts.append(
                    f"{where}, {what}: {sum(c.is_within for c in own)} of {len(own)} {limit}, median error "
                    f"{errors[len(errors) // 2]:.1%}, largest {errors[-1]:.1%}"
                )
    return "\n".join(parts)


# --- what each workload measured


@cache
def _sizes(model: str, dtype: str) -> Model:
    return Model(model_shape(None if model == DEFAULT_MODEL.name else model, getattr(torch, dtype)))


def _card(found: Found) -> Card | None:
    """None where the limits of the machine were not measured."""
    about, limits = found.lines[-1]["machine"], found.limits
    if not {"read", "host_to_device"} <= set(limits):
        return None
    return Card(about["gpu_memory"], limits["read"], limits["host_to_device"], LINEAR_RATE)


def _waits_for_host(line: dict, found: Found) -> bool:
    card = _card(found)
    return card is not None and waits_for_host(_sizes(line["model"], line["dtype"]), card)


def _compared(line: dict, system: str, at: str, what: str, predicted: float, measured: dict | float) -> Compared:
    if not isinstance(measured, dict):
        measured = dict.fromkeys(("median", "min", "max"), measured)
    values = (predicted, measured["median"], measured["min"], measured["max"])
    day = line["time"].split("T")[0]
    return Compared(machine_of(line), day, line["model"], line["workload"], system, at, what, *values)


def _step(
    line: dict, found: Found, name: str, batch: int, context: int, new: int, measured: dict, at: str = "", **options
) -> Iterator[Compared]:
    """A decode step in the middle of `new` tokens behind `context` others, where its time can be predicted."""
    if card := _card(found):
        ours = Ours(name, options, _sizes(line["model"], line["dtype"]))
        predicted = max(ours.step(Work(context + new // 2, batch, new // 2), card).values())
        yield _compared(line, _label(name, options), at or f"{batch} x {context}", "step", predicted, measured)


def _first_token(line: dict, found: Found, name: str, context: int, measured: dict, **options) -> Iterator[Compared]:
    """The first token behind a prompt of `context`, where its time can be predicted."""
    if card := _card(found):
        ours = Ours(name, options, _sizes(line["model"], line["dtype"]))
        predicted = max(ours.first_token(Work(context), card).values())
        yield _compared(line, _label(name, options), f"1 x {context}", "TTFT", predicted, measured)


def _label(name: str, options: dict) -> str:
    said = ", ".join(f"{option}={value}" for option, value in options.items())
    return f"{name} ({said})" if said else name


def _pool(line: dict, capacity: Capacity) -> dict[str, int]:
    """Bytes a tier of the pool that the bench builds for such batches."""
    name, sizes = line["system"], _sizes(line["model"], line["dtype"])
    if name == "contiguous":
        ours = Ours(name, {"max_length": capacity.max_length}, sizes)
        return ours.tiers(capacity.max_requests, capacity.max_length)
    return Ours(name, {}, sizes).tiers(capacity.blocks(BLOCK_SIZE), capacity.max_length)


def _workspace(line: dict, lengths: Sequence[int], new: int) -> int:
    """Bytes beside weights and pool for a batch of prompts of these lengths; the longest takes most to choose from."""
    ours, longest = Ours(line["system"], {}, _sizes(line["model"], line["dtype"])), max(lengths)
    forward = ours.workspace(min(CHUNK, sum(lengths)), len(lengths), longest + new)
    return forward + ours.choosing(Work(longest + new, len(lengths), new))


def _memory(line: dict, lengths: Sequence[int], new: int, at: str) -> Iterator[Compared]:
    """Bytes of K and V and the peak of one batch of prompts of these lengths, `new` tokens for each."""
    system, sizes, result = line["system"], _sizes(line["model"], line["dtype"]), line["result"]
    if system == "baseline":  # it grows to one token less than it has said
        tiers, workspace = Native(sizes).memory(Work(max(lengths) + new - 1, len(lengths), new - 1))
    else:
        tiers = _pool(line, Capacity([[length + new for length in lengths]]))
        workspace = _workspace(line, lengths, new)
    yield _compared(line, system, at, "KV bytes", sum(tiers.values()), result["kv"]["bytes"])
    yield _compared(line, system, at, "peak", sizes.weights + tiers["gpu"] + workspace, result["peak"])


def _throughput(line: dict, found: Found) -> Iterator[Compared]:
    lengths = line["params"]["lengths"]
    yield from _memory(line, lengths, line["params"]["new_tokens"], f"{len(lengths)} requests")


def _points(line: dict, found: Found) -> Iterator[Compared]:
    """Of `context` and `batch`: the peak, the step and, of a single request that was repeated, the first token: the
    first of a kind waits for what has not been used before.
    """
    system, sizes = line["system"], _sizes(line["model"], line["dtype"])
    if system == "baseline":
        return
    shapes = [(b, c, line["params"]["new_tokens"] + b * c // CHUNK) for b, c in line["params"]["points"]]
    tiers = _pool(line, Capacity([[context + new] * batch for batch, context, new in shapes]))
    for (batch, context, new), point in zip(shapes, line["result"]["points"], strict=True):
        if "error" in point:
            continue
        workspace = _workspace(line, [context] * batch, new)
        at = f"{batch} x {context}"
        yield _compared(line, system, at, "peak", sizes.weights + tiers["gpu"] + workspace, point["peak"])
        if point["step"]:
            yield from _step(line, found, system, batch, context, new, point["step"])
        if batch == 1 and point["ttft"]["repeats"] > 1:
            yield from _first_token(line, found, system, context, point["ttft"])


def _long_generation(line: dict, found: Found) -> Iterator[Compared]:
    """Memory of the whole, and each part's step in the middle of it."""
    prompt, new, system = line["params"]["prompt"], line["params"]["new_tokens"], line["system"]
    yield from _memory(line, [prompt], new, f"1 x {prompt} + {new}")
    if system == "baseline":
        return
    points = line["result"]["points"]
    starts = [prompt, *(point["context"] for point in points)]
    for (start, end), point in zip(pairwise(starts), points, strict=True):
        at, both = f"1 x {start} to {end}", start + end - 2 * prompt  # twice the new tokens in the middle
        yield from _step(line, found, system, 1, prompt, both, point["step"], at)


def _decode(line: dict, found: Found) -> Iterator[Compared]:
    for point in line["result"]["points"]:
        name = point["system"]
        if "error" not in point and name != "baseline" and _is_planned(name):
            new = line["params"]["new_tokens"]
            yield from _step(line, found, name, point["batch"], point["context"], new, point["step"])


def _offload(line: dict, found: Found) -> Iterator[Compared]:
    params, result = line["params"], line["result"]
    settings = {"paged": ("paged", {}), "exact": ("offload", {}), "heaviest": ("offload", {"top_n": params["top_n"]})}
    for key, (name, options) in settings.items():
        if "error" not in result[key]:
            measured = result[key]["step"]
            yield from _step(line, found, name, 1, params["context"], params["new_tokens"], measured, **options)


def _eight_bits(line: dict, found: Found) -> Iterator[Compared]:
    params = line["params"]
    for name, point in line["result"].items():
        if "error" not in point:
            yield from _step(line, found, name, params["batch"], params["context"], params["new_tokens"], point["step"])


def _evict_step(line: dict, found: Found) -> Iterator[Compared]:
    params, result = line["params"], line["result"]
    batch, context, new = (params[name] for name in ("batch", "context", "new_tokens"))
    yield from _step(line, found, "paged", batch, int(context * params["keep"]), new, result["paged"])
    options = {name: params[name] for name in ("score", "keep")}
    yield from _step(line, found, "evict", batch, context, new, result["evict"], **options)


def _evict_first_token(line: dict, found: Found) -> Iterator[Compared]:
    params = line["params"]
    for key, result in line["result"].items():
        name, options = ("paged", {}) if key == "paged" else ("evict", {"score": key, "keep": params["keep"]})
        yield from _first_token(line, found, name, params["context"], result["first"], **options)
        yield from _step(line, found, name, 1, params["context"], 4, result["later"], **options)


_READ = {
    "throughput": _throughput,
    "context": _points,
    "long context": _points,
    "batch": _points,
    "decode": _decode,
    "offload": _offload,
    "8 bits": _eight_bits,
    "evict step": _evict_step,
    "evict first token": _evict_first_token,
    "long generation": _long_generation,
}
