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
    assert "strategy paged: 8 blocks of 16 tokens" in out and "{" not in out


def test_generate_prints_json(capsys):
    assert main(["generate", "One, two,", "--max-new-tokens", "3", "--option", "num_blocks=8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stats"]["strategy"] == "paged" and found["stats"]["blocks_used"] == 0
    assert found["results"][0]["num_tokens"] == 3 and found["results"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "pagd"], "unknown strategy 'pagd'"),
        (["--option", "num_blocks"], "NAME=VALUE"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--option", "num_blocks=many"], "num_blocks takes a whole number"),
        (["--strategy", "window", "--option", "window=abc"], "window takes a whole number, got 'abc'"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, capsys):
    assert main(["generate", "hello", *arguments]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and last.startswith("kv-strategies: ")


def test_explain_shows_the_idea(capsys):
    assert main(["explain", "paged"]) == 0
    assert "copy on write" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "shown"), [("int8", "in the same memory"), ("prefix+window", "sinks"), ("int4", "four bits")]
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
