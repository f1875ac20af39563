"""The command line: what it prints, and its errors."""

from __future__ import annotations

import json

import pytest

from kv_strategies.cli import main


def test_generate_prints_text_and_what_the_strategy_held(capsys):
    prompts = ["The capital of France is", "One, two, three,"]
    status = main(["generate", *prompts, "--max-new-tokens", "6", "--option", "num_blocks=8", "--strategy", "paged"])
    out = capsys.readouterr().out
    assert status == 0 and "Paris" in out and "[6 tokens, length;" in out
    stats = json.loads(out.strip().splitlines()[-1])
    assert stats["strategy"] == "paged" and stats["num_blocks"] == 8 and stats["blocks_used"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "pagd"], "unknown strategy 'pagd'"),
        (["--option", "num_blocks"], "NAME=VALUE"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, capsys):
    assert main(["generate", "hello", *arguments]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and last.startswith("kv-strategies: ")


def test_explain_shows_the_idea(capsys):
    assert main(["explain", "paged"]) == 0
    assert "copy on write" in capsys.readouterr().out
