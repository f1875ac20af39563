"""The suite `quality`: rows of real runs become a table and a frontier."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from test_bench import line, rows_of, spread
from test_convert import write_gguf
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.case import Bench, Case
from bench.report import frontier
from bench.report import page as pages
from bench.suites import quality
from bench.tasks import TASKS
from bench.tasks.story import Question
from bench.workload import in_words, suite
from kv_strategies.models.load import DEFAULT_MODEL


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A random Qwen2 with the words of the default model, as one gguf file."""
    read = json.loads((DEFAULT_MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = [*sorted(read["vocab"], key=read["vocab"].get), "<|end|>"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in read["merges"]]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.3,
        eos_token_id=len(tokens) - 1, bos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("reader") / "reader.gguf"
    write_gguf(path, Qwen2ForCausalLM(config), tokens=tokens, merges=merges)
    return str(path)


SMALL = {
    "tried": 2, "samples": 3, "rows": 2, "tasks": ["needle, single", "key-value, two turns", "common words"],
    "texts": 1, "judged": 4, "batch": 2, "new_tokens": 8, "length": 320,
    "settings": [
        quality.setting("baseline"),
        quality.setting("prefix", forms=("shown", "hidden")),
        quality.setting("int8"),
        quality.setting("window 64", "window", window=64),
        quality.setting("no such", "window+int8", window=1),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(model_file, tmp_path_factory):
    """A real run in which what the model says counts as right, but for what is said most often."""
    case = Case("quality", "320 tokens, some", model_file, "float32", "cpu", SMALL)
    bench, said = Bench(case, tmp_path_factory.mktemp("scratch"), say=lambda text: said.append(text)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Question, "is_right", lambda self, said: "often" not in self.ask)
        result = quality.run_quality(bench)
    num_said = len(said)
    assert quality._asked(bench) == result["asked"] and len(said) == num_said  # read, not found again
    return line("quality", "320 tokens, some", result, suite="quality", params=SMALL)


def test_a_run(measured):
    asked, rows = (measured["result"][name] for name in ("asked", "rows"))
    assert asked["needle, single"] == {"level": {"keys": 1, "digits": 7}, "right": "111", "counts": True}
    assert asked["key-value, two turns"]["level"] == TASKS["key-value, two turns"].levels[0]
    baseline, prefix, int8, window, refused = rows
    assert set(prefix["right"]) == {"shown", "hidden"} and prefix["right"]["shown"] == baseline["right"]["shown"]
    assert prefix["mean_kl"] < 1e-6 < int8["mean_kl"] < window["mean_kl"]
    assert prefix["shared"] > 0.2 and int8["shared"] == 0
    per_block = 2 * 2 * 2 * 16 * 8 * 4  # K and V of two layers, two heads, eight float32 numbers a token
    assert baseline["kv_bytes"] == 320 * per_block / 16
    assert prefix["kv_bytes"] == 21 * per_block and window["kv_bytes"] <= 6 * per_block
    assert int8["kv_bytes"] == 21 * per_block / 3.2
    assert "as many as the sinks" in refused["error"]
    assert "int8: 100% (61% to 100%)" in in_words(measured)


def test_the_table(measured):
    page = pages.render([measured], "title")
    assert rows_of(page, "common words")[0][1:] == ["-", "-", "left out: the baseline does not reach 80 % at any level"]
    assert rows_of(page, "needle, single")[0][1:] == ["keys 1, digits 7", "100% (44% to 100%)", "counts"]
    assert rows_of(page, "prefix, question hidden")[0][1:4] == ["100% (61% to 100%)"] + ["100% (44% to 100%)"] * 2
    assert "as many as the sinks" in rows_of(page, "no such")[0][1]


@pytest.mark.parametrize("other", [{"level": {"keys": 2, "digits": 7}}, {"counts": False}])
def test_shares_of_other_tasks_are_not_set_beside_these(measured, other):
    """Those of an earlier run stand again when what they were asked is what the latest was asked."""
    asked = measured["result"]["asked"]
    before = {**asked, "needle, single": asked["needle, single"] | other}
    older = measured | {"system": "320 tokens, older", "time": "2001-01-01T00:00:00+00:00"}
    for tasks, num in ((before, 1), (asked, 2)):
        lines = [older | {"result": measured["result"] | {"asked": tasks}}, measured]
        assert len(frontier.rows(lines)) == num * len(frontier.rows([measured]))
        page = pages.render(lines, "title")
        assert len(rows_of(page, "int8")) == num and ("320 tokens, older." in page) == (num == 1)
    marks = {**asked, "needle, single": asked["needle, single"] | {"right": "110"}}  # the same tasks, a tie broken
    assert len(quality.of_the_latest_tasks([older | {"result": measured["result"] | {"asked": marks}}, measured])) == 2


def test_the_frontier(measured, tmp_path):
    """A point a row and form; dominated where another is no worse in both ways."""
    points = {row["setting"]: row for row in frontier.rows([measured])}
    assert list(points) == ["baseline", "prefix", "prefix, question hidden", "int8", "window 64"]
    smallest = min(points.values(), key=lambda row: row["kv_bytes"])
    assert smallest["setting"] == "int8" or smallest["setting"] == "window 64"
    for row in points.values():  # all have all right here: only the smallest is not dominated
        assert ("kv_bytes" in row["dominated"].split()) == (row["kv_bytes"] > smallest["kv_bytes"])
        assert row["itl_ms"] * row["tokens_per_s"] == pytest.approx(1000 * SMALL["batch"])
    steps = [{"batch": b, "context": 64, "step": spread(s)} for b, s in ((1, 2.0), (8, 2.5), (16, 8.0))]
    batch = line("batch", "paged", {"points": [*steps, {"batch": 32, "context": 64, "error": "out of memory"}]})
    path = frontier.write([measured, batch], tmp_path)
    read = list(csv.DictReader(path.open()))
    assert list(read[0]) == frontier.COLUMNS and len(read) == len(points) + 3
    assert [row["dominated"] for row in read[-3:]] == ["", "", "itl_ms"]
    assert frontier.write([], tmp_path / "none") is None


def test_cases():
    """On a GPU every task at every length, a case a kind; no window wider than the text; nothing for random weights."""
    cases = suite("quality", "cuda")[1:]
    assert {case.params["length"] for case in cases} == {1024, 2048, 4096} and cases[0].params["tasks"] == list(TASKS)
    for case in cases:
        assert all(row["options"].get("window", 0) < case.params["length"] for row in case.params["settings"])
    assert [c.params for c in suite("quality", "cpu", full=True)[1:]] == [c.params for c in cases]
    assert not suite("quality", "cuda", "llama-2-7b-random")[1:]


def test_a_model_without_words_is_refused(tmp_path):
    case = Case("quality", "x", "llama-2-7b-random", "float32", "cpu", SMALL)
    bench = Bench(case, tmp_path)
    bench.loaded = (None, None)
    with pytest.raises(ValueError, match=re.escape("this model has no tokenizer")):
        quality.run_quality(bench)
