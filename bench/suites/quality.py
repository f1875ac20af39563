"""What does a strategy find of what the exact cache finds? `python -m bench --suite quality`.

The tasks of `bench/tasks`, at several lengths: each made as hard as the exact baseline can do it with this model, and
counted only where it does (`tasks/power.py`). Every setting of a strategy is a row: which samples it has right, how far
its logits are from the baseline's, the bytes it holds, and what a step takes; the baseline and lossless strategies are
rows as well. So a row is a point of a frontier (`report/frontier.py`).

Another setting is one entry of `settings`. Where a strategy chooses by what was asked, the question is hidden as well
(`tasks/answers.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from bench import measure
from bench.accuracy import MIN_JUDGED, Reference, cost, judge
from bench.case import Bench, Case, is_random
from bench.lines import Found, commits_of, machine_of
from bench.markdown import NONE, table
from bench.suites.cost import gpu_bytes_per_block
from bench.systems import BLOCK_SIZE, NATIVE_CACHES, Capacity, Native, Ours
from bench.tasks import TASKS, answers, power
from bench.tasks.story import Sample, samples
from bench.workload import Target, Workload, register

if TYPE_CHECKING:
    from kv_strategies.strategy import Strategy

SCORES = ("snapkv", "expected", "tova", "h2o", "keydiff", "knorm", "random", "window")


def settings(on_gpu: bool) -> dict[str, list[dict]]:
    """Kind -> its rows: a label, a strategy with its options, and the forms of the question; a case each."""
    windows, heaviest, masses = ((512, 1024, 2048), (32, 128), (0.9, 0.99)) if on_gpu else ((256,), (32,), (0.9,))
    return {
        "exact": [setting("baseline"), setting("paged"), setting("prefix")],
        "window": [
            *(setting(f"window {window}", "window", window=window) for window in windows),
            setting(f"prefix+window {windows[0]}", "prefix+window", window=windows[0]),
        ],
        "8 bits": [setting("int8"), setting("prefix+int8"), *([setting("fp8")] if on_gpu else [])],
        "4 bits": [setting("k8v4"), setting("int4")],
        "top-N and mass": [
            *(setting(f"top-{top_n}", "offload", top_n=top_n) for top_n in heaviest),
            *(setting(f"mass {mass}", "offload", mass=mass) for mass in masses),
        ],
        **({"compositions": COMPOSITIONS, "native": [setting("native, 4 bits", "quantized")]} if on_gpu else {}),
    } | {
        f"evict, keep {keep}": [
            setting(f"{score}, keep {keep}", "evict", forms=("shown", "hidden"), score=score, keep=keep)
            for score in SCORES
        ]
        for keep in ((0.75, 0.5, 0.25, 0.125) if on_gpu else (0.5,))
    }


def setting(label: str, strategy: str | None = None, forms: Sequence[str] = ("shown",), **options) -> dict:
    return {"label": label, "strategy": strategy or label, "options": options, "forms": list(forms)}


#: Sums of what saves memory, in two ways or three; beside them offload alone, which is exact and holds half.
COMPOSITIONS = [
    setting("offload"),
    setting("prefix+offload"),
    setting("offload+int8"),
    setting("top-128+int8", "offload+int8", top_n=128),
    setting("window 1024+offload", "window+offload", window=1024),
    setting("window 1024+int8", "window+int8", window=1024),
    setting("snapkv, keep 0.25+int8", "evict+int8", score="snapkv", keep=0.25),
    setting("snapkv, keep 0.25+offload+k8v4", "evict+offload+k8v4", score="snapkv", keep=0.25),
]
FORMS = {"shown": answers.shown, "hidden": answers.hidden}
ON_GPU = {
    "tried": 12,
    "samples": 25,
    "rows": 25,
    "tasks": list(TASKS),
    "texts": 8,
    "judged": 256,
    "batch": 8,
    "new_tokens": 24,
}
ON_CPU = {
    "tried": 5,
    "samples": 10,
    "rows": 10,
    "tasks": ["needle, single", "needle, multikey", "prefix-suffix, shared context"],
    "texts": 4,
    "judged": 64,
    "batch": 2,
    "new_tokens": 12,
}


def run_quality(bench: Bench) -> dict:
    """One row for each of `params["settings"]`, at `params["length"]` tokens."""
    if bench.loaded[1] is None:
        raise ValueError("tasks are written in words, and this model has no tokenizer")
    bench.params["rows"] = min(bench.params["rows"], _rows_that_fit(bench))
    asked = _asked(bench)
    drawn = {name: _measured_samples(bench, name, found["level"]) for name, found in asked.items() if found["counts"]}
    judged = _judged(bench)
    rows = []
    for index, wanted in enumerate(bench.params["settings"]):
        bench.say(f"{wanted['label']}, {index + 1} of {len(bench.params['settings'])}")
        rows.append(dict(wanted))
        try:
            rows[-1] |= _row_of(bench, wanted, asked, drawn, judged)
        except (ValueError, torch.OutOfMemoryError) as error:  # what this card or model has not
            rows[-1]["error"] = measure.reason(error)[:200]
        bench.free()
    return {"asked": asked, "rows": rows}


def _rows_that_fit(bench: Bench) -> int:
    """How many contexts a third of the free memory of a GPU holds, beside what a forward takes; one at least."""
    if bench.model.device.type != "cuda":
        return bench.params["rows"]
    per_row = bench.params["length"] * measure.kv_bytes_per_token(bench.model)
    return max(1, torch.cuda.mem_get_info(bench.model.device)[0] // 3 // per_row)


def _asked(bench: Bench) -> dict[str, dict]:
    """Task -> its level, which samples the baseline has right, and whether it counts.

    The first case of a run at this length finds it, the others read; a run that is resumed finds the same once more.
    """
    case = bench.case
    about = {name: bench.params[name] for name in ("length", "tasks", "tried", "samples")}
    key = json.dumps([case.model, case.dtype, case.device, about], sort_keys=True)
    path = bench.scratch / f"asked-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())
    model, tokenizer = bench.loaded
    native, asked = answers.native(model, bench.params["rows"]), {}
    quick = answers.shown(model, _built(bench, setting("paged")), bench.params["rows"])  # the same tokens, but sooner
    for name in bench.params["tasks"]:

        def attempt(level: dict, name: str = name) -> list[bool]:
            bench.say(f"{name}, {level}")
            return answers.right(_samples(bench, name, level, range(bench.params["tried"])), quick, tokenizer.decode)

        level = power.level_for(TASKS[name].levels, attempt)
        right = answers.right(_measured_samples(bench, name, level), native, tokenizer.decode) if level else []
        asked[name] = {"level": level, "right": _marks(right), "counts": power.counts(right)}
    path.write_text(json.dumps(asked))
    return asked


def _measured_samples(bench: Bench, name: str, level: dict) -> list[Sample]:
    """Others than those that chose the level."""
    tried = bench.params["tried"]
    return _samples(bench, name, level, range(tried, tried + bench.params["samples"]))


def _samples(bench: Bench, name: str, level: dict, seeds: Sequence[int]) -> list[Sample]:
    return samples(bench.loaded[1], TASKS[name], level, bench.params["length"], seeds)


def _marks(right: Sequence[bool]) -> str:
    return "".join("01"[each] for each in right)


def _judged(bench: Bench) -> tuple[torch.Tensor, int, Reference]:
    """Natural texts, how many tokens of them are a prompt, and the baseline's logits of the rest."""
    from kv_strategies import build

    num_prompt = bench.params["length"] - bench.params["judged"]
    texts = torch.tensor(bench.prompts([bench.params["length"]] * bench.params["texts"], seed=11))
    return texts, num_prompt, judge(bench.model, build("baseline", bench.model), texts, num_prompt=num_prompt)


def _row_of(bench: Bench, wanted: dict, asked: dict, drawn: dict, judged: tuple) -> dict:
    """Samples right in every form, how far the logits are, bytes held, and the time of steps."""
    model, tokenizer = bench.loaded
    length, rows = bench.params["length"], bench.params["rows"]
    if wanted["strategy"] == "baseline":
        right = {"shown": {name: asked[name]["right"] for name in drawn}}
        kv_bytes = length * measure.kv_bytes_per_token(model)
        return {"right": right, "kv_bytes": kv_bytes, **_steps(bench, Native(model, None))}
    if wanted["strategy"] in NATIVE_CACHES:
        return _native_row(bench, NATIVE_CACHES[wanted["strategy"]], drawn)
    strategy = _built(bench, wanted)
    right = {}
    for form in wanted["forms"]:
        way = FORMS[form](model, strategy, rows)
        right[form] = {name: _marks(answers.right(some, way, tokenizer.decode)) for name, some in drawn.items()}
    stats = strategy.stats()
    found = {"right": right, "shared": stats["hit_tokens"] / max(1, stats["prompt_tokens"])}
    texts, num_prompt, reference = judged
    found |= cost(model, strategy, reference, texts, num_prompt=num_prompt, chunk=1)
    system = Ours(model, strategy, Capacity([[1] * bench.params["batch"]]))
    stream = system.stream(bench.prompts([length], seed=5), 8)
    num_held = [strategy.stats()["blocks_used"] for _ in stream][4]  # in the midst of its new tokens
    return found | {"kv_bytes": num_held * gpu_bytes_per_block(strategy, model.dtype), **_steps(bench, system)}


def _native_row(bench: Bench, cache: str, drawn: dict) -> dict:
    """Likewise of a native cache, but for its logits."""
    model, tokenizer = bench.loaded
    way = answers.native(model, bench.params["rows"], cache)
    right = {name: _marks(answers.right(some, way, tokenizer.decode)) for name, some in drawn.items()}
    system = Native(model, cache)
    steps = _steps(bench, system)  # at last those of a batch: what it holds is that of all its rows
    return {"right": {"shown": right}, "kv_bytes": system.filling["bytes"] // bench.params["batch"], **steps}


def _built(bench: Bench, wanted: dict) -> Strategy:
    """With room for all rows at once, their new tokens, and a fork of each."""
    from kv_strategies import build

    blocks = -(-(bench.params["length"] + 128) // BLOCK_SIZE) + 1
    num_blocks = blocks * (max(bench.params[name] for name in ("rows", "batch", "texts")) + 1)
    return build(wanted["strategy"], bench.model, num_blocks=num_blocks, block_size=BLOCK_SIZE, **wanted["options"])


def _steps(bench: Bench, system: Native | Ours) -> dict:
    """Seconds a decode step, of one request and of a batch."""
    found = {}
    for name, rows in (("step", 1), ("batch_step", bench.params["batch"])):
        prompts = bench.prompts([bench.params["length"]] * rows, seed=rows)
        system.warm_up(prompts, bench.params["new_tokens"])
        found[name] = measure.spread(measure.steady_steps(system(prompts, bench.params["new_tokens"]).times))
    return found


def cases(to: Target) -> Iterable[Case]:
    """A case for each length and kind; on a CPU few, and in full what a GPU would find."""
    if is_random(to.model):
        return
    at_large = to.on_gpu or to.full
    sizes, lengths = (ON_GPU, (1024, 2048, 4096)) if at_large else (ON_CPU, (512,))
    for length in lengths:
        for kind, rows in settings(at_large).items():
            own = [row for row in rows if row["options"].get("window", 0) < length]
            params = sizes | {"length": length, "settings": own}
            dtype, timeout = ("bfloat16", 590) if to.on_gpu else ("float32", 3 * 3600)
            yield to.case(f"{length} tokens, {kind}", dtype, params, timeout=timeout)


def of_the_latest_tasks(lines: Iterable[dict]) -> list[dict]:
    """Without lines of this workload of which other tasks count, or other levels of them, than of the latest of the
    same machine, model, dtype and length: their shares are of something else. Lines of other workloads stay.
    """
    lines, latest = list(lines), {}
    for line in sorted(lines, key=lambda line: line["time"]):
        latest |= _counted(line)
    return [line for line in lines if _counted(line).items() <= latest.items()]


def _counted(line: dict) -> dict[tuple, dict[str, dict]]:
    """Among which lines a line is compared -> the tasks that count and their levels; nothing of other workloads."""
    if line["workload"] != "quality" or line["status"] != "ok":
        return {}
    among = machine_of(line), line["model"], line["dtype"], line["params"]["length"]
    return {among: {name: about["level"] for name, about in line["result"]["asked"].items() if about["counts"]}}


def tables(found: Found, model: str) -> str:
    done = [line for line in found.of("quality", model).values() if line["status"] == "ok"]
    shown = of_the_latest_tasks(done)
    parts = [NOTE]
    for length in sorted({line["params"]["length"] for line in done}):
        parts.append(_table([line for line in shown if line["params"]["length"] == length], length))
        others = [one for one in done if one not in shown and one["params"]["length"] == length]
        if others:
            left = ", ".join(line["system"] for line in others)
            parts.append(f"Not here, as other tasks or levels of them counted at commit {commits_of(others)}: {left}.")
    return "\n\n".join(parts)


NOTE = (
    "Share of samples with every answer right, and its 95 % interval (Wilson). Tasks in the manner of RULER (arXiv "
    "2404.06654) and SCBench (arXiv 2412.10319), written from seeds over the King James text. A task is made easier, "
    "level by level, until the exact baseline has 80 % of some samples right; others are measured, the same for every "
    "row, and it counts where the baseline reaches 80 % of these. Question hidden: the context was computed, and what "
    "is dropped was dropped, before the question came. Top-N and mass are for decode steps: a prompt is computed "
    "exactly. KL: of the baseline's next-token distribution from the strategy's, in nats, at the ends of natural texts "
    "of that length, one token at a time. KV: bytes that one request of that length holds on the GPU. Shared: prompt "
    "tokens that were found computed."
)


def _table(lines: Sequence[dict], length: int) -> str:
    asked = lines[-1]["result"]["asked"]
    counted = [name for name, about in asked.items() if about["counts"]]
    chosen = [[name, _level(about), _share(about["right"]), _verdict(about)] for name, about in asked.items()]
    rows = [
        _cells(row, form, counted)
        for line in lines
        for row in line["result"]["rows"]
        for form in (row["forms"] if "error" not in row else ["shown"])
    ]
    head = ["setting", "all tasks", *counted, "perplexity, of baseline", "mean KL", "KV, MB", "step, ms", "shared"]
    num_judged = max((row.get("num_judged", 0) for line in lines for row in line["result"]["rows"]), default=0)
    of_text = f"; perplexity and KL of {num_judged} tokens" * (num_judged >= MIN_JUDGED)
    return (
        f"**{length} tokens, {lines[-1]['dtype']}**{of_text}\n\n"
        + table(["task", "level", "exact baseline", ""], chosen)
        + "\n\n"
        + table(head, rows)
    )


def _level(about: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in about["level"].items()) if about["level"] else NONE


def _verdict(about: dict) -> str:
    if about["counts"]:
        return "counts"
    return "left out: the baseline does not reach 80 %" + ("" if about["level"] else " at any level")


def _share(right: str) -> str:
    if not right:
        return NONE
    low, high = power.interval(right.count("1"), len(right))
    return f"{right.count('1') / len(right):.0%} ({low:.0%} to {high:.0%})"


def _cells(row: dict, form: str, counted: Sequence[str]) -> list[str]:
    if "error" in row:
        return [row["label"], row["error"]]
    right = row["right"][form]
    judged = [NONE, NONE]
    if row.get("num_judged", 0) >= MIN_JUDGED:
        judged = [f"{row['perplexity'] / row['baseline_perplexity'] - 1:+.2%}", f"{row['mean_kl']:.1e}"]
    return [
        row["label"] + (", question hidden" if form == "hidden" else ""),
        _share("".join(right.values())),
        *(_share(right.get(name, "")) for name in counted),
        *judged,
        f"{row['kv_bytes'] / 1e6:.2f}",
        f"{row['step']['median'] * 1e3:.2f}",
        f"{row['shared']:.0%}" if "shared" in row else NONE,
    ]


def _words(result: dict) -> str:
    texts = []
    for row in result["rows"]:
        for form, right in row.get("right", {}).items():
            marks = "".join(right.values())
            texts.append(f"{row['label']}{', hidden' * (form == 'hidden')}: {_share(marks)}")
    return "; ".join(texts)


register(
    Workload(
        "quality",
        run_quality,
        "what is found in long texts of what the exact cache finds: needles, tracking, counting, two turns; KL; bytes",
        cases={"quality": cases},
        tables=tables,
        words=_words,
    )
)
