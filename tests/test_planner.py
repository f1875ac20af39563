"""The planner says before a run what the strategies say in it, and says clearly what cannot be."""

from __future__ import annotations

import copy
import json
import re
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from common import VOCAB, tiny_llama
from torch.profiler import ProfilerActivity, profile

from bench import lines, report
from bench.report import predictions
from kv_strategies import Request, Runner, build
from kv_strategies.cli import main
from kv_strategies.compaction import choosing_bytes
from kv_strategies.models.load import model_shape
from kv_strategies.planner import Card, Model, Ours, Work, largest, plan, settings
from kv_strategies.scores import SCORES

PLANNED = [setting for setting in settings() if setting[0] not in ("baseline", "contiguous")]


def small(name, options):
    """The setting at the size of a tiny model."""
    window = {"window": 32} if "window" in name.split("+") else {}
    return options | window | ({"top_n": 5} if "top_n" in options else {})


@pytest.mark.parametrize(("name", "options"), PLANNED)
def test_the_ledger_is_what_a_run_takes(name, options):
    """Bytes of the pool, blocks of a batch, and what a decode step fetches: as a real run has them."""
    options, model, chunk = small(name, options), tiny_llama(), 48
    work = Work(context=90, batch=3, new_tokens=20, chunk=chunk)
    ours = Ours(name, options, Model(model))
    num_blocks = ours.num_blocks(work)
    strategy = build(name, model, num_blocks=num_blocks, **options)
    on_a_card = Ours(name, options, Model(_meta(model)))
    assert sum(on_a_card.tiers(num_blocks, work.context).values()) == strategy.stats()["kv_bytes"]
    runner = Runner(model, strategy, max_num_seqs=3, max_batch_tokens=chunk)
    prompts = [[(7 * token + row) % VOCAB for token in range(work.prompt)] for row in range(work.batch)]
    results = runner.generate([Request(prompt, max_new_tokens=20, stop_token_ids=()) for prompt in prompts])
    assert [len(result.token_ids) for result in results] == [20, 20, 20] and runner.num_preemptions == 0
    beside = ours.memory(work)[1] - ours.model.workspace(chunk, work.batch)
    assert beside == strategy.stats().get("scoring_bytes", 0)


def test_what_is_evicted_is_planned_as_gone():
    """Blocks that serve a batch without preemption, far fewer than whole rows take; steps of as many tokens as stay."""
    model, options, num_rows = tiny_llama(), {"score": "knorm", "keep": 0.25}, 4
    work = Work(context=260, batch=num_rows, new_tokens=20, chunk=16)
    ours, paged = (Ours(name, opts, Model(_meta(model))) for name, opts in (("evict", options), ("paged", {})))
    num_blocks = ours.num_blocks(work)
    assert num_blocks < 0.6 * paged.num_blocks(work)
    strategy = build("evict", model, num_blocks=num_blocks, **options)
    runner = Runner(model, strategy, max_num_seqs=num_rows, max_batch_tokens=work.chunk)
    prompts = [[(7 * token + row) % VOCAB for token in range(work.prompt)] for row in range(num_rows)]
    runner.generate([Request(prompt, max_new_tokens=20, stop_token_ids=()) for prompt in prompts])
    assert runner.num_preemptions == 0
    card = Card(10**9, 1e9, 1e9, 1e12)
    assert ours.step(work, card) == paged.step(Work(context=80, batch=num_rows, new_tokens=20), card)


@pytest.mark.parametrize("name, dtype", [("evict", "float32"), ("evict", "bfloat16"), ("evict+int8", "bfloat16"),
                                         ("evict+int4", "bfloat16"), ("evict+offload", "float32")])  # fmt: skip
@pytest.mark.parametrize("at_once", [1 << 25, 1 << 14])
@pytest.mark.parametrize("score", SCORES)
def test_what_choosing_takes_is_planned(score, at_once, name, dtype, monkeypatch):
    """Against what the allocator hands out meanwhile: nearly all of it at least, and not much more."""
    monkeypatch.setattr("kv_strategies.scores.base.WEIGHTS_AT_ONCE", at_once)
    monkeypatch.setattr("kv_strategies.compaction.NUMBERS_AT_ONCE", at_once)
    model = tiny_llama(num_heads=6, num_kv_heads=2, num_layers=3, head_dim=64).to(getattr(torch, dtype))
    options = {"score": score, "keep": 0.25}
    strategy, taken = build(name, model, num_blocks=40, **options), []
    choose = strategy.compaction._choose
    monkeypatch.setattr(strategy.compaction, "_choose", lambda tables: measured(taken, lambda: choose(tables)))
    prompt = [7 * token % VOCAB for token in range(480)]
    Runner(model, strategy, max_num_seqs=1).generate([Request(prompt, max_new_tokens=2, stop_token_ids=())])
    ours, work = Ours(name, options, Model(_meta(model))), Work(482, new_tokens=2)
    planned = ours.choosing(work)
    # A CPU takes the norm of 16 bits of copies in float32. Indices that come and go are not counted.
    least = 0.3 if (score, dtype) == ("knorm", "bfloat16") and name == "evict" else 0.7
    assert len(taken) == 1 and least * taken[0] < planned < 2.2 * taken[0], (planned, taken)
    found = plan(name, options, Model(_meta(model)), work, Card(10**9, 1e9, 1e9, 1e12))
    assert found.workspace == ours.memory(work)[1] + planned


def measured(taken, call):
    """What it returns, and in `taken` the most bytes that the allocator had handed out for it at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = call()
    events = profiler.profiler.kineto_results.events()
    taken.append(max(accumulate(event.nbytes() for event in events if event.name() == "[memory]")))
    return found


@pytest.mark.parametrize("name", ["evict", "evict+int8", "evict+int4"])
@pytest.mark.parametrize("score", SCORES)
def test_choosing_from_more_takes_no_less(score, name):
    """What looks for the longest context and the largest batch relies on it."""
    model = Model(model_shape("llama-3.1-8b-random", torch.bfloat16))
    for every in (None, 256):
        ours = Ours(name, {"score": score, "keep": 0.25, "every": every}, model)
        for works in ([Work(n, 2, 300) for n in range(301, 70000, 97)], [Work(4096, n, 300) for n in (1, 2, 3, 40)]):
            needed = [ours.choosing(work) for work in works]
            assert needed == sorted(needed)


@pytest.mark.parametrize("keep, every, new_tokens, of", [
    (1.0, None, 20, None), (100, None, 20, None), (0.5, None, 20, 80), (1.0, 32, 20, None), (1.0, 32, 32, 112),
    (40, 100, 99, 80), (40, 100, 100, 140), (90, 20, 29, None), (90, 20, 30, 110),
])  # fmt: skip
def test_choosing_is_planned_where_it_happens(keep, every, new_tokens, of):
    """Of a prompt of 80 tokens: rows of the length at which a run compacts, and nothing where it never does."""
    model, work = tiny_llama(), Work(80 + new_tokens, new_tokens=new_tokens)
    options = {"keep": keep, "every": every}
    ours = Ours("evict", options, Model(_meta(model)))
    strategy, lengths = build("evict", model, num_blocks=16, **options), []
    choose = strategy.compaction._choose_there
    monitor = lambda table, *rest: lengths.append(table.num_tokens) or choose(table, *rest)  # noqa: E731
    strategy.compaction._choose_there = monitor
    prompt = [7 * token % VOCAB for token in range(80)]
    # Rows are compacted before a step: one that is through is not, and what it has said last is never stored.
    Runner(model, strategy).generate([Request(prompt, max_new_tokens=new_tokens + 2, stop_token_ids=())])
    assert max(lengths, default=None) == of
    policies, site = ours.outline(work.context)
    cap = policies.selection.cap(80)
    assert ours.choosing(work) == (choosing_bytes(policies, site, of, cap) if of else 0)


def _meta(model):
    return copy.deepcopy(model).to("meta")


@pytest.mark.parametrize("options", [{}, {"resident": "none"}, {"top_n": 5}])
@pytest.mark.parametrize("name", ["offload", "offload+int8"])
def test_bytes_over_the_link_are_those_of_a_step(name, options):
    model = tiny_llama(num_heads=4, num_kv_heads=2)
    strategy = build(name, model, num_blocks=16, **options)
    runner, fetched = Runner(model, strategy), []
    for _ in runner.stream([Request(list(range(1, 48)), max_new_tokens=6, stop_token_ids=())]):
        fetched.append(strategy.stats()["bytes_to_device"])
    steps = [after - before for before, after in pairwise(fetched)]
    policies, site = Ours(name, options, Model(_meta(model))).outline(64)
    planes = policies.codec.planes(2, 16, 16, torch.float32)
    expected = {policies.placement.read_bytes(n, planes, site, is_decode=True)[1] for n in range(48, 54)}
    assert set(steps[1:]) <= expected, (steps, expected)


def test_the_largest_that_fits():
    for limit in (0, 1, 2, 3, 7, 8, 1000):
        assert largest(lambda n, limit=limit: n <= limit) == limit
    assert largest(lambda n: True) is None


def test_what_fits_fits_and_one_more_does_not():
    model = Model(model_shape("llama-3.1-8b-random", torch.bfloat16))
    card = Card(24 * 10**9, 9e11, 25e9, 150e12)
    for name, options in settings():
        found = plan(name, options, model, Work(4096, 2, 256), card)
        assert found.fits == (found.peak <= card.memory) and found.missing == max(0, found.peak - card.memory)
        for more in (0, 1):
            if found.longest_context is not None:
                again = plan(name, options, model, Work(found.longest_context + more, 2, 256), card)
                assert again.fits == (not more), name
            assert plan(name, options, model, Work(4096, found.largest_batch + more, 256), card).fits == (not more)


def test_every_kind_that_loads_has_a_shape(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    for kind, others in {"llama": {}, "qwen2": {}, "mistral": {"sliding_window": None}}.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes, **others}))
        config = model_shape(tmp_path, torch.float32).config
        assert {name: getattr(config, name) for name in sizes} == sizes, kind


def test_what_the_results_say_of_the_planner():
    """Memory everywhere; times for the most part. `make plan-check` shows each and says which miss."""
    found = predictions.compare(lines.read(report.RESULTS))
    of = {what: [compared for compared in found if compared.what == what] for what in predictions.WITHIN}
    assert len(of["KV bytes"]) >= 8 and all(compared.predicted == compared.measured for compared in of["KV bytes"])
    assert len(of["peak"]) >= 20 and all(compared.is_within for compared in of["peak"])
    assert any("evict" in compared.system for compared in of["step"])
    for what in ("step", "TTFT"):
        within = sum(compared.is_within for compared in of[what])
        assert len(of[what]) >= 20 and within >= 0.75 * len(of[what]), predictions.render(of[what], only_missed=True)


def test_the_page_says_what_the_results_say():
    """The counts of docs/plan.md, which are typed, are those of the lines that lie in `bench/results`."""
    found = predictions.compare(lines.read(report.RESULTS))

    def within(card, what):
        own = [compared.is_within for compared in found if card in compared.machine and compared.what == what]
        return sum(own), len(own)

    page = " ".join((Path(__file__).parents[1] / "docs" / "plan.md").read_text().split())
    (steps, of_steps), (first, of_first) = within("H200", "step"), within("H200", "TTFT")
    assert f"{steps} of {of_steps} steps" in page and first == of_first and f"all {first} first tokens within" in page
    first, of_first = within("H100", "TTFT")
    assert f"Of the H100's {of_first} first tokens {of_first - first} miss" in page


def test_a_model_whose_weights_a_card_reads_at_once_is_named_and_left_out():
    head = {"suite": "default", "device": "cuda", "model": "llama-2-7b-random", "dtype": "bfloat16", "status": "ok"}
    head |= {"time": "2026-01-01T00:00:00", "machine": {"gpu": "A card", "gpu_memory": 80 << 30}, "system": "paged"}
    result = {"kv": {"bytes": 10**9}, "peak": 15 * 10**9}
    ran = head | {"workload": "throughput", "params": {"lengths": [9], "new_tokens": 7}, "result": result}
    for read, num_found in ((3e12, 2), (300e12, 0)):  # 13.5 GB in 4.5 ms, and in 0.045
        limits = {"limits": {"read": read, "host_to_device": 50e9}}
        both = [head | {"workload": "machine", "params": {}, "result": limits}, ran]
        assert len(predictions.compare(both)) == num_found
        assert bool(predictions.unmeasured(both)) == (not num_found)


@pytest.mark.parametrize("system", ["baseline", "paged", "prefix+int8", "prefix+window"])
def test_a_long_answer_is_compared_part_by_part(system):
    """Compositions as well; each step in the middle of its part."""
    part = {"step": {"median": 0.01, "min": 0.009, "max": 0.011, "repeats": 128}, "mean_step": 0.01, "step_bytes": 1}
    result = {"points": [part | {"context": n} for n in (1536, 2560)], "peak": 15 * 10**9, "kv": {"bytes": 10**9}}
    head = {"suite": "strategies", "device": "cuda", "model": "llama-2-7b-random", "dtype": "bfloat16", "status": "ok"}
    head |= {"time": "2026-01-01T00:00:00", "machine": {"gpu": "A card", "gpu_memory": 80 << 30}}
    limits = {"limits": {"read": 3e12, "host_to_device": 50e9}}
    params = {"prompt": 512, "new_tokens": 2048, "parts": 2}
    found = predictions.compare(
        [
            head | {"workload": "machine", "system": "limits", "params": {}, "result": limits},
            head | {"workload": "long generation", "system": system, "params": params, "result": result},
        ]
    )
    steps = {compared.at: compared.predicted for compared in found if compared.what == "step"}
    memory = {compared.what: compared.predicted for compared in found if compared.what != "step"}
    token = 524288 * 130 // 256 if system == "prefix+int8" else 524288  # 128 codes and a scale of 2 bytes
    assert memory["KV bytes"] == (2559 if system == "baseline" else 2560) * token
    assert memory["peak"] > memory["KV bytes"] + 13 * 10**9
    model = Model(model_shape("llama-2-7b-random", torch.bfloat16))
    card = predictions.Card(80 << 30, 3e12, 50e9, predictions.LINEAR_RATE)
    parts = {"1 x 512 to 1536": Work(1024, 1, 512), "1 x 1536 to 2560": Work(2048, 1, 1536)}
    alone = system.removeprefix("prefix+")  # nothing is shared
    assert steps == {
        at: max(Ours(alone, {}, model).step(work, card).values()) for at, work in parts.items() if system != "baseline"
    }


# --- the command


def kv_plan(*arguments):
    return main(["plan", "--model", "llama-2-7b-random", *arguments])


def test_plan_prints_bytes_and_what_bounds(capsys):
    arguments = ["--context", "32k", "--batch", "8", "--gpu-memory", "80GB", "--pcie", "25", "--bandwidth", "900"]
    assert kv_plan(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["strategy"], json.dumps(row["options"])): row for row in found["plans"]}
    window = rows["window", "{}"]
    assert window["tiers"] == {"gpu": 8 * 258 * 16 * 524288} and window["fits"]  # sinks, window and a chunk of 2048
    assert rows["offload", "{}"]["step_bound"] == "link"
    assert rows["paged", "{}"]["losses"] is None and rows["window+int8", "{}"]["losses"] == []
    (loss, *_) = rows["int8", "{}"]["losses"]
    assert loss["measure"] == "perplexity" and loss["value"] > loss["exact"] and loss["samples"] > 1000
    assert kv_plan(*arguments) == 0
    out = capsys.readouterr().out
    assert f"{8 * 258 * 16 * 524288:,}" in out and "150 TFLOP/s (assumed)" in out and "900 GB/s read," in out
    assert "baseline: no time, since native steps wait for the host's processor" in out
    said = [line for line in out.splitlines() if line.startswith(("int8 ", "paged ", "window+int8 "))]
    lost = ["none", f"perplexity, with {loss['model']} in {loss['dtype']} at {loss['length']} tokens", "not measured"]
    assert all(what in line for line, what in zip(said, lost, strict=True)), said


def test_a_narrow_terminal_gets_a_list(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    assert kv_plan("--context", "4k", "--gpu-memory", "24GB", "--strategy", "paged", "--strategy", "evict") == 0
    out = capsys.readouterr().out
    assert "\npaged\n  fits: yes\n" in out and max(map(len, out.splitlines())) <= 40
    assert kv_plan("--context", "4k", "--gpu-memory", "999GB", "--strategy", "paged") == 0
    out = capsys.readouterr().out
    assert (
        "\n  longest context: 32768\n" in out
        and "longest context: the model's own" in out
        and max(map(len, out.splitlines())) <= 40
    )


def test_a_gguf_file_is_planned_without_its_weights(capsys):
    from kv_strategies.models.fetch import GGUF_NAME
    from kv_strategies.models.load import MODELS

    shapes = []
    for model in (MODELS / GGUF_NAME, MODELS / "SmolLM2-135M-Instruct"):
        arguments = ["--context", "2k", "--gpu-memory", "8GB", "--json"]
        assert main(["plan", "--model", str(model), *arguments]) == 0
        shapes.append(json.loads(capsys.readouterr().out)["plans"])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context", "32q"], "'32q' is no number of tokens: give 4096, 32k or 1m"),
        (["--context", "0"], "'0' is no number of tokens"),
        (["--context", "4k", "--gpu-memory", "24XB"], "'24XB' is no size: give 24GB, 24GiB or a number of bytes"),
        (["--context", "4k", "--batch", "-1"], "'-1' is no whole number above 0"),
        (["--context", "4k", "--bandwidth", "nan"], "'nan' is no number above 0"),
        (["--context", "17m"], "'17m' is more than 16m tokens"),
        (["--context", "4k", "--gpu-memory", "9" * 400 + "TB"], "is more than 1000TB"),
        (["--context", "4k", "--batch", "9" * 400], "is not from 1 to"),
        (["--context", "4k", "--bandwidth", "1e-320"], "'1e-320' is not from 0.001 to 1e+09"),
        (["--context", "4k", "--tflops", "1e300"], "'1e300' is not from 0.001 to 1e+09"),
        (["--context", "4k", "--gpu-memory", "24"], "'24' is 24 bytes, less than any card has: say the unit"),
    ],
)
def test_sizes_that_are_none(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        kv_plan(*arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reserve", "24GB"], "--reserve 24.00 GB leaves nothing of a card of 24.00 GB"),
        (["--new-tokens", "4k"], "--new-tokens 4096 leave no prompt in a --context of 4096"),
        (["--option", "top_n=8"], "--option belongs to a strategy"),
        (["--strategy", "paged", "--option", "block_size=0"], "block_size must be at least 1, got 0"),
        (["--strategy", "paged", "--option", "block_size=1.5"], "block_size takes a whole number or none, got 1.5"),
        (["--strategy", "offload", "--option", "host_bytes=-5"], "host_bytes must be at least 0, got -5"),
        (["--strategy", "offload", "--option", "disk_bytes=-5"], "disk_bytes must be at least 0, got -5"),
        (["--strategy", "baseline", "--option", "top_n=8"], "unknown option top_n: 'baseline' takes no options"),
        (["--strategy", "paged", "--strategy", "int8", "--option", "top_n=8"], "unknown option top_n: 'paged'"),
    ],
)
def test_what_makes_no_sense_together(arguments, said, capsys):
    assert kv_plan("--context", "4k", "--gpu-memory", "24GB", *arguments) == 1
    assert said in capsys.readouterr().err


def test_an_option_goes_to_whichever_takes_it(capsys):
    options = ["--strategy", "paged", "--strategy", "offload", "--option", "top_n=8", "--json"]
    assert kv_plan("--context", "1k", "--gpu-memory", "24GB", *options) == 0
    assert [row["options"] for row in json.loads(capsys.readouterr().out)["plans"]] == [{}, {"top_n": 8}]


def test_every_strategy_takes_a_block_size_and_nothing_need_be_reserved(capsys):
    options = ["--strategy", "paged", "--strategy", "int8", "--option", "block_size=32", "--reserve", "0", "--json"]
    assert kv_plan("--context", "1k", "--gpu-memory", "24GB", *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["options"] for row in found["plans"]] == [{"block_size": 32}] * 2 and found["card"]["reserve"] == 0


def test_a_card_with_room_for_any_batch_says_so(capsys):
    arguments = ["plan", "--context", "2", "--gpu-memory", "1000TB", "--strategy", "baseline"]
    assert main(arguments) == 0
    assert re.search(r"\nbaseline .* 8192 +no end ", capsys.readouterr().out)
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["largest_batch"] is None


@pytest.mark.parametrize("num_layers", [0, 10**30])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_of_no_depth_or_without_end(kind, num_layers, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "num_hidden_layers": num_layers}))
    assert main(["plan", "--model", str(tmp_path), "--context", "4k", "--gpu-memory", "24GB"]) == 1
    assert f"num_hidden_layers must be from 1 to 4096, got {num_layers}" in capsys.readouterr().err


def test_a_strategy_that_does_not_serve_the_model_is_a_row_that_says_why(tmp_path, capsys):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, "rope_parameters": rope}))
    arguments = ["plan", "--model", str(tmp_path), "--context", "64", "--gpu-memory", "24GB"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\nbaseline +yes ", shown) and re.search(r"\npaged +refused\n", shown)
    assert shown.count("rotary embeddings of type 'dynamic'") == 1
    assert main([*arguments, "--json"]) == 0
    baseline, contiguous, *_ = json.loads(capsys.readouterr().out)["plans"]
    assert (
        baseline["fits"] and not baseline["refused"] and not contiguous["fits"] and "'dynamic'" in contiguous["refused"]
    )
    assert main([*arguments, "--strategy", "paged"]) == 1
    assert "rotary embeddings of type 'dynamic'" in capsys.readouterr().err


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "llama"},
            "it lacks vocab_size, hidden_size, intermediate_size, num_hidden_layers",
        ),
        ({"model_type": "mistral", **SIZES, "intermediate_size": None}, "it lacks intermediate_size"),
        ({"model_type": ["llama"], **SIZES}, "is a model of type ['llama']"),
        (
            {"model_type": "llama", **SIZES, "num_key_value_heads": 3},
            "num_attention_heads 4 is no multiple of num_key",
        ),
        ({"model_type": "llama", **SIZES, "torch_dtype": "auto"}, "describes no model that could be built"),
        (
            {"model_type": "llama", **SIZES, "quantization_config": {"quant_method": "awq", "bits": 4}},
            "its weights are quantised (awq), which cannot be planned",
        ),
    ],
)
def test_a_config_of_which_nothing_could_be_built(config, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "--model", str(tmp_path), "--context", "64", "--gpu-memory", "24GB"]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),  # stretched there already
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 8},
            64,
        ),
    ],
)
def test_a_scaled_rotary_embedding_stretches_the_context(rope, longest):
    """For the plan and the runner alike, whose tokens are the native ones up to there."""
    model = tiny_llama(max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope})
    card = Card(10**9, 1e9, 1e9, 1e12)
    assert plan("paged", {}, Model(_meta(model)), Work(longest, 1, 4), card).longest_context == longest
    prompt = torch.randint(1, VOCAB, (1, longest - 7), generator=torch.Generator().manual_seed(0))
    native = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, longest - 7 :].tolist()
    runner = Runner(model, build("paged", model, num_blocks=32))
    (found,) = runner.generate([Request(prompt[0], max_new_tokens=8, stop_token_ids=())])
    assert found.token_ids == native
    with pytest.raises(ValueError, match=f"the model's context.* {longest}"):
        runner.generate([Request(prompt[0], max_new_tokens=9, stop_token_ids=())])


def test_what_does_not_fit_says_how_much_is_missing(capsys):
    assert kv_plan("--context", "4k", "--gpu-memory", "24GB", "--dtype", "float32") == 1
    error = capsys.readouterr().err
    assert "(the weights alone take 26.95 GB of 23.40 GB). In bfloat16 fits baseline, contiguous, paged" in error
    assert kv_plan("--context", "32k", "--batch", "18", "--gpu-memory", "24GB", "--strategy", "paged") == 1
    assert "nothing fits: paged lacks least, 299.62 GB; it holds 1008 tokens at batch 18" in capsys.readouterr().err


def test_a_few_megabytes_are_said_as_such(capsys):
    asked = ["--model", "llama-3.1-8b-random", "--context", "4k", "--strategy", "paged", "--reserve", "0"]
    kv_plan(*asked, "--gpu-memory", "99GB", "--json")
    peak = json.loads(capsys.readouterr().out)["plans"][0]["peak"]
    assert kv_plan(*asked, "--gpu-memory", f"{peak // 10**6 - 2}MB") == 1
    out, err = capsys.readouterr()
    assert re.search(r"no, 2\.\d\d MB missing", out) and re.search(r"paged lacks least, 2\.\d\d MB", err)


def test_a_row_may_not_see_more_than_the_context_of_the_model(capsys):
    """32768 tokens here. What a window sees is bounded, whatever the row's length."""
    both = ["--gpu-memory", "999GB", "--strategy", "paged", "--strategy", "window", "--json"]
    assert kv_plan("--context", "64k", *both) == 0
    paged, window = json.loads(capsys.readouterr().out)["plans"]
    assert (paged["fits"], paged["beyond"], paged["longest_context"], paged["missing"]) == (False, 32768, 32768, 0)
    assert (window["fits"], window["beyond"], window["longest_context"]) == (True, 0, None)
    assert kv_plan("--context", "64k", "--gpu-memory", "999GB", "--strategy", "paged") == 1
    shown = capsys.readouterr()
    assert "no, 32768 tokens beyond the model's context" in shown.out
    assert "nothing fits: 32768 tokens beyond the model's context (of 32768 tokens), whatever the card" in shown.err


@pytest.mark.parametrize(("bandwidth", "says_so"), [("900", False), ("4000", True)])
def test_a_card_that_reads_a_small_model_at_once_is_no_guide_to_its_times(bandwidth, says_so, capsys):
    """0.27 GB of weights, in 0.3 ms and in 0.07."""
    assert main(["plan", "--context", "1k", "--gpu-memory", "24GB", "--bandwidth", bandwidth]) == 0
    assert ("times: those of the card alone" in capsys.readouterr().out) == says_so


def test_a_longest_context_that_is_the_models_is_marked(capsys):
    """And not the card's memory, which ends it on a smaller card."""
    asked = ["--context", "1k", "--strategy", "paged", "--strategy", "window"]
    for memory, bound in [("999GB", "model"), ("24GB", "memory")]:
        assert kv_plan(*asked, "--gpu-memory", memory, "--json") == 0
        paged, window = json.loads(capsys.readouterr().out)["plans"]
        assert (paged["longest_context_bound"], window["longest_context_bound"]) == (bound, None)
        assert kv_plan(*asked, "--gpu-memory", memory) == 0
        out = capsys.readouterr().out
        assert f" {paged['longest_context']} " in out
        assert ("longest context of paged: the model's own" in out) == (bound == "model")


def test_the_end_of_a_prompt_is_no_decode_step(capsys):
    """2049 tokens are a chunk and one more; what a step of `mass` fetches nobody knows, that of a prompt one does."""
    mass = ["--strategy", "offload", "--option", "mass=0.9", "--json"]
    assert kv_plan("--context", "2050", "--new-tokens", "1", "--gpu-memory", "24GB", *mass) == 0
    (row,) = json.loads(capsys.readouterr().out)["plans"]
    assert row["step"] is None and row["ttft"] > 0


@pytest.mark.parametrize("content", [None, b"no gguf at all", b"GGUF\x03\x00\x00\x00" + bytes(16)])
def test_a_gguf_that_cannot_be_read(tmp_path, content, capsys):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    assert main(["plan", "--model", str(path), "--context", "4k", "--gpu-memory", "24GB"]) == 1
    assert str(path) in capsys.readouterr().err


def test_a_gguf_of_another_architecture(tmp_path, capsys):
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert main(["plan", "--model", str(path), "--context", "4k", "--gpu-memory", "24GB"]) == 1
    assert "mamba" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("llama.expert_count", 8, "is a mixture of experts"), ("split.count", 3, "is one of the 3 files of a model")],
)
def test_a_gguf_that_could_not_be_loaded_is_not_planned(field, value, said, tmp_path, capsys):
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32(field, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert main(["plan", "--model", str(path), "--context", "4k", "--gpu-memory", "24GB"]) == 1
    assert said in capsys.readouterr().err


def test_without_a_gpu_its_size_must_be_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kv_plan("--context", "4k") == 1
    assert "there is no GPU here to take the size of: say --gpu-memory" in capsys.readouterr().err
