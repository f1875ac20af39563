"""`kv-strategies plan`: the table of `planner.py` for a model and a card that need not be here."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .losses import Loss, in_words, losses_of
from .models.load import DEFAULT_MODEL, model_shape
from .models.room import NoRoom
from .planner import Card, Model, Plan, Work, plan_all, settings, waits_for_host
from .registry import STRATEGIES, check, options_of_each
from .step.context import longest_row

DTYPES = ("bfloat16", "float16", "float32")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
#: What stands where the command says nothing: a consumer's card of 24 GB.
ASSUMED = {"bandwidth": 900.0, "pcie": 25.0, "tflops": 150.0}
NEW_TOKENS = 256
MOST_TOKENS = 16 << 20  # a prompt is planned chunk by chunk
MOST_BYTES = 10**15


def num_tokens(text: str) -> int:
    """`4096`, `32k` (of 1024) or `1m`."""
    found = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: give 4096, 32k or 1m")
    count = int(found[1]) * {"": 1, "k": 2**10, "m": 2**20}[found[2]]
    if count > MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MOST_TOKENS >> 20}m tokens, the most that is planned")
    return count


def num_bytes(text: str) -> int:
    """`24GB` (10^9), `24GiB` (2^30) or plain bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not found or found[2] == "i" or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give 24GB, 24GiB or a number of bytes")
    size = float(found[1]) * _UNITS[found[2]]
    if size > MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is more than {MOST_BYTES / 1e12:g}TB, more than is planned")
    size = int(size)
    if size < 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is {size} bytes, less than any card has: say the unit, as in 24GB")
    return size


def reserved_bytes(text: str) -> int:
    """As `num_bytes`, or 0."""
    return 0 if re.fullmatch(r"0+(\.0+)?\s*([kmgt]i?)?b?", text.strip().lower()) else num_bytes(text)


def positive(kind: Callable, least: float = 0, most: float = float("inf")) -> Callable:
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number above 0")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not from {least:g} to {most:g}")
        return value

    return read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = "a folder, a .gguf file, a hub id or a known random shape (default: SmolLM2-135M-Instruct)"
    parser.add_argument("--model", help=f"{known}; no weight is loaded")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and cache (%(default)s)")
    parser.add_argument("--context", type=num_tokens, required=True, help="tokens a row grows to, such as 32k")
    rows = positive(int, 1, MOST_TOKENS)
    parser.add_argument("--batch", type=rows, default=1, help="rows at the same time (%(default)s)")
    parser.add_argument("--new-tokens", type=num_tokens, help=f"of the context, generated ({NEW_TOKENS})")
    parser.add_argument("--gpu-memory", type=num_bytes, help="such as 24GB or 80GiB (default: of the GPU here)")
    parser.add_argument("--reserve", type=reserved_bytes, default=num_bytes("0.6GB"), help="CUDA's own share (0.6GB)")
    rates = {
        "bandwidth": "GB/s that the card's memory is read with",
        "pcie": "GB/s from the host to the card",
        "tflops": "that matrix products reach in this dtype",
    }
    for name, meaning in rates.items():
        parser.add_argument(f"--{name}", type=positive(float, 1e-3, 1e9), help=f"{meaning} ({ASSUMED[name]:g})")
    parser.add_argument("--strategy", action="append", help="only this one; may be repeated (default: all useful)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of what --strategy names")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes and seconds")


def run(options: argparse.Namespace, parsed: dict[str, object]) -> int:
    """Args: parsed: `--option` as a dictionary.

    Raises:
        ValueError: a model or strategy that there is not, or nothing that fits; it says how much is missing.
    """
    if parsed and not options.strategy:
        raise ValueError("--option belongs to a strategy: name it with --strategy")
    if options.gpu_memory is None and not torch.cuda.is_available():
        raise ValueError("there is no GPU here to take the size of: say --gpu-memory, such as 24GB")
    memory = options.gpu_memory or torch.cuda.get_device_properties(0).total_memory
    if options.reserve >= memory:
        raise ValueError(f"--reserve {_gb(options.reserve)} leaves nothing of a card of {_gb(memory)}")
    if options.new_tokens and options.new_tokens >= options.context:
        raise ValueError(
            f"--new-tokens {options.new_tokens} leave no prompt in a --context of {options.context}, which counts both"
        )
    rates = {name: getattr(options, name) or value for name, value in ASSUMED.items()}
    card = Card(memory, rates["bandwidth"] * 1e9, rates["pcie"] * 1e9, rates["tflops"] * 1e12, options.reserve)
    work = Work(options.context, options.batch, options.new_tokens or min(NEW_TOKENS, options.context - 1))
    chosen = _chosen(options.strategy, parsed) if options.strategy else list(settings())
    model = _model(options.model, options.dtype)
    plans = plan_all(chosen, model, work, card)
    name = Path(options.model).name if options.model else DEFAULT_MODEL.name
    losses = [losses_of(plan.strategy, plan.options, name, work.context) for plan in plans]
    if options.json:
        rows = list(map(_as_json, plans, losses))
        print(json.dumps({"card": vars(card), "work": vars(work), "weights": model.weights, "plans": rows}))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        parts = [_head(options, model, work, rates, card), _table(list(map(_row, plans, losses)), width)]
        notes = _notes(plans, losses)
        if waits_for_host(model, card):
            notes.insert(0, "times: those of the card alone, and in steps of so small a model its host takes as long")
        print("\n\n".join([_wrapped(parts[0], width), parts[1], *(_wrapped(note, width) for note in notes)]))
    if not any(plan.fits for plan in plans):
        raise ValueError(_too_large(plans, options, chosen, model, work, card))
    return 0


def _chosen(names: Sequence[str], given: dict[str, object]) -> list[tuple[str, dict[str, object]]]:
    chosen = list(zip(names, options_of_each(names, given, ["block_size"]), strict=True))
    for name, options in chosen:
        check(name, options)
    return chosen


def beside(error: NoRoom) -> str:
    """Where a model found no room and would in another dtype: the longest context of each strategy that fits beside."""
    if not error.dtypes:
        return "no strategy changes that: they save K and V, not weights"
    card = Card(error.free, *(ASSUMED[rate] * 1e9 for rate in ("bandwidth", "pcie", "tflops")))
    plans = plan_all([(name, {}) for name in STRATEGIES], _model(error.spec, error.dtypes[0]), Work(1), card)
    room = [f"{plan.label} {plan.longest_context or 'any number of'} tokens" for plan in plans if plan.fits]
    return f"in {error.dtypes[0]} there is room beside the weights for: {', '.join(room) or 'no strategy'}"


def _model(spec: str | None, dtype: str) -> Model:
    return Model(model_shape(spec, getattr(torch, dtype)))


def _too_large(
    plans: Sequence[Plan], options: argparse.Namespace, chosen: list, model: Model, work: Work, card: Card
) -> str:
    least = min((plan for plan in plans if not plan.refused), key=lambda plan: (plan.beyond, plan.missing))
    if least.beyond:
        return f"nothing fits: {_beyond(least)} (of {longest_row(model.config)} tokens), whatever the card"
    text = f"nothing fits: {least.label} lacks least, {_gb(least.missing)}"
    if model.weights > card.usable:
        text += f" (the weights alone take {_gb(model.weights)} of {_gb(card.usable)})"
    elif least.longest_context or least.largest_batch:
        text += f"; it holds {least.longest_context} tokens at batch {work.batch}, or batch {least.largest_batch} here"
    smaller = "bfloat16" if options.dtype == "float32" else None
    if smaller:
        fit = [plan.label for plan in plan_all(chosen, _model(options.model, smaller), work, card) if plan.fits]
        text += f". In {smaller} {'fits ' + ', '.join(fit) if fit else 'nothing fits either'}"
    return text


# --- what is shown


def _head(options: argparse.Namespace, model: Model, work: Work, rates: dict[str, float], card: Card) -> str:
    units = {"bandwidth": "GB/s read", "pcie": "GB/s over the link", "tflops": "TFLOP/s"}
    said = [
        f"{rates[name]:g} {unit}" + ("" if getattr(options, name) else " (assumed)") for name, unit in units.items()
    ]
    return (
        f"{options.model or 'the default model'} in {options.dtype}: {_gb(model.weights)} of weights. {work.batch} x "
        f"{work.context} tokens, {work.new_tokens} of them new. Card: {_gb(card.memory)}, {_gb(card.reserve)} of it "
        f"reserved; {', '.join(said)}."
    )


_COLUMNS = (
    "strategy", "fits", "KV bytes on GPU", "on host", "peak", "step", "bound by", "TTFT", "bound by",
    "longest context", "largest batch", "cost in quality",
)  # fmt: skip


def _row(plan: Plan, losses: Sequence[Loss] | None) -> list[str]:
    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:.1f} ms"

    if plan.refused:
        return [plan.label, "refused", *[""] * (len(_COLUMNS) - 2)]
    host = plan.tiers.get("host", 0)
    return [
        plan.label,
        "yes" if plan.fits else f"no, {_beyond(plan) if plan.beyond else f'{_gb(plan.missing)} missing'}",
        f"{plan.tiers['gpu']:,}",
        f"{host:,}" if host else "",
        _gb(plan.peak),
        seconds(plan.step),
        plan.step_bound or "",
        seconds(plan.ttft),
        plan.ttft_bound or "",
        "no end" if plan.longest_context is None else str(plan.longest_context),
        "no end" if plan.largest_batch is None else str(plan.largest_batch),
        in_words(losses),
    ]


def _beyond(plan: Plan) -> str:
    return f"{plan.beyond} tokens beyond the model's context"


def _notes(plans: Sequence[Plan], losses: Sequence[Sequence[Loss] | None]) -> list[str]:
    """What the table cannot say: why there is a dash, and what the last column is."""
    notes = [f"{plan.strategy}: no time, since {plan.unknown}" for plan in plans if plan.unknown]
    refused: dict[str, list[str]] = {}
    for plan in plans:
        if plan.refused:
            refused.setdefault(plan.refused.replace(repr(plan.strategy), "it"), []).append(plan.label)
    notes += [f"refused, {', '.join(labels)}: {why}" for why, labels in refused.items()]
    if ended := [plan.label for plan in plans if plan.longest_context_bound == "model"]:
        whose = "" if len(ended) == len(plans) else f" of {', '.join(ended)}"
        notes.append(f"longest context{whose}: the model's own; the card has room for more")
    if any(found is not None for found in losses):
        notes.append(
            "cost in quality: beside the exact cache, on the model and at the length of text that are named. What "
            "yours loses, make bench SUITE=quality MODEL=... measures"
        )
    return list(dict.fromkeys(notes))


def _table(rows: Sequence[Sequence[str]], width: int | None) -> str:
    """Columns where a terminal is wide enough for them, or there is none; else a few lines for each strategy."""
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    if width and sum(widths) + 2 * len(widths) > width:
        return "\n\n".join(_as_list(row, width) for row in rows)
    lines = [_COLUMNS, *rows]
    return "\n".join("  ".join(f"{t:<{w}}" for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _as_list(row: Sequence[str], width: int) -> str:
    told = [f"  {name}: {text}" for name, text in zip(_COLUMNS[1:], row[1:], strict=True) if text]
    return "\n".join(_wrapped(line, width) for line in (row[0], *told))


def _wrapped(text: str, width: int | None) -> str:
    return textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False) if width else text


def _gb(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if 0 < size < 10e6 else f"{size / 1e9:.2f} GB"


def _as_json(plan: Plan, losses: Sequence[Loss] | None) -> dict:
    """`losses`: null where there is nothing to lose, empty where nothing was measured."""
    measured = None if losses is None else list(map(asdict, losses))
    return vars(plan) | {"peak": plan.peak, "fits": plan.fits, "losses": measured}
