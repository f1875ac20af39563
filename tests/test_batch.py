"""A file of prompts: what is answered, what is refused, and what an interruption leaves."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kv_strategies import Request, Runner, build
from kv_strategies.batch import Answering, Batch, Line
from kv_strategies.cli import main
from kv_strategies.models import load_model

MODEL, TOKENIZER = load_model(dtype=torch.float32, device="cpu")
GOOD = [
    {"prompt": "The capital of France is", "max_new_tokens": 4, "id": "a\ud800"},
    {"messages": [{"role": "user", "content": "Hi"}], "max_new_tokens": 3, "temperature": 0.8, "n": 2},
    {"token_ids": [504, 260, 2], "logprobs": 1, "stop": ["."]},
    {"prompt": "naïve 日本", "max_new_tokens": 2, "temperature": 1.0},
]
BAD = [
    (b"{", "not valid JSON"),
    (b'"text"', "a line is a JSON object, got str"),
    (b"{}", "needs one of prompt, messages, token_ids, got none"),
    (b'{"prompt": "a", "token_ids": [1]}', "got prompt and token_ids"),
    (b'{"prompt": 7}', "prompt must be text, got int"),
    (b'{"messages": 7}', "messages that the chat template cannot take"),
    (b'{"prompt": "a", "max_tokens": 3}', "unknown field 'max_tokens'; known are deadline"),
    (b'{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens must be at least 1"),
    (b'{"token_ids": [99999999]}', "outside the vocabulary"),
    (b'{"prompt": "a", "max_new_tokens": 9999}', "exceed"),
    (b'{"prompt": "\xff"}', "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (rb'{"prompt": "\ud800"}', "surrogates not allowed"),
    (b'{"prompt": "a", "id": NaN}', "JSON has no NaN or Infinity"),
    (b'{"prompt": "a", "id": [1e999]}', "JSON has no NaN or Infinity"),
]


def new_runner() -> Runner:
    return Runner(MODEL, build("prefix", MODEL, num_blocks=32), max_num_seqs=2, tokenizer=TOKENIZER)


def run(prompts, out, *, resume=False, max_new_tokens=64, **options):
    answering = Answering(new_runner(), TOKENIZER, max_new_tokens=max_new_tokens)
    return Batch(prompts, out, resume=resume).run(answering, **options)


def answers(path) -> dict[int, dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({row["line"] for row in rows}) == len(rows), "a line was answered twice"
    return {row["line"]: row for row in rows}


def lines_of(prompts) -> list[Line]:
    return list(Batch(prompts, prompts.with_name("none")).lines)


def tokens(row: dict) -> list:
    return row["error"] if "error" in row else [sample["token_ids"] for sample in row["samples"]]


@pytest.fixture
def prompts(tmp_path):
    """Good lines, with bad ones and empty ones between them."""
    path, lines = tmp_path / "prompts.jsonl", []
    for index, good in enumerate(GOOD):
        lines += [json.dumps(good).encode(), b"", *(text for text, _ in BAD[index * 4 : index * 4 + 4])]
    path.write_bytes(b"\n".join(lines))  # no newline at the end
    return path


def test_good_lines_are_answered_and_bad_ones_reported(prompts, tmp_path):
    told = []
    summary = run(prompts, tmp_path / "out", max_new_tokens=5, report=told.append)
    assert (summary.num_answered, summary.num_failed, summary.num_resumed) == (len(GOOD), len(BAD), 0)
    found, lines = answers(tmp_path / "out"), prompts.read_bytes().split(b"\n")
    for number, text in enumerate(lines, start=1):
        if (reason := dict(BAD).get(text)) is not None:
            assert reason in found[number]["error"]
            assert any(message.startswith(f"line {number}: ") and reason in message for message in told)
        elif text:
            asked = json.loads(text)
            ids = asked.get("token_ids") or TOKENIZER(asked.get("prompt", "")).input_ids
            if "messages" in asked:
                ids = TOKENIZER.apply_chat_template(asked["messages"], add_generation_prompt=True, return_dict=False)
            options = {name: value for name, value in asked.items() if name in ("temperature", "n", "logprobs", "stop")}
            request = Request(ids, asked.get("max_new_tokens", 5), seed=number, **options)
            expected = new_runner().generate([request])
            assert [s["token_ids"] for s in found[number]["samples"]] == [r.token_ids for r in expected]
            assert [s["finish_reason"] for s in found[number]["samples"]] == [r.finish_reason for r in expected]
            assert found[number]["id"] == asked.get("id")
            assert ("logprobs" in found[number]["samples"][0]) == ("logprobs" in asked)
    assert " Paris" in found[1]["samples"][0]["text"]


@pytest.mark.parametrize("kept", [0, 1, 200, 900, 2000])
def test_an_interrupted_run_goes_on_exactly(prompts, tmp_path, kept):
    """Killed after any byte: the answers are those of a run that was not."""
    run(prompts, tmp_path / "whole")
    out = tmp_path / "out"
    text = (tmp_path / "whole").read_bytes()
    out.write_bytes(text[:kept])
    summary = run(prompts, out, resume=True)
    assert summary.num_resumed == text[:kept].count(b"\n")
    found, expected = answers(out), answers(tmp_path / "whole")
    for row in [*found.values(), *expected.values()]:
        for sample in row.get("samples", ()):
            del sample["num_cached_tokens"]  # a new cache has to be filled again
            sample.pop("logprobs", None)  # the last bits are those of other batches
    assert found == expected
    assert run(prompts, out, resume=True) == (0, len(BAD), len(GOOD) + len(BAD))


def test_files_that_are_refused(prompts, tmp_path):
    out = tmp_path / "out"
    run(prompts, out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"exists already: go on with it \(--resume\)"):
        run(prompts, out)
    prompts.write_bytes(prompts.read_bytes().replace(b"France", b"Spain"))
    with pytest.raises(ValueError, match="answers another line 1 than"):
        run(prompts, out, resume=True)
    assert out.read_bytes() == before
    for text in ("something else\n", "something else", '{"line": 1}\n'):
        out.write_text(text)
        with pytest.raises(ValueError, match="line 1, is no answer of a batch"):
            run(prompts, out, resume=True)
        assert out.read_text() == text
    with pytest.raises(ValueError, match="no folder"):
        run(prompts, tmp_path / "none" / "out")
    for odd in (tmp_path, Path("/dev/full")):  # which can be read for ever
        with pytest.raises(ValueError, match="is no file"):
            run(prompts, odd, resume=True)
    with pytest.raises(IsADirectoryError):
        run(tmp_path, tmp_path / "new")
    baseline = Runner(MODEL, build("baseline", MODEL))
    with pytest.raises(ValueError, match="baseline answers one request after the other"):
        Answering(baseline, TOKENIZER)


def test_an_answer_that_failed_is_an_error_of_its_line(prompts, tmp_path):
    told = []
    weight = MODEL.model.norm.weight.data
    before = weight.clone()
    weight.fill_(torch.nan)
    try:
        assert run(prompts, tmp_path / "out", report=told.append) == (0, len(GOOD) + len(BAD), 0)
        assert run(prompts, tmp_path / "out", resume=True) == (0, len(GOOD) + len(BAD), len(GOOD) + len(BAD))
    finally:
        weight.copy_(before)
    assert "the logits were not numbers" in answers(tmp_path / "out")[1]["error"] and len(told) == len(GOOD) + len(BAD)


def test_two_runs_do_not_write_one_file(prompts, tmp_path):
    out, refused = tmp_path / "out", []

    def again(message: str) -> None:
        with pytest.raises(ValueError, match=r"another run is writing .*out: wait for its end"):
            run(prompts, out, resume=True)
        refused.append(message)

    run(prompts, out, report=again)
    assert len(refused) == len(BAD)
    assert [line.number for line in lines_of(prompts)] == sorted(json.loads(row)["line"] for row in out.open())


def test_an_empty_file_has_no_answers(tmp_path):
    (tmp_path / "prompts").write_text("\n\n")
    assert run(tmp_path / "prompts", tmp_path / "out") == (0, 0, 0)
    assert (tmp_path / "out").read_bytes() == b""


def full_disk(message: str) -> None:
    """No file may grow from here on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, LIMIT[1]))


def interrupt(message: str) -> None:
    raise KeyboardInterrupt


LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)


@pytest.mark.parametrize(("fault", "error"), [(full_disk, OSError), (interrupt, KeyboardInterrupt)])
def test_what_was_answered_before_a_fault_stays(prompts, tmp_path, fault, error):
    out = tmp_path / "out"
    try:
        with pytest.raises(error) as raised:
            run(prompts, out, report=fault)
        assert error is KeyboardInterrupt or raised.value.filename == str(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, LIMIT)
    assert 0 < len(out.read_bytes()) <= 300
    num_resumed = out.read_bytes().count(b"\n")
    assert 0 < run(prompts, out, resume=True).num_resumed == num_resumed
    assert set(answers(out)) == {line.number for line in lines_of(prompts)}


def test_nothing_answered_leaves_no_file(prompts, tmp_path):
    def broken(lines):
        raise RuntimeError("no model")
        yield

    with pytest.raises(RuntimeError, match="no model"):
        Batch(prompts, tmp_path / "out").run(broken)
    with pytest.raises(RuntimeError, match=f"{len(GOOD) + len(BAD)} lines were left without an answer"):
        Batch(prompts, tmp_path / "out").run(lambda lines: (row for row in ()))


def test_rows_that_come_twice_are_written_once(prompts, tmp_path):
    answering = Answering(new_runner(), TOKENIZER)
    summary = Batch(prompts, tmp_path / "out").run(lambda lines: (row for row in answering(lines) for _ in range(2)))
    assert summary == (len(GOOD), len(BAD), 0) and len(answers(tmp_path / "out")) == len(GOOD) + len(BAD)


def test_threads_share_a_runner(prompts):
    """Each gets the rows of its own lines, those that one computed alone would get."""
    lines, answering = lines_of(prompts), Answering(new_runner(), TOKENIZER, max_new_tokens=12)
    alone = {row["line"]: row for row in answering(lines)}
    next(answering(lines))  # what is left is cancelled
    assert not answering.runner.num_running and not answering.runner.num_waiting
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda i: list(answering(lines[i::3])), range(3)))
    for i, rows in enumerate(parts):
        assert {row["line"] for row in rows} == {line.number for line in lines[i::3]}
        for row in rows:
            assert tokens(row) == tokens(alone[row["line"]])


def test_from_a_shell(tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "The capital of France is"}\n{"prompt"\n')
    options = ["batch", str(prompts), str(out), "--max-new-tokens", "3", "--option", "num_blocks=8"]
    assert main(options) == 1, "a line could not be answered"
    told = capsys.readouterr()
    assert "line 2: not valid JSON" in told.err and "1 answered, 1 failed" in told.out
    assert main(options) == 1 and "exists already" in capsys.readouterr().err
    assert main([*options, "--resume"]) == 1 and "0 answered, 1 failed, 2 were there" in capsys.readouterr().out
    assert main([*options, "--resume", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"num_answered": 0, "num_failed": 1, "num_resumed": 2}
    prompts.write_text('{"prompt": "The capital of France is"}\n')
    out.write_bytes(out.read_bytes().splitlines(keepends=True)[-1])
    assert main([*options, "--resume", "--json"]) == 0
    assert main(["batch", str(tmp_path / "none"), str(tmp_path / "new")]) == 1
    assert not (tmp_path / "new").exists()


def test_a_cluster_takes_the_extra_and_nothing_else_imports_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts").write_text('{"prompt": "a"}')
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "kv_strategies.cluster", raising=False)
    assert main(["batch", str(tmp_path / "prompts"), str(tmp_path / "out"), "--address", "auto"]) == 1
    assert "pip install 'kv-strategies[cluster]'" in capsys.readouterr().err
    assert main(["batch", str(tmp_path / "prompts"), str(tmp_path / "out"), "--gpus", "0"]) == 1
    assert "say which with --address" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    check = "import sys, kv_strategies.cli, kv_strategies.batch; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
