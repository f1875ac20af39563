"""A file of prompts, answered line by line: `kv-strategies batch prompts.jsonl out.jsonl`.

    {"prompt": "The capital of France is", "max_new_tokens": 8, "id": "a"}
    {"line": 1, "of": "2cf24dba5fb0", "id": "a", "samples": [{"text": " Paris ..", "finish_reason": "length", ..}]}

In place of "prompt" stands "messages", a chat, or "token_ids"; beside it any field of a `Request`.

A line that cannot be answered gives {"line": 2, "of": .., "error": ".."}, and the rest go on. Answers come as they are
done, whole lines only, each with the number and a hash of what it answers: an interrupted run goes on where it was, and
a file that answers other prompts is noticed. A request without a seed has the number of its line.

    Batch(prompts, out)     the files: which lines wait, and the answers as they come
    Answering(runner, ..)   lines to answers, here; `cluster.py` has many machines of them
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from io import RawIOBase
from itertools import count as counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .baseline import Baseline
from .runner import Runner
from .step.requests import FAILED, Request, Result

#: In one of these a line says what it asks.
PROMPTS = ("prompt", "messages", "token_ids")
#: What a line may say: all of a request that JSON can.
_OPTIONS = {field.name for field in fields(Request) if field.init} - {"token_ids", "request_id", "logits_processor"}
_ANSWER = b'{"line": '  # how a line of answers begins


class Line(NamedTuple):
    number: int  # from 1
    digest: str
    text: bytes


class Summary(NamedTuple):
    num_answered: int
    num_failed: int  # lines that cannot be answered, those of an earlier run included
    num_resumed: int  # lines that were there already, failed ones included


@dataclass(frozen=True)
class Lines:
    """The lines of a file that wait for an answer, read anew each time: the file may be larger than memory."""

    path: Path
    answered: frozenset[int]  # their numbers
    num_waiting: int

    def __iter__(self) -> Iterator[Line]:
        return self.part()

    def part(self, offset: int = 0, number: int = 1, count: int | None = None) -> Iterator[Line]:
        """Those among `count` lines of the file from byte `offset` on, where line `number` begins."""
        lines = _read_lines(self.path, offset, number, count)
        return (line for line in lines if line.number not in self.answered)

    def __len__(self) -> int:
        return self.num_waiting


class Batch:
    """A file of prompts and the file of its answers. What is wrong with them is said here, before a model is loaded.

    Args:
        resume: go on with an `out` that is there; without it such a file is refused. What a killed run has left behind
            the last whole line is cut off when this one begins to write.

    Raises:
        ValueError: `out` exists, is no file of answers, or answers other prompts than these.
        OSError: a file that cannot be read.
    """

    def __init__(self, prompts: Path, out: Path, *, resume: bool = False):
        if out.exists() and not resume:
            raise ValueError(f"{out} exists already: go on with it (--resume), or give another name")
        if out.exists() and not out.is_file():
            raise ValueError(f"{out} is no file: answers go to one, which a run that goes on reads again")
        if not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent} to write to")
        self.out = out
        self._is_new = not out.exists()
        found, self._num_failed, self._num_bytes = ({}, 0, 0) if self._is_new else _read_answers(out)
        answered, num_waiting = frozenset(found), 0
        for line in _read_lines(prompts):
            if line.number not in found:
                num_waiting += 1
            elif found.pop(line.number) != line.digest:
                found = {line.number: line.digest}
                break
        if found:
            raise ValueError(f"{out} answers another line {min(found)} than {prompts} has: it cannot be gone on with")
        self.lines = Lines(prompts.absolute(), answered, num_waiting)

    def run(
        self,
        answer: Callable[[Lines], Generator[dict, None, None]],
        *,
        report: Callable[[str], None] = lambda message: None,
        progress: bool = False,
    ) -> Summary:
        """Write the answers as they come, each line once. However it ends, what was written can be gone on with.

        Args:
            answer: makes rows of lines, in any order: an `Answering`, or a `Cluster`.
            report: told of every line that cannot be answered.
            progress: show it, and the time left, where standard error is a terminal.

        Raises:
            ValueError: another run is writing the same file.
            OSError: an answer could not be written.
            RuntimeError: lines were left without an answer.
        """
        written, num_failed = set(), 0
        # Unbuffered: what a full disk has no room for would be tried once more as the file is closed.
        with self.out.open("xb" if self._is_new else "ab", buffering=0) as file, closing(answer(self.lines)) as rows:
            self._lock(file)
            file.truncate(self._num_bytes)
            try:
                for row in tqdm(rows, total=len(self.lines), unit="line", disable=None if progress else True):
                    if row["line"] in written:
                        continue
                    self._write(file, encode(row) + b"\n")
                    written.add(row["line"])
                    if "error" in row:
                        num_failed += 1
                        report(f"line {row['line']}: {row['error']}")
            except BaseException:
                if self._is_new and not written:
                    self.out.unlink(missing_ok=True)
                raise
            os.fsync(file.fileno())
        if len(written) < len(self.lines):
            raise RuntimeError(f"{len(self.lines) - len(written)} lines were left without an answer")
        return self._summary(len(written), num_failed)

    def _write(self, file: RawIOBase, text: bytes) -> None:
        left = memoryview(text)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.out)) from error

    def _lock(self, file: RawIOBase) -> None:
        """Two runs would each answer all that waits. The lock of a killed one goes with its process."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {self.out}: wait for its end, or stop it") from None
        except OSError:
            pass  # a file system without locks

    def follow(self, answer: Answering) -> Summary:
        """What another rank of the model does of `run`: its share of the work. The first one writes."""
        failed = ["error" in row for row in answer(self.lines)]
        return self._summary(len(failed), sum(failed))

    def _summary(self, num_rows: int, num_failed: int) -> Summary:
        return Summary(num_rows - num_failed, self._num_failed + num_failed, len(self.lines.answered))


def _read_lines(path: Path, offset: int = 0, first: int = 1, count: int | None = None) -> Iterator[Line]:
    """Those that are not empty."""
    with path.open("rb") as file:
        file.seek(offset)
        for number, text in enumerate(islice(file, count), start=first):
            if text := text.strip():
                yield Line(number, hashlib.sha256(text).hexdigest()[:12], text)


def _read_answers(out: Path) -> tuple[dict[int, str], int, int]:
    """Line -> hash of what it answers; how many of them are errors; and the bytes of all whole lines.

    Raises:
        ValueError: no file of answers.
    """
    found, num_failed, num_bytes = {}, 0, 0
    with out.open("rb") as file:
        for number, row in enumerate(file, start=1):
            if not row.endswith(b"\n") and _ANSWER.startswith(row[: len(_ANSWER)]):
                break  # of a run that was killed
            try:
                answer = json.loads(row)
                found[answer["line"]] = answer["of"]
                num_failed += "error" in answer
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{out}, line {number}, is no answer of a batch: give another name") from None
            num_bytes += len(row)
    return found, num_failed, num_bytes


@dataclass
class _Caller:
    """Someone who waits for the answers to its lines."""

    lines: Iterator[Line]
    rows: deque[dict] = field(default_factory=deque)  # not yet handed over
    num_open: int = 0
    has_more: bool = True


class _Open(NamedTuple):
    line: Line
    asked: dict
    results: list[Result]  # of those samples that have ended
    caller: _Caller


class Answering:
    """Lines to rows, by one runner, which is its own while it answers.

    Several threads may ask at the same time: all their lines are one batch, whoever's turn it is to compute.

    Args:
        max_new_tokens: of lines that do not say.
    """

    def __init__(self, runner: Runner, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int = 64):
        if isinstance(runner.strategy, Baseline):
            raise ValueError("the baseline answers one request after the other: a batch takes any other strategy")
        self.runner = runner
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._lock = threading.Lock()
        self._callers: list[_Caller] = []
        self._gone: deque[_Caller] = deque()  # those of them who wait no more
        self._open: dict[int, _Open] = {}  # by request id
        self._ids = counter()  # a line may be asked again, in another call

    def __call__(self, lines: Iterable[Line]) -> Generator[dict, None, None]:
        """The rows of all lines, as they are done. Stopping early cancels what is left."""
        caller = _Caller(iter(lines))
        self._callers.append(caller)
        try:
            while caller.has_more or caller.num_open or caller.rows:
                while caller.rows:
                    yield caller.rows.popleft()
                with self._lock:
                    self._advance()
                self._forget()
        finally:
            caller.has_more = False
            self._gone.append(caller)
            self._forget()

    def _forget(self) -> None:
        """Cancel what is open of callers that are gone, at once, or behind the step that runs: who is gone may be found
        by the garbage collector in the middle of it, and waits for nobody.
        """
        while self._gone and self._lock.acquire(blocking=False):
            try:
                while self._gone:
                    caller = self._gone.popleft()
                    self._callers.remove(caller)
                    for request_id in [key for key, entry in self._open.items() if entry.caller is caller]:
                        del self._open[request_id]
                        self.runner.cancel(request_id)
            finally:
                self._lock.release()

    def _advance(self) -> None:
        """One step, for all callers. It holds enough of their lines to keep all seats taken, and never a whole file."""
        for caller in self._callers:
            while caller.has_more and caller.num_open + len(caller.rows) < 2 * self.runner.max_num_seqs:
                line = next(caller.lines, None)
                caller.has_more = line is not None
                if line is not None:
                    self._begin(line, caller)
        if self._open:
            for event in self.runner.step():
                if event.result is not None and event.request_id in self._open:
                    self._end(event.result)

    def _begin(self, line: Line, caller: _Caller) -> None:
        request_id = next(self._ids)
        try:
            asked, request = _request(line, request_id, self._tokenizer, self._max_new_tokens)
            self.runner.submit([request])
        except ValueError as error:
            caller.rows.append(_row(line, {"error": str(error).removeprefix(f"request {request_id}: ")}))
            return
        self._open[request_id] = _Open(line, asked, [], caller)
        caller.num_open += 1

    def _end(self, result: Result) -> None:
        line, asked, results, caller = self._open[result.request_id]
        results.append(result)
        if len(results) == int(asked.get("n", 1)):
            del self._open[result.request_id]
            caller.num_open -= 1
            if any(result.finish_reason == "error" for result in results):
                caller.rows.append(_row(line, {"error": FAILED}))
                return
            results.sort(key=lambda result: result.sample_index)
            samples = [_sample(result, self._tokenizer) for result in results]
            caller.rows.append(_row(line, {"id": asked.get("id"), "samples": samples}))


def _row(line: Line, answer: dict[str, object]) -> dict[str, object]:
    return {"line": line.number, "of": line.digest} | answer


def encode(row: dict[str, object]) -> bytes:
    """As it stands in the file. What an id may hold and UTF-8 cannot, half of a surrogate pair, stays an escape."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace")


def _request(
    line: Line, request_id: int, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> tuple[dict, Request]:
    try:
        asked = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(asked, dict):
        raise ValueError(f"a line is a JSON object, got {type(asked).__name__}")
    try:
        json.dumps(asked.get("id"), allow_nan=False)
    except ValueError:
        raise ValueError("an id goes into the answer, and JSON has no NaN or Infinity") from None
    unknown = sorted(asked.keys() - _OPTIONS - {*PROMPTS, "id"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(_OPTIONS))}")
    given = [name for name in PROMPTS if name in asked]
    if len(given) != 1:
        raise ValueError(f"needs one of {', '.join(PROMPTS)}, got {' and '.join(given) or 'none'}")
    (kind,) = given
    if kind == "token_ids":
        ids = asked[kind]
    elif kind == "prompt" and isinstance(asked[kind], str):
        asked[kind].encode()  # a ValueError where half of a surrogate pair stands alone
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
    return asked, Request(ids, request_id=request_id, **options)


def _sample(result: Result, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
    found = {name: value for name, value in asdict(result).items() if value is not None}
    for name in ("request_id", "sample_index", "timings"):
        del found[name]
    return {"text": text} | found
