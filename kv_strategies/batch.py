"""A file of prompts, answered line by line: `kv-strategies batch prompts.jsonl out.jsonl`.

    {"prompt": "The capital of France is", "max_new_tokens": 8, "id": "a"}
    {"line": 1, "of": "2cf24dba5fb0", "id": "a", "samples": [{"text": " Paris ..", "finish_reason": "length", ..}]}

In place of "prompt" stands "messages", a chat, or "token_ids"; beside it any field of a `Request`.

A line that cannot be answered gives {"line": 2, "of": .., "error": ".."}, and the rest go on. Answers come as they are
done, whole lines only, each with the number and a hash of what it answers: an interrupted run goes on where it was, and
a file that answers other prompts is noticed. A request without a seed has the number of its line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .runner import Runner
from .step.requests import Request, Result

_PROMPTS = ("prompt", "messages", "token_ids")
#: What a line may say: all of a request that JSON can.
_OPTIONS = {field.name for field in fields(Request) if field.init} - {"token_ids", "request_id", "logits_processor"}


class Line(NamedTuple):
    number: int  # from 1
    digest: str
    text: bytes


class Summary(NamedTuple):
    num_answered: int
    num_failed: int
    num_resumed: int  # lines that were there already, failed ones included


def run_batch(
    prompts: Path,
    out: Path,
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 64,
    resume: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> Summary:
    """Answer every line of `prompts` in `out`.

    Args:
        max_new_tokens: of lines that do not say.
        resume: go on with an `out` that is there; without it such a file is refused.
        report: told of every line that cannot be answered.

    Raises:
        ValueError: `out` exists, or answers other prompts than these.
    """
    done = _answered(prompts, out, resume)
    waiting = (line for line in _lines(prompts) if line.number not in done)
    running: dict[int, tuple[Line, dict, list[Result]]] = {}
    num_answered = num_failed = 0
    with out.open("ab") as file:

        def write(line: Line, answer: dict[str, object]) -> None:
            row = {"line": line.number, "of": line.digest} | answer
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()

        while True:
            # Enough to keep all seats taken, and never the whole file.
            for line in islice(waiting, 2 * runner.max_num_seqs - len(running)):
                try:
                    asked, request = _request(line, tokenizer, max_new_tokens)
                    runner.submit([request])
                    running[line.number] = line, asked, []
                except ValueError as error:
                    num_failed += 1
                    report(f"line {line.number}: {error}")
                    write(line, {"error": str(error)})
            if not running:
                os.fsync(file.fileno())
                return Summary(num_answered, num_failed, len(done))
            for event in runner.step():
                if event.result is None:
                    continue
                line, asked, results = running[event.request_id]
                results.append(event.result)
                if len(results) == int(asked.get("n", 1)):
                    del running[line.number]
                    num_answered += 1
                    results.sort(key=lambda result: result.sample_index)
                    write(line, {"id": asked.get("id"), "samples": [_sample(r, tokenizer) for r in results]})


def _lines(path: Path) -> Iterator[Line]:
    """Those that are not empty."""
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text := text.strip():
                yield Line(number, hashlib.sha256(text).hexdigest()[:12], text)


def _request(line: Line, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> tuple[dict, Request]:
    try:
        asked = json.loads(line.text)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(asked, dict):
        raise ValueError(f"a line is a JSON object, got {type(asked).__name__}")
    unknown = sorted(asked.keys() - _OPTIONS - {*_PROMPTS, "id"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(_OPTIONS))}")
    given = [name for name in _PROMPTS if name in asked]
    if len(given) != 1:
        raise ValueError(f"needs one of {', '.join(_PROMPTS)}, got {' and '.join(given) or 'none'}")
    (kind,) = given
    if kind == "token_ids":
        ids = asked[kind]
    elif kind == "prompt" and isinstance(asked[kind], str):
        ids = tokenizer(asked[kind]).input_ids
    elif kind == "messages":
        try:
            ids = tokenizer.apply_chat_template(asked[kind], add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template raises whatever it meets in messages of another form
            raise ValueError(f"messages that the chat template cannot take: {error}") from None
    else:
        raise ValueError(f"{kind} must be text, got {type(asked[kind]).__name__}")
    options = {"max_new_tokens": max_new_tokens, "seed": line.number}
    options |= {name: value for name, value in asked.items() if name in _OPTIONS}
    return asked, Request(ids, request_id=line.number, **options)


def _sample(result: Result, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
    found = {name: value for name, value in asdict(result).items() if value is not None}
    for name in ("request_id", "sample_index", "timings"):
        del found[name]
    return {"text": text} | found


def _answered(prompts: Path, out: Path, resume: bool) -> set[int]:
    """The lines of `prompts` that `out` answers. What a killed run has left behind the last whole line is cut off.

    Raises:
        ValueError: see `run_batch`.
    """
    if not out.exists():
        return set()
    if not resume:
        raise ValueError(f"{out} exists already: go on with it (--resume), or give another name")
    with out.open("r+b") as file:
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        file.truncate(len(whole))
    found = {}
    for number, row in enumerate(whole.splitlines(), start=1):
        try:
            answer = json.loads(row)
            found[answer["line"]] = answer["of"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{out}, line {number}, is no answer of a batch: give another name") from None
    asked = {line.number: line.digest for line in _lines(prompts)}
    for number, digest in found.items():
        if asked.get(number) != digest:
            raise ValueError(f"{out} answers another line {number} than {prompts} has: it cannot be gone on with")
    return set(found)
