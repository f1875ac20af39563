"""A figure of what is lost belongs to the setting, model and length that it was measured on, and is never lent."""

from __future__ import annotations

import pytest

from bench import lines, report
from bench.report import losses as made
from kv_strategies import losses
from kv_strategies.losses import PERPLEXITY, SOLVED, Loss, in_words, losses_of


def loss(strategy, length=1024, model="a", value=11.0, **options):
    return Loss(strategy, options, model, "float32", length, PERPLEXITY, value, 10.0, 500)


MEASURED = (
    loss("window", window=2048, sinks=0),
    loss("window", window=512),
    loss("window", 4096, window=512),
    loss("window", 4096, "b", window=512),
    loss("int8"),
    loss("offload", top_n=16),
    loss("window+int8", window=512),
)


@pytest.mark.parametrize(
    ("strategy", "options", "model", "context", "found"),
    [
        ("paged", {}, "a", 1024, None),
        ("offload", {"resident": "none"}, "a", 1024, None),
        ("window", {}, "a", 1024, []),  # 2048, and 4 sinks
        ("window", {"window": 2048, "sinks": 0}, "a", 1024, [0]),
        ("window", {"window": 512, "sinks": 4}, "a", 1500, [1]),
        ("window", {"window": 512}, "a", 3000, [2]),
        ("window", {"window": 512}, "b", 1024, [3]),  # the own model, though the other was nearer
        ("prefix+int8", {}, "a", 1024, [4]),  # what is lossless beside it changes nothing
        ("offload+int8", {}, "c", 10**6, [4]),
        ("offload+int8", {"top_n": 16}, "a", 1024, []),
        ("offload", {"mass": 0.9}, "a", 1024, []),
        ("offload", {"top_n": 16, "renormalise": True}, "a", 1024, []),
        ("int8+window", {"window": 512}, "a", 1024, [6]),
        ("fp8", {}, "a", 1024, []),
    ],
)
def test_a_figure_belongs_to_its_setting(strategy, options, model, context, found, monkeypatch):
    monkeypatch.setattr(losses, "measured", lambda: MEASURED)
    expected = found and [MEASURED[index] for index in found]
    assert losses_of(strategy, options, model, context) == expected


def test_words_say_where():
    solved = Loss("evict", {}, "b", "bfloat16", 512, SOLVED["hidden"], 0.5, 0.9, 20, 0.3, 0.7, tasks=["needle"])
    assert in_words(None) == "none" and in_words([]) == "not measured"
    assert in_words([loss("int8", value=10.2), solved]) == (
        "+2.00% perplexity, with a in float32 at 1024 tokens; 50% of tasks solved, question hidden (needle: 30% to "
        "70%; exact 90%), with b in bfloat16 at 512 tokens"
    )


def line(workload, time, rows, **params):
    about = {"workload": workload, "status": "ok", "model": "a", "dtype": "float32", "time": time, "params": params}
    asked = {"x": {"right": "11111"}, "y": {"right": "11110"}}
    return about | {"result": {"rows": rows} | ({"asked": asked} if workload == "quality" else {})}


def row(strategy="int8", judged=300, perplexity=11.0, **others):
    figures = {"perplexity": perplexity, "baseline_perplexity": 10.0, "num_judged": judged}
    return {"strategy": strategy, "options": {}} | figures | others


def test_what_the_results_give():
    """Enough samples, the most of them and then the newest; no errors, nothing lossless, nothing unknown."""
    sizes = {"prompt": 900, "judged": 100}
    found = made.losses(
        [
            line("cost", "3", [row(perplexity=13.0)], **sizes),
            line("cost", "2", [row(judged=400), row("paged"), row("gone"), {**row(), "error": "no fp8"}], **sizes),
            line("cost", "1", [row(judged=400, perplexity=12.0), row("fp8", judged=50)], **sizes),
            line("quality", "4", [row("k8v4", 15, right={"shown": {"x": "11100", "y": "11110"}})], length=512),
            line("quality", "5", [row("int4", 15, right={"shown": {}})], length=512),
        ]
    )
    told = [(one.strategy, one.length, one.measure, one.value, one.exact, one.samples) for one in found]
    assert told == [("int8", 1000, PERPLEXITY, 11.0, 10.0, 400), ("k8v4", 512, SOLVED["shown"], 0.7, 0.9, 10)]
    assert found[1].low < 0.7 < found[1].high and found[1].tasks == ["x", "y"] and "(2 kinds: " in str(found[1])


def test_the_package_holds_what_the_results_say(tmp_path):
    made.write(lines.read(report.RESULTS), tmp_path / "losses.jsonl")
    assert (tmp_path / "losses.jsonl").read_text() == losses.PATH.read_text(), "run `make report`"
    assert {loss.strategy for loss in losses.measured()} >= {"window", "offload", "int8", "fp8", "evict"}
