"""Result lines: read, checked, written whole, and looked up. One line is one case, whatever became of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.systems import in_order

SCHEMA = 1
_TEXTS = ("suite", "workload", "system", "model", "dtype", "device", "time", "status", "commit")
_KINDS = dict.fromkeys(_TEXTS, str) | dict.fromkeys(("params", "machine", "versions"), dict)
_MACHINE = {"cpu": str, "cores": int, "threads": int}
_CARD = {"gpu": str, "gpu_memory": int}


def read(folder: Path) -> list[dict]:
    """All result lines of a folder, in the order they were written, file by file."""
    return [line for path in sorted(folder.glob("*.jsonl")) for line in read_file(path)]


def read_file(path: Path) -> list[dict]:
    """
    Raises:
        ValueError: a line that is no JSON, or not of this schema; it says which.
    """
    try:
        return read_text(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from None


def read_text(text: str, source: str) -> list[dict]:
    """The lines of a file that has been read; `source` names it."""
    lines = []
    for number, one in enumerate(text.splitlines(), 1):
        if not one.strip():
            continue
        try:
            line = json.loads(one, parse_constant=_no_number)
        except (json.JSONDecodeError, RecursionError) as error:
            why = f"{error.msg}, column {error.colno}" if isinstance(error, ValueError) else "nested too deeply"
            raise ValueError(f"{source}, line {number} is no JSON ({why}): mend or delete it") from None
        if wrong := _wrong(line):
            raise ValueError(f"{source}, line {number} is not a result of this bench: {wrong}")
        lines.append(line)
    return lines


def _no_number(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no figure", "", 0)


def _wrong(line: object) -> str | None:
    if not isinstance(line, dict):
        return f"a {type(line).__name__}, not an object"
    if line.get("schema", SCHEMA) != SCHEMA:
        return f"its schema is {line['schema']}, this bench reads {SCHEMA}"
    wanted = _KINDS | ({"result": dict} if line.get("status") == "ok" else {"error": str}) | {"dirty": object}
    bad = _unlike(line, wanted)
    if "machine" not in bad:
        about = line["machine"]
        wanted = _MACHINE | (_CARD if "gpu" in about else {})
        wanted |= {"instructions": str} if "instructions" in about else {}  # older lines do not name them
        bad += [f"machine.{name}" for name in _unlike(about, wanted)]
    return f"without {', '.join(bad)} of the right type" if bad else None


def _unlike(found: dict, wanted: dict[str, type]) -> list[str]:
    """What is not there, or of another type."""
    return [name for name, kind in wanted.items() if name not in found or not isinstance(found[name], kind)]


def append(path: Path, line: dict) -> None:
    """Adds one line: all of it, or the file is as it was and an OSError says why."""
    data = (json.dumps(line) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file that is as it was where writing fails: `write` is handed another name, which then takes its place.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(draft)
        draft.replace(path)
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def file_name(*parts: str) -> str:
    """Of names that results give: one that leads nowhere else, and that every file system takes."""
    plain = re.sub(r"[^\w.+-]+", "-", "-".join(parts))
    return plain.encode()[:200].decode(errors="ignore")


def machine_of(line: dict) -> str:
    about = line["machine"]
    if "gpu" in about:
        return about["gpu"]
    kind = [about["instructions"]] if "instructions" in about else []  # older lines do not name them
    return ", ".join([f"CPU: {about['cpu']}", *kind, f"{about['cores']} cores"])


def hosts_of(lines: Iterable[dict]) -> str:
    """The processors of lines, each once: machines of one GPU may have several."""
    about = [line["machine"] for line in lines]
    return "; ".join(dict.fromkeys(f"{one['cpu']}, {one['cores']} cores, {one['threads']} threads" for one in about))


def commits_of(lines: Iterable[dict]) -> str:
    return ", ".join(dict.fromkeys(line["commit"] + " with local changes" * bool(line["dirty"]) for line in lines))


@dataclass(frozen=True)
class Key:
    workload: str
    system: str
    model: str
    dtype: str


class Found:
    """The lines of one machine. Of several runs of a case the latest counts."""

    def __init__(self, lines: list[dict]) -> None:
        latest: dict[Key, dict] = {}
        for line in sorted(lines, key=lambda line: line["time"]):
            latest[Key(line["workload"], line["system"], line["model"], line["dtype"])] = line
        self.lines = list(latest.values())
        ran = [line for line in lines if line["workload"] == "machine" and line["status"] == "ok"]
        limits = [line for line in ran if "read" in line["result"].get("limits", {})]
        self._every_limit = sorted(limits, key=lambda line: line["time"])
        #: what this machine can do at best, in bytes/s, as measured last; empty where nobody measured it
        self.limits: dict[str, float] = self._every_limit[-1]["result"]["limits"] if limits else {}

    @property
    def on_gpu(self) -> bool:
        return any("gpu" in line["machine"] for line in self.lines)

    def models(self) -> list[str]:
        """By their names, whichever was measured first."""
        return sorted({line["model"] for line in self.lines if line["workload"] != "machine"}, key=str.casefold)

    def dtypes(self, workload: str, model: str) -> list[str]:
        """float32 first."""
        own = [line for line in self.lines if line["workload"] == workload and line["model"] == model]
        return sorted({line["dtype"] for line in own}, reverse=True)

    def of(self, workload: str, model: str, dtype: str | None = None) -> dict[str, dict]:
        """System -> its line, those that every suite knows first, in one order."""
        found = [line for line in self.lines if line["workload"] == workload and line["model"] == model]
        by_system = {line["system"]: line for line in found if dtype is None or line["dtype"] == dtype}
        return {name: by_system[name] for name in in_order(by_system)}

    def read_bandwidth(self, line: dict) -> float | None:
        """In bytes/s, measured last before this line: in its own suite, or else in any, or else first."""
        before = [limit for limit in self._every_limit if limit["time"] <= line["time"]]
        own = [limit for limit in before if limit["suite"] == line["suite"]]
        limits = [*own[-1:], *before[-1:], *self._every_limit[:1]]
        return limits[0]["result"]["limits"]["read"] if limits else None

    def share(self, line: dict, rate: float) -> float | None:
        """Of a rate in bytes/s: what it is of the read bandwidth that goes with this line."""
        read = self.read_bandwidth(line)
        return rate / read if read else None
