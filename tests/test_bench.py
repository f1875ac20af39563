"""The bench: its numbers are those of the result lines, and whatever happens to a case becomes a row."""

from __future__ import annotations

import json
import os
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from common import tiny_llama

import bench.suites.all  # noqa: F401  registers the workloads
from bench import machine, measure, report
from bench.accuracy import cost, judge
from bench.case import Bench, Case, ragged
from bench.lines import Found, machine_of
from bench.probes.limits import limits
from bench.report import comparison as comparisons
from bench.report import page as pages
from bench.report import readme as readmes
from bench.suites.cost import gpu_share
from bench.suites.limit import batching, decode, profile
from bench.suites.limit.attention import ATTENTION
from bench.suites.limit.table import GQA, MHA
from bench.suites.strategies.fan_out import without_cascade
from bench.systems import DOOR, PEERS, Capacity, Native, Run, bytes_read, filled, open_system, stored_bytes
from bench.workload import WORKLOADS, Target, in_words, suite, suites
from kv_strategies import build
from kv_strategies.step.upstream import with_cache

CONDITIONS = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "cuda": None},
    "commit": "0123456789ab",
    "dirty": False,
    "time": "2026-01-02T03:04:05+00:00",
}
CPU = {"cpu": "A processor", "cores": 2, "threads": 2}
GPU = CPU | {"gpu": "A card", "gpu_memory": 80 << 30}


def line(workload, system, result=None, about=CPU, error=None, **changes):
    head = {"suite": "default", "workload": workload, "system": system, "model": "some-model", "dtype": "float32"}
    outcome = {"status": "ok", "result": result} if error is None else {"status": "failed", "error": error}
    device = "a-card" if "gpu" in about else "cpu"
    return head | {"device": device, "params": {}, "machine": about} | CONDITIONS | outcome | changes


def spread(value):
    return {"median": value, "min": value - 1, "max": value + 1, "repeats": 3}


def throughput(system, rate, peak, **changes):
    result = {"tokens_per_second": spread(rate), "peak": peak, "parameter_bytes": 500_000_000}
    result["kv"] = {"bytes": 25_000_000, "tokens": 970, "places": 1000}
    result["kv_allocated"] = 24_900_000
    params = {"lengths": [10, 20], "new_tokens": 5}
    return line("throughput", system, result, params=params, **changes)


def context(system, step, about=CPU):
    point = {"batch": 1, "context": 4608, "ttft": spread(2.0), "step": spread(step), "step_bytes": 600_000_000}
    point["tokens"] = [1, 2, 3]
    failed = {"batch": 1, "context": 9000, "error": "out of memory"}
    params = {"points": [[1, 4608], [1, 9000]]}
    return line("context", system, {"points": [point, failed]}, about, params=params)


@pytest.fixture
def lines():
    limits = {"limits": {"read": 20e9, "copy": 18e9}}
    divergence = {"prompt": 3, "prompt_length": 63, "token": 17, "margin": 0.00123}
    again = {"identical_again": 5, "hit_rate": 0.25}
    return [
        line("machine", "limits", limits),
        line("accuracy", "baseline", {"prompts": 5, "identical": 5, "divergence": None}),
        line("accuracy", "paged", {"prompts": 5, "identical": 4, "divergence": divergence} | again),
        throughput("baseline", 52.6, 1_400_000_000),
        throughput("paged", 98.7, 1_210_000_000),
        line("throughput", "static", params={"lengths": [10, 20], "new_tokens": 5}, error="OutOfMemoryError: no room"),
        context("baseline", 0.090),
        context("paged", 0.060),
        line("sharing", "paged", {"samples": 4, "blocks_together": 17, "blocks_apart": 56}),
        throughput("paged", 4321.0, 14_000_000_000, about=GPU),
    ]


def write_lines(folder, lines):
    for device in {line["device"] for line in lines}:
        text = "".join(json.dumps(line) + "\n" for line in lines if line["device"] == device)
        (folder / f"default-{device}.jsonl").write_text(text)


def rows_of(text, system):
    return [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in text.splitlines()
        if row.startswith(f"| {system} |")
    ]


def test_report_shows_the_numbers_of_the_lines(tmp_path, lines):
    write_lines(tmp_path, lines)
    page = report.write(tmp_path).read_text()
    on_gpu, on_cpu = page.split("## CPU")
    main, memory, latency, *_ = rows_of(on_cpu, "paged")
    assert main[1:3] == ["1.21", "98.7 (97.7 to 99.7)"]
    assert main[3:] == ["4 of 5 prompts; margin 0.0012", "yes, 4608, tokens as baseline", "25% of repeated prompts"]
    assert memory[1:] == ["25.0", "24.9", "0.05", "970", "1000", "3.0%"]
    assert latency[1:] == ["2000.0 / 60.00 (0.50)", "out of memory"]  # 600 MB / 20 GB/s is half of 60 ms
    assert "prompt of 63 tokens, new token 17" in on_cpu and "17 instead of 56" in on_cpu
    assert "memory read 20.0 GB/s" in on_cpu and "commit 0123456789ab" in on_cpu
    assert rows_of(on_gpu, "paged")[0][1:3] == ["14.00", "4321.0 (4320.0 to 4322.0)"]
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["a-card-some-model-float32.png", "cpu-some-model-float32.png"]
    assert all((tmp_path / name).stat().st_size < 200_000 for name in pictures)


def test_report_shows_failures_and_lacks_nothing_when_peers_are_missing(tmp_path, lines):
    page = pages.render(lines, "title")
    main, reason = rows_of(page, "static")[0], "OutOfMemoryError: no room"
    assert main[1] == f"failed: {reason}"
    assert f"| throughput | static | some-model | float32 | failed | {reason} |" in page
    only = [line for line in lines if line["system"] == "paged"]
    assert rows_of(pages.render(only, "title"), "paged")
    write_lines(tmp_path, [])
    assert "No results yet" in report.write(tmp_path).read_text()


def test_the_latest_run_of_a_case_counts(lines):
    again = throughput("paged", 111.1, 1_000_000_000, time="2026-01-03T00:00:00+00:00")
    page = pages.render([again, *lines], "title")
    assert "111.1" in page and "98.7" not in page


def test_systems_stand_in_one_order_whenever_they_ran():
    ran = ["an own one", "static", "paged" + DOOR, "int8", "paged", "baseline"]
    found = Found([throughput(system, 10, 1e9) for system in ran])
    order = ["baseline", "paged", "int8", "paged" + DOOR, "static", "an own one"]
    assert list(found.of("throughput", "some-model")) == order
    assert [row[0] for row in comparisons.rows(found, "some-model", "float32")] == order


def test_a_share_is_of_the_bandwidth_that_its_own_suite_measured():
    def measured(suite, read, minute):
        time = f"2026-01-02T03:{minute}:00+00:00"
        return line("machine", "limits", {"limits": {"read": read}}, suite=suite, time=time)

    ran = throughput("paged", 10, 1e9, time="2026-01-02T03:30:00+00:00")
    found = Found([measured("default", 10e9, 10), measured("strategies", 20e9, 20), measured("default", 40e9, 40), ran])
    assert found.share(ran, 5e9) == 0.5
    assert found.share(ran | {"suite": "limit"}, 5e9) == 0.25  # the last before it, in whatever suite
    assert found.share(ran | {"time": "2026-01-01T00:00:00+00:00"}, 5e9) == 0.5  # nobody had measured it yet


@pytest.mark.parametrize(("cache", "steps"), [("static", 60), (None, 4), ("offloaded", 4)])
def test_what_is_compiled_for_a_length_is_warmed_up_at_that_length(monkeypatch, cache, steps):
    asked = []
    monkeypatch.setattr(Native, "__call__", lambda self, prompts, new_tokens: asked.append(new_tokens))
    Native(None, cache).warm_up([[1, 2, 3]], 60)
    assert asked == [steps]


@pytest.mark.parametrize("model", [MHA, GQA, "a-folder"])
def test_a_shape_that_is_named_has_its_own_points(model):
    cases = decode.cases(Target("limit", "cuda", model))
    own = next(case for case in cases if case.system == "paged")
    assert own.model == model and own.params["points"] == decode.POINTS.get(model, decode.POINTS[MHA])


def test_limits_are_positive():
    assert all(value > 0 for value in limits("cpu", size=1 << 22).values())


def test_conditions_name_no_host():
    text = json.dumps(machine.conditions("cpu"))
    assert str(machine.ROOT) not in text and os.uname().nodename not in text


def test_steady_steps_leave_out_prefill_and_what_follows_the_first_end():
    early, late = [1, 2, 3, 4, 5], [2.5, 3.5, 4.5, 5.5, 6.5]
    assert measure.steady_steps([early, late]) == [1, 1]
    assert measure.steady_steps([[0.5, 1.0, 2.0]]) == [0.5, 1.0]


def test_repeats_are_steady_when_the_last_hardly_moved_their_median():
    assert not measure.is_steady([1.0, 1.0])
    assert measure.is_steady([1.0, 1.0, 1.0]) and measure.is_steady([2.0, 1.0, 1.02, 1.01])
    assert not measure.is_steady([2.3, 1.0, 0.9])  # 1.65 before the last, 1.0 with it


@pytest.mark.parametrize("runs, expected", [([1, 1, 9], 3), ([2, 1, 1.2, 1.15], 4), ([32, 16, 8, 4, 2, 1], 6)])
def test_a_native_cache_runs_until_its_median_is_steady(monkeypatch, runs, expected):
    from bench.suites.default.throughput import run_throughput

    took, lengths = iter([1.0, *runs]), [3, 5]  # the first is not counted
    monkeypatch.setattr(
        Native, "__call__", lambda self, prompts, new: Run([[0]] * len(prompts), [[1.0]] * len(prompts), next(took))
    )
    monkeypatch.setattr(Native, "filling", None, raising=False)
    params = {"lengths": lengths, "new_tokens": 1, "repeats": 3, "until_steady": 6}
    bench = Bench(Case("throughput", "baseline", None, "float32", "cpu", params), None, say=lambda text: None)
    bench.loaded = tiny_llama(), None
    assert run_throughput(bench)["seconds"]["repeats"] == expected


def test_the_native_quantized_cache_holds_codes_scales_and_what_is_not_quantised_yet():
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    old = torch.randn(2, 3, 24, 32)  # [B, Hkv, n, D]
    scale, shift = MaxOptimizer()(old, qint4, 0, None)
    codes = quantize_weight(old, qtype=qint4, axis=0, scale=scale, shift=shift)
    assert stored_bytes(codes) == old.numel() // 2 + stored_bytes(scale) + stored_bytes(shift)
    new = torch.randn(2, 3, 5, 32)
    layer = SimpleNamespace(keys=new, values=new, _quantized_keys=codes, _quantized_values=codes)
    found = Native(None, "quantized")._fill(SimpleNamespace(layers=[layer] * 4), 50)
    assert found == {"bytes": 8 * (stored_bytes(codes) + 4 * new.numel()), "tokens": 50, "places": 2 * (24 + 5)}


def test_capacity_counts_blocks_of_the_fullest_batch():
    capacity = Capacity([[1, 16, 17], [100]])
    assert (capacity.max_requests, capacity.max_length, capacity.blocks(16)) == (3, 100, 7)


def test_ragged_lengths_are_fixed_and_reach_both_ends():
    lengths = ragged(8, 16, 320)
    assert lengths == ragged(8, 16, 320) and (min(lengths), max(lengths)) == (16, 320)
    assert ragged(1, 5, 9) == [5]


@pytest.mark.parametrize("name", suites())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_hold_every_strategy(name, device):
    from kv_strategies import STRATEGIES

    cases = suite(name, device, None)
    assert len({(case.name, case.dtype) for case in cases}) == len(cases)  # a line a case: none hides another
    if name in ("default", "equality"):
        assert {case.system for case in cases} >= {*STRATEGIES, "paged" + DOOR}
    if name == "default":
        assert {case.system for case in cases} >= set(PEERS)
    if name == "limit" and device == "cuda":
        assert {case.workload for case in cases} == {
            "machine",
            *(w.name for w in WORKLOADS.values() if "limit" in w.cases),
        }
    if name in ("strategies", "evict"):
        assert {case.workload for case in cases[1:]} == {w.name for w in WORKLOADS.values() if name in w.cases}
    with pytest.raises(ValueError, match=r"known are .*default"):
        suite("other", device, None)


def test_full_takes_the_texts_and_settings_of_a_gpu():
    full, on_gpu = (suite("cost", device, None, full=device == "cpu")[1:] for device in ("cpu", "cuda"))
    assert [case.params for case in full] == [case.params for case in on_gpu]
    assert {case.device for case in full} == {"cpu"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


EMPTY = f"{readmes.TABLE}\nold\n{readmes.END}\nuse it\n{readmes.FIGURES}\nold\n{readmes.END}\n"


def test_the_readme_shows_the_largest_model_on_a_gpu():
    small = throughput("paged", 10.0, 1e9)
    large = throughput("paged", 4321.0, 2e9, about=GPU, model="llama-2-7b-random", dtype="bfloat16")
    large["result"]["parameter_bytes"] = 13_000_000_000
    once = readmes.with_headline(f"before\n{EMPTY}after\n", [small, large], [small, large])
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once and "\nuse it\n" in once
    assert "4321.0" in once and readmes.PICTURE in once and "10.0" not in once
    assert readmes.with_headline(once, [small, large], [small, large]) == once
    assert readmes.with_headline(once, [], []) == once


# --- the suites strategies and cost


def measured(tiny, workload, system, params, **changes):
    """The line of a case that ran here, in this process."""
    case = Case(workload, system, tiny, "float32", "cpu", params)
    bench = Bench(case, None, say=lambda text: None)
    return line(workload, system, WORKLOADS[workload].run(bench), params=params, **changes)


SMALL = {
    "prefix": ("prefix", {"points": [[64, 5]], "repeats": 2}),
    "chat": ("prefix", {"users": 2, "system": 32, "words": 16, "answer": 5, "turns": 2, "repeats": 1}),
    "fan-out": ("prefix", {"history": 64, "candidates": 3, "candidate_tokens": 2, "new_tokens": 5}),
    "window": ("window", {"contexts": [64, 200], "window": 32, "sinks": 4, "new_tokens": 18}),
    "offload": ("offload", {"context": 60, "top_n": 8, "new_tokens": 6}),
    "8 bits": ("int8", {"batch": 2, "context": 40, "new_tokens": 5}),
}


@pytest.mark.parametrize("workload", SMALL)
def test_what_a_strategy_is_for(tiny, workload):
    found = measured(tiny, workload, *SMALL[workload], suite="strategies")
    result = found["result"]
    match workload:
        case "prefix":
            assert result["points"][0]["hit_rate"] == 64 / 69
        case "chat":
            assert [turn["prompt"] for turn in result["paged"]] == [48, 69] and len(result["native"]) == 2
            assert [turn["found"] for turn in result["prefix"]] == [32 / 48, 48 / 69]  # whole blocks of what was there
            assert [turn["found"] for turn in result["paged"]] == [0, 0]
        case "fan-out":
            assert (result["blocks_used"], result["blocks_apart"]) == (4 + 3, 3 * 5)
        case "window":
            first, last = result["points"]
            assert first["kv_bytes"] == last["kv_bytes"]
        case "offload":
            per_token = 2 * 2 * 8 * 4  # V of two layers, two heads, eight float32 numbers
            assert result["exact"]["bytes"] == 64 * per_token  # four blocks
            assert result["heaviest"]["kv_bytes"] < 0.8 * result["paged"]["kv_bytes"]
        case "8 bits":
            assert result["paged"]["bytes_per_token"] == 3.2 * result["int8"]["bytes_per_token"]
    page = pages.render([found], "title")
    assert f"| {workload} |" in page and "and not judged" in page and "{" not in page
    assert in_words(found)


def test_an_answer_longer_than_its_prompt(tiny):
    params = {"prompt": 8, "new_tokens": 12, "parts": 3}
    systems = ["baseline", "prefix+int8"]
    found = [measured(tiny, "long generation", system, params, suite="strategies") for system in systems]
    baseline, both = (own["result"] for own in found)
    for result in (baseline, both):
        points = [(point["context"], point["step"]["repeats"], point["mean_step"]) for point in result["points"]]
        assert [point[:2] for point in points] == [(12, 3), (16, 4), (20, 4)]
        assert result["ttft"] + sum(count * mean for _, count, mean in points) <= result["seconds"]
    per_token = baseline["kv_bytes_per_token"]
    assert baseline["kv_bytes_used"] == baseline["kv"]["bytes"] == 19 * per_token  # the last token is not stored
    read = [point["step_bytes"] for point in baseline["points"]]
    assert [b - a for a, b in pairwise(read)] == [4 * per_token] * 2
    codes = per_token * 10 // 32  # 8 and a scale of 2 bytes, of 8 numbers
    assert both["kv_bytes_used"] == both["kv"]["bytes"] == 2 * 16 * codes
    page = pages.render([*found, line("long generation", "int4", params=params, error="no room")], "title")
    assert "| step, ms, 8 to 12 | step, ms, 12 to 16 | step, ms, 16 to 20 |" in page and in_words(found[1])
    assert [row[0] for row in rows_of(page, "baseline")] and "no room" in page


SMALL_EVICT = {
    "evict blocks": {"rows": 2, "context": 96, "keep": 0.25, "new_tokens": 8, "score": "snapkv"},
    "evict step": {"batch": 2, "context": 96, "keep": 0.25, "new_tokens": 9, "score": "knorm", "repeats": 1},
    "evict first token": {"context": 96, "keep": 0.25, "repeats": 1, "scores": ["knorm", "snapkv"]},
    "evict crowd": {"lengths": [90, 40, 70], "new_tokens": 9, "keep": 0.25, "score": "snapkv", "places": 160},
    "evict crowd, long answers": {
        "lengths": [90, 40, 70],
        "new_tokens": 36,
        "keep": 0.25,
        "score": "snapkv",
        "places": 160,
        "every": 16,
    },
    "evict endless": {"cap": 16, "every": 16, "tokens": 200, "rounds": 2, "score": "tova"},
}


@pytest.mark.parametrize("workload", SMALL_EVICT)
def test_what_a_prompt_leaves_of_itself(tiny, workload):
    found = measured(tiny, workload, "evict", SMALL_EVICT[workload], suite="evict")
    result = found["result"]
    match workload:
        case "evict blocks":
            assert (result["paged"]["blocks"], result["evict"]["blocks"]) == (7, 2 * 2)  # 98 and 26 tokens a row
        case "evict crowd" | "evict crowd, long answers":
            assert result["evict"]["running"] > result["paged"]["running"]
        case "evict endless":
            assert result["early"]["kv_bytes"] == result["late"]["kv_bytes"]
    page = pages.render([found], "title")
    assert f"| {workload} |" in page and "{" not in page and in_words(found)


def test_a_stream_through_a_window(tiny, monkeypatch):
    from kv_strategies.models import text

    ids = torch.randint(0, 128, (100,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(text, "corpus", lambda tokenizer: ids)
    params = {"tokens": 400, "chunk": 16, "window": 32, "sinks": 4, "places": 8, "batch": 4, "warm_tokens": 64}
    found = measured(tiny, "stream", "window", params, suite="strategies")
    result = found["result"]
    assert result["early"]["kv_bytes"] == result["late"]["kv_bytes"] == result["kv_bytes_most"]
    assert result["perplexity_at_places"] == pytest.approx(result["recomputed_at_places"], rel=0.2)
    assert "400 tokens in chunks of 16" in pages.render([found], "title")


def test_cascade_can_be_switched_off():
    from kv_strategies.step import plan

    before = plan.MIN_TOKENS_SPARED
    with pytest.raises(KeyError), without_cascade():
        assert plan.MIN_TOKENS_SPARED > 1 << 40
        raise KeyError
    assert before == plan.MIN_TOKENS_SPARED


def test_what_is_reached_and_what_is_missed():
    points = [{"shared": 4096, "new": 64, "cold": spread(24), "hit": spread(2), "native": spread(30), "hit_rate": 0.98}]
    points.append(points[0] | {"shared": 16184, "cold": spread(40)})
    lines = [
        line("prefix", "prefix", {"points": points}, about=GPU),
        line("offload", "offload", about=GPU, params={"context": 16384, "top_n": 128}, error="OutOfMemoryError"),
    ]
    rows = rows_of(pages.render(lines, "title"), "prefix")
    assert [row[2:] for row in rows] == [
        ["at least 10x lower than without a hit", "12.0x", "reached"],
        ["at least 25x lower", "20.0x", "missed by 20.0%"],
    ]
    assert rows_of(pages.render(lines, "title"), "offload")[2][1:4] == [
        "top-128, 16384 tokens: step / resident paged step", "at most 1.2x", "failed: OutOfMemoryError",
    ]  # fmt: skip


# --- the suite limit

SMALLER = {"rows": 2, "context": 20, "shared": 32, "new": 4, "prefill": 5, "beside": 60}


@pytest.mark.parametrize(
    ("name", "seen"),
    [("contiguous", 43), ("paged", 43), ("int8", 43), ("offload", 43), ("window", 18), ("evict", 23), ("native", 43)],
)
def test_a_step_reads_what_its_row_still_sees(name, seen):
    """40 tokens of a prompt, half of which `evict` drops, and 3 that came since."""
    model = tiny_llama(max_position_embeddings=128)
    if name == "native":
        assert bytes_read(object(), model, 40, 3) == seen * measure.kv_bytes_per_token(model)
        return
    options = {"window": {"window": 16, "sinks": 2}, "contiguous": {"max_length": 80}}.get(name, {})
    strategy = build(name, model, num_blocks=2 if name == "contiguous" else 16, **options)
    system = SimpleNamespace(strategy=strategy)
    assert bytes_read(system, model, 40, 3) == seen * strategy.stats()["bytes_per_token"]
    if name != "window":  # which keeps the rest of a block
        cache = strategy.cache()
        model.generate(torch.arange(1, 41)[None], **with_cache(cache), max_new_tokens=4, pad_token_id=0)
        assert strategy.stats()["tokens_stored"] == seen


PROFILED = [entry | {name: value for name, value in SMALLER.items() if name in entry} for entry in profile.PROFILED]
BATCH = {"systems": ["paged", "generate_batch", "baseline"], "lengths": [5, 30, 9], "new_tokens": 4}
FEW_SLOTS = {"systems": ["paged"], "lengths": [5, 30, 9], "new_tokens": [4, 7, 20], "slots": 2, "places": 96}
SMALL_LIMIT = {
    "decode": (
        "paged",
        {
            "points": [[name, 2, 40] for name in ("paged", "contiguous", "int8", "paged" + DOOR, "baseline")],
            "new_tokens": 8,
            "native_tokens": 6,
            "repeats": 2,
        },
    ),
    "first token": ("paged", {"lengths": [40, 70], "points": [[64, 5]], "repeats": 1}),
    "batching": (
        "paged",
        {"batches": [BATCH | {"repeats": {"paged": 2}}, FEW_SLOTS | {"repeats": {}}], "rounds": 2},
    ),
    "profile": ("every strategy", {"entries": PROFILED, "context": 60, "steps": 2}),
}


@pytest.mark.parametrize("workload", SMALL_LIMIT)
def test_the_workloads_of_the_limit(tiny, workload):
    found = measured(tiny, workload, *SMALL_LIMIT[workload], suite="limit")
    result = found["result"]
    assert not re.findall(r'"error": "[^"]*"', json.dumps(result))
    match workload:
        case "decode":
            steps = {point["system"]: point["step"] for point in result["points"]}
            assert steps["paged"]["repeats"] == 2 * (8 - 1 - decode.NUM_UNSTEADY)
            assert steps["baseline"]["repeats"] == 2 * (6 - 1 - decode.NUM_UNSTEADY)
        case "first token":
            assert result["hits"]["points"][0]["hit_rate"] == 64 / 69
        case "batching":
            assert [row["tokens"] for row in result["batches"]] == [12, 12, 12, 31]
            assert [row["tokens_per_second"]["repeats"] for row in result["batches"]] == [4, 2, 2, 2]
        case "profile":
            assert all(0 < entry["busy_share"] <= 1 for entry in result["entries"])
    assert in_words(found)
    page = pages.render([line("machine", "limits", {"limits": {"read": 20e9}}), found], "title")
    assert "some-model" in page and "{" not in page


def test_graphs_are_captured_ahead(tiny, monkeypatch):
    """All batch sizes of a batch with few slots occur in the steps before it."""
    sizes = []
    case = Case("batching", "paged", tiny, "float32", "cpu", {})
    bench = Bench(case, None, say=lambda text: None)
    system = open_system("paged", bench.model, Capacity([[32] * 5]))
    step = system.runner._forward
    monkeypatch.setattr(
        system.runner, "_forward", lambda rows, counts, decoding, prefilling: (
            sizes.append(len(decoding) if not prefilling else 0), step(rows, counts, decoding, prefilling))[1],
    )  # fmt: skip
    batching._capture(bench, system, 5, 20)
    assert set(sizes) == {0, 1, 2, 3, 4, 5}


def test_a_context_counts_as_computed(tiny):
    case = Case("decode", "paged", tiny, "float32", "cpu", {})
    bench = Bench(case, None, say=lambda text: None)
    system = open_system("paged", bench.model, Capacity([[60] * 3]))
    with filled(system.strategy):
        run = system(bench.prompts([50] * 3, seed=0), 8)
    assert run.cached_tokens == [49] * 3
    assert system([[1, 2, 3]], 2).cached_tokens == [0]
    system.strategy.check_integrity()


def test_the_attention_kernel_alone(monkeypatch):
    from bench.probes import kernel_bandwidth

    monkeypatch.setitem(kernel_bandwidth.SHAPES, "mha-2x32", (2, 32, 2, 2))
    monkeypatch.setattr(kernel_bandwidth, "WORKING_SET", 0)
    params = {"shapes": ["mha-2x32", "no such shape"], "dim": 16, "repeats": 1}
    found = measured(None, "attention", "paged", params)
    first, second = found["result"]["points"]
    assert first["seconds"] > 0 and first["bytes"] == 2 * 32 * 2 * 16 * 2 * 2 and "KeyError" in second["error"]
    assert "GB/s" in in_words(found)


def on_a_card(workload, result, system="paged", model=MHA, **changes):
    return line(workload, system, result, about=GPU, suite="limit", model=model, dtype="bfloat16", **changes)


@pytest.fixture
def card():
    """Every case of the suite, each number of which is known."""

    def steps(points, slow=()):
        rows = [dict(zip(("system", "batch", "context"), point, strict=True)) for point in points]
        return {"points": [
            row | {"step": spread(0.02 if row["system"] in ("baseline", *slow) else 0.01), "unsteady": 1.5,
                   "step_bytes": 36_000_000_000} for row in rows]}  # fmt: skip

    def batch(system, requests, rate):
        return {"system": system, "requests": requests, "tokens": 100, "tokens_per_second": spread(rate), "peak": 5e10,
                "captures": {"count": 0, "seconds": 0.0}, "preemptions": None}  # fmt: skip

    prefill = {"own": spread(0.1), "native": spread(0.2), "operations": 70e12}
    hit = {"hit": spread(0.009), "cold": spread(0.1), "native": spread(0.2), "hit_rate": 0.98}
    entry = {
        "step": 0.01,
        "busy_share": 0.98,
        "launches": 200,
        "kernels": [["a_kernel", 32, 0.008], ["others", 4, 0.001]],
    }
    return [
        line("machine", "limits", {"limits": {"read": 4000e9}}, about=GPU, suite="limit"),
        on_a_card("attention", {"points": [
            {"shape": shape, "seconds": 1e-4, "bytes": 380_000_000} for shape in ATTENTION["shapes"]]}),
        on_a_card("decode", steps(decode.POINTS[MHA])),
        on_a_card("decode", steps([["static", 1, 4096]]), "static"),
        on_a_card("decode", steps(decode.POINTS[GQA], slow=["int8"]), model=GQA),
        on_a_card("first token", {
            "cold": {"tokens": 4096, "first": 21.5, "new_tokens": 8, "all": 30.0, "load": 6.0},
            "prefill": [prefill | {"tokens": 4096}, prefill | {"tokens": 16384}],
            "hits": {"points": [hit | {"shared": shared, "new": 64} for shared in (4096, 16184)]}}),
        on_a_card("batching", {"batches": [
            batch("paged", 64, 4600.0), batch("generate_batch", 64, 400.0), batch("paged", 256, 3800.0)]}),
        on_a_card("profile", {"entries": [entry | {"name": e["name"]} for e in profile.PROFILED]}, "every strategy"),
    ]  # fmt: skip


def test_the_table_of_the_limit(card):
    page = pages.render(card, "title")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in page.splitlines() if " at least " in row
            or " at most " in row]  # fmt: skip
    by_work = {row[0]: row[1:] for row in rows}
    assert len(rows) == len(by_work) == 27
    assert by_work["decode step, 1 x 4096: share"] == [
        "at least 0.89", "0.90", "reached", "10.00 ms", "36.00 GB, 3600 GB/s",
        "dynamic 0.45 (20.00 ms); static, compiled 0.90 (10.00 ms)", "0.75 (6.72 ms)",
    ]  # fmt: skip
    assert by_work["GQA shape, int8 KV, 32 x 8192: step / bf16 step"][1:3] == ["2.00", "missed by 185.7%"]
    assert by_work["attention kernel alone, 1 x 4096: share"][1:3] == ["0.95", "reached"]
    assert by_work["prefill, 4096 tokens in one chunk: TTFT"][1:3] == ["100.0 ms", "missed by 8.7%"]
    assert by_work["prefill, 4096 tokens in one chunk: TTFT"][4] == "700 TFLOP/s"
    assert by_work["the same / `generate_batch`"][1:3] == ["11.5x", "reached"]
    assert by_work["`Runner`, 256 requests, 100-1024 in, 100-1024 out: tokens/s"][1:3] == ["3800", "missed by 6.2%"]
    assert "not run" not in page and "failed" not in page
    assert "first token of 4096 came after 21.5 s" in page and "a_kernel 80%" in page
    for case in card[1:]:
        assert in_words(case)


def test_the_readme_shows_the_gpu_that_ran_a_suite_last(card):
    """Of the limits, what a serving engine was measured at; older results of another card are left to their page."""
    large = throughput("paged", 4321.0, 2e9, about=GPU, model=MHA, dtype="bfloat16")
    older = [dict(one, time="2020-01-01T00:00:00+00:00", machine={**GPU, "gpu": "an older card"}) for one in card]
    for found in ([*card, large, *older], [*older, large, *card]):
        readme = readmes.with_headline(EMPTY, found, found)
        assert "rows x tokens of context, on A card (" in readme and "an older card" not in readme
        assert "| decode step, 1 x 4096: share | at least 0.89 | 0.90 | reached | 10.00 ms |" in readme
        assert "| the same / `generate_batch` | at least 11.0x | 11.5x | reached |" in readme
        assert "kernel alone" not in readme and "GPU busy" not in readme and "What each strategy is for" not in readme


def test_the_host_and_commit_are_of_the_model_that_is_shown(card):
    large = throughput("paged", 4321.0, 2e9, about=GPU, model=MHA, dtype="bfloat16")
    of_another = dict(
        card[2], workload="long context", model="another", commit="of another", time="2099-01-01T00:00:00+00:00"
    )
    with_it, without = (
        readmes.with_headline(EMPTY, found, found) for found in ([*card, large, of_another], [*card, large])
    )
    assert with_it == without


def test_a_part_of_the_limit_that_failed_is_a_row(card):
    point = next(point for point in card[2]["result"]["points"] if point["system"] == "contiguous")
    kept = {name: point.pop(name) for name in ("step", "unsteady", "step_bytes")}
    point["error"] = "OutOfMemoryError: no room"
    some = [case for case in card if case["workload"] in ("machine", "decode")]
    page = pages.render(some, "title")
    assert "| at most 1.020 | OutOfMemoryError: no room | failed |" in page and "| not run |" in page
    assert kept
    failed = [case | {"status": "timeout", "error": "stopped after 300 s"} for case in card[1:]]
    page = pages.render([card[0], *failed], "title")
    assert page.count("timeout: stopped after 300 s") >= 26
    assert pages.render(card[1:], "title")  # without limits


def test_the_limit_on_a_cpu():
    points = [{"system": name, "batch": 1, "context": 128, "step": spread(step), "unsteady": 0.1, "step_bytes": 1e9}
              for name, step in (("baseline", 0.04), ("paged", 0.05))]  # fmt: skip
    batches = [{"system": name, "requests": 8, "tokens": 8, "tokens_per_second": spread(rate), "peak": 1e9,
                "captures": {"count": 0, "seconds": 0.0}, "preemptions": None}
               for name, rate in (("baseline", 50.0), ("paged", 80.0))]  # fmt: skip
    behind = [{"system": name, "batch": 1, "context": 4200, "step": spread(step), "unsteady": 0.1, "step_bytes": 1e9}
              for name, step in (("paged", 0.05), ("int8", 0.06), ("offload", 0.05))]  # fmt: skip
    lines = [line("decode", "paged", {"points": points}), line("batching", "paged", {"batches": batches})]
    lines.append(line("decode", "int8", {"points": behind}))
    page = pages.render(lines, "title")
    assert "| decode, float32, 1 x 4200: int8 / paged step | at most 1.00 | 1.20 | missed by 20.0% | 60.00 ms |" in page
    assert "| int8 | float32 | 1 x 4200 |" in page
    assert "| decode, float32, 1 x 128: tokens/s / native | at least 1.00 | 0.80 | missed by 20.0% |" in page
    assert "| ragged batch of 8, float32: tokens/s / native | at least 1.60 | 1.60 | reached |" in page


def test_cost_of_lossy_settings(tiny, tmp_path):
    settings = [["paged", "paged", {}], ["top-4", "offload", {"top_n": 4}], ["all of it", "offload", {"mass": 1.0}]]
    params = {"texts": 2, "prompt": 40, "judged": 8}
    found = measured(tiny, "cost", "top-N", params | {"settings": settings}, suite="cost")
    exact, few, whole = found["result"]["rows"]
    assert found["result"]["judged"] == 14
    assert max(exact["mean_kl"], whole["mean_kl"]) < 1e-6 < few["mean_kl"]
    assert (few["kept_tokens_mean"], exact["kept_tokens_mean"], exact["gpu_share"]) == (4, None, 1)
    write_lines(tmp_path, [found])
    report.write(tmp_path)
    row = rows_of((tmp_path / "cost_table.md").read_text(), "top-4")[0]
    assert row[1] == f"{few['perplexity']:.3f}" and row[5] == "4"
    assert (tmp_path / "cost-cpu-some-model.png").exists()


def test_logits_kept_and_logits_in_lockstep_give_the_same_cost(tiny):
    from kv_strategies.models import load_model

    model, _ = load_model(tiny, dtype=torch.float32, device="cpu")
    ids = torch.randint(0, 128, (2, 41), generator=torch.Generator().manual_seed(0))
    strategy, baseline = build("window", model, window=16, num_blocks=20), build("baseline", model)
    reference = judge(model, baseline, ids, num_prompt=20)
    kept = cost(model, strategy, reference, ids, num_prompt=20, chunk=3)
    assert kept == pytest.approx(cost(model, strategy, baseline, ids, num_prompt=20, chunk=3), rel=1e-3)
    assert kept["num_judged"] == reference.judged == 40
    assert gpu_share(strategy, 1600) == 3 / 100  # the sinks, and a window that begins anywhere in a block
    assert gpu_share(build("int8", model, num_blocks=4), 1600) == (8 + 2) / 16
    assert gpu_share(build("offload", model, num_blocks=4, top_n=4), 1600) == 3 / 4  # K, and V of one layer of two


def test_processors_of_one_name_that_differ_in_their_instructions_are_two_machines():
    about = [CPU, CPU | {"instructions": "AVX2"}, CPU | {"instructions": "AVX512"}]
    names = [machine_of(line("context", "paged", about=one)) for one in about]
    assert names == [f"CPU: A processor, {kind}2 cores" for kind in ("", "AVX2, ", "AVX512, ")]
    assert machine_of(line("context", "paged", about=GPU | {"instructions": "AVX2"})) == "A card"
    assert machine.describe("cpu")["instructions"] == torch.backends.cpu.get_cpu_capability()
