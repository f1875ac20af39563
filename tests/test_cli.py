"""The command line: what it prints, and its errors."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import common  # noqa: F401  registers strategies from outside
import pytest
import torch

from bench.__main__ import main as bench
from kv_strategies.cli import main

ROOT = Path(__file__).resolve().parents[1]


def test_generate_prints_text_and_what_the_strategy_held(capsys):
    prompts = ["The capital of France is", "One, two, three,"]
    status = main(["generate", *prompts, "--max-new-tokens", "6", "--option", "num_blocks=8", "--strategy", "paged"])
    out = capsys.readouterr().out
    assert status == 0 and "Paris" in out and "[6 tokens, length;" in out
    assert "strategy paged: 8 blocks of 16 tokens" in out and "{" not in out


def test_generate_prints_json(capsys):
    assert main(["generate", "One, two,", "--max-new-tokens", "3", "--option", "num_blocks=8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stats"]["strategy"] == "paged" and found["stats"]["blocks_used"] == 0
    assert found["results"][0]["num_tokens"] == 3 and found["results"][0]["finish_reason"] == "length"


def test_an_answer_that_failed_is_no_success(capsys, monkeypatch):
    from kv_strategies import models

    model, tokenizer = models.load_model()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    monkeypatch.setattr(models, "load_model", lambda spec: (model, tokenizer))
    assert main(["generate", "One,", "Two,", "--option", "num_blocks=8", "--json"]) == 1
    told = capsys.readouterr()
    assert [row["finish_reason"] for row in json.loads(told.out)["results"]] == ["error", "error"]
    assert "2 of 2 answers ended with an error: the logits were not numbers" in told.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "pagd"], "unknown strategy 'pagd'"),
        (["--option", "num_blocks"], "NAME=VALUE"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--option", "num_blocks=many"], "num_blocks takes a whole number"),
        (["--strategy", "window", "--option", "window=abc"], "window takes a whole number, got 'abc'"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, capsys):
    assert main(["generate", "hello", *arguments]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and last.startswith("kv-strategies: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hello", "--strategy", "nope"], "unknown strategy 'nope'"),
        (["generate", "hello", "--option", "x"], "--option takes NAME=VALUE, got 'x'"),
        (["generate", "hello", "--strategy", "window", "--option", "window=0"], "window"),
        (["generate", "hello", "--option", "block_size=0"], "block_size must be at least 1, got 0"),
        (["batch", __file__, "none", "--strategy", "nope"], "unknown strategy 'nope'"),
        (["explain-diff", "nope", "int8", "hello"], "unknown strategy 'nope'"),
        (["explain-diff", "paged", "paged", "hello", "--option", "window=4"], "unknown option window: 'paged' takes"),
    ],
)
def test_what_no_model_can_do_is_said_before_one_is_loaded(arguments, message, capsys):
    assert main([*arguments, "--model", "no/such/folder"]) == 1
    told = capsys.readouterr().err
    assert message in told and "no/such" not in told and told.count("\n") == 1


@pytest.mark.parametrize("command", [["generate", "a"], ["batch", "a", "b"], ["explain-diff", "paged", "int8", "a"]])
def test_no_new_tokens_cannot_be_asked_for(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--max-new-tokens", "0"])
    assert ended.value.code == 2 and "'0' is no whole number above 0" in capsys.readouterr().err


def test_explain_shows_the_idea(capsys):
    assert main(["explain", "paged"]) == 0
    assert "copy on write" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "shown"), [("int8", "in the same memory"), ("prefix+window", "sinks"), ("raw4", "four bits")]
)
def test_explain_takes_the_names_of_strategies(name, shown, capsys):
    assert main(["explain", name]) == 0
    assert shown in capsys.readouterr().out


def test_explain_names_what_there_is(capsys):
    assert main(["explain", "int9"]) == 1
    assert "known are baseline, contiguous, paged" in capsys.readouterr().err


def test_explain_diff_says_where_two_part_and_why(capsys):
    text = "The quick brown fox jumps over the lazy dog. The quick brown fox jumps"
    small = ["--max-new-tokens", "24", "--option", "num_blocks=16"]
    assert main(["explain-diff", "paged", "baseline", text, *small]) == 0
    assert "paged and baseline give the same 24 tokens" in capsys.readouterr().out
    assert main(["explain-diff", "window", "paged", text, *small, "--option", "window=16", "--option", "sinks=0"]) == 0
    out = capsys.readouterr().out
    assert "they part at new token" in out and "rounding does NOT account for it" in out


def test_a_tie_of_bfloat16_is_rounding():
    """Two candidates that float32 tells apart by less than bfloat16 moves a logit."""
    from kv_strategies.compare import Difference

    assert Difference(0, 3, (1, 2), 0.0, 0.004, 0.01).is_rounding
    assert not Difference(0, 3, (1, 2), 0.5, 0.4, 0.01).is_rounding


# --- whatever the shell is like


def kv_strategies(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kv_strategies.cli", *arguments]
    return subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True)


PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [PLAIN, {"PYTHONIOENCODING": "ascii"}])
def test_an_answer_is_printed_where_letters_are_missing(environment):
    done = kv_strategies("generate", "naïve café →", "--max-new-tokens", "4", **environment)
    assert done.returncode == 0, done.stderr
    assert rb"--- na\xefve caf\xe9 \u2192" in done.stdout


def test_a_prompt_that_is_no_text_is_refused_before_anything_is_loaded():
    for locale in ({}, PLAIN):
        done = kv_strategies("generate", b"caf\xe9", "--model", "no/such/folder", **locale)
        assert done.returncode == 1 and b"is not UTF-8: unexpected end of data at byte 3" in done.stderr
        assert b"Traceback" not in done.stderr and b"folder" not in done.stderr


SAYS = "print('word'); "
FAILS = "print('word'); raise ValueError('two\\nlines'); "
HELP = "argparse.ArgumentParser().parse_args(['--help'])"


def in_bash(work: str, redirected: str, unbuffered: str = "") -> tuple[int, str]:
    """Exit status and what stands on standard error."""
    program = f"import argparse, sys\nfrom kv_strategies.shell import ended\ndef work():\n {work}return 0\n"
    command = shlex.join([sys.executable, "-c", program + "sys.exit(ended('me', work))"])
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    line = f"set -o pipefail; {command} {redirected}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_takes(unbuffered):
    full = "me: standard output cannot be written: No space left on device\n"
    assert in_bash(SAYS, "> /dev/full", unbuffered) == (1, full)
    assert in_bash(SAYS, "| true", unbuffered)[1] == "", "who reads no further knows"
    assert in_bash(f"import time; time.sleep(0.5); {SAYS}", "| true", unbuffered) == (1, "")
    assert in_bash(SAYS, ">&-", unbuffered) == (0, "")
    assert in_bash(SAYS, "> /dev/null 2>&-", unbuffered) == (0, "")
    assert in_bash(FAILS, "> /dev/full 2>&1", unbuffered)[0] == 1


def test_what_ends_a_command():
    assert in_bash(FAILS, "") == (1, "me: two lines\n")
    assert in_bash(FAILS, "> /dev/full") == (1, "me: two lines\n")
    assert in_bash("raise KeyboardInterrupt; ", "") == (130, "")
    swallowed = "import signal, contextlib\n with contextlib.suppress(BaseException): signal.raise_signal(2)\n 1 / 0; "
    assert in_bash(swallowed, "") == (130, "")
    assert in_bash("1 / 0; ", "")[1].startswith("Traceback"), "a fault of ours"
    assert in_bash(f"{HELP}; ", "") == (0, "")
    assert in_bash(f"{HELP}; ", "> /dev/full")[0] == 1
    assert in_bash("raise OSError(28, 'full', 'a file'); ", "") == (1, "me: [Errno 28] full: 'a file'\n")
    assert in_bash("raise OSError(28, 'full'); ", "") == (1, "me: [Errno 28] full\n")


@pytest.mark.parametrize("command", ["kv_strategies.cli explain paged", "bench workloads"])
def test_commands_end_like_that(command):
    line = f"{sys.executable} -m {command} > /dev/full"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "standard output cannot be written" in done.stderr


@pytest.mark.parametrize(("command", "module"), [(main, "kv_strategies.plan_command"), (bench, "bench.command")])
def test_ctrl_c_while_it_imports(command, module, monkeypatch, capsys):
    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == module:
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr(sys.modules[module.rpartition(".")[0]], module.rpartition(".")[2], raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert command(["plan"]) == 130 and capsys.readouterr().err == ""


def test_nothing_slow_is_imported_before_ctrl_c_is_heard():
    check = "import sys, kv_strategies.cli, bench.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(shell, capsys):
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("generate", "plan", "explain-diff", "gpu-memory"))


def test_completion_says_what_it_takes(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install 'kv-strategies[completion]'" in capsys.readouterr().err


def test_explain_as_json(capsys):
    assert main(["explain", "prefix+window", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: part["answers"] for name, part in found.items()} == {"prefix": "sharing", "window": "retention"}
    assert "sinks" in found["window"]["example"]
