"""What changed between two sets of results beyond their noise: `make bench-compare A= B=`.

Each side is a folder, a `.jsonl` file, or a commit of this repository. Two spreads differ where their ranges do not
meet and their medians are more than `LEAST` apart. A whole number (bytes, counts) has no noise. A figure of one run has
an unknown one: it is shown where it moved by more than `ONE_RUN`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import lines, machine
from bench.markdown import table
from bench.records import Record, of_lines

LEAST, ONE_RUN = 0.01, 0.1


@dataclass(frozen=True)
class Change:
    a: Record
    b: Record

    @property
    def relative(self) -> float | None:
        return self.b.value / self.a.value - 1 if self.a.value else None

    @property
    def note(self) -> str:
        return "" if _is_spread(self.a, self.b) or _is_whole(self.a) else "one run"


def read(where: str) -> list[Record]:
    """
    Raises:
        ValueError: neither a folder or file of results nor a commit; or results that cannot be read.
    """
    path = Path(where)
    if path.is_dir():
        found = lines.read(path)
    elif path.is_file():
        found = lines.read_file(path)
    else:
        found = _of_commit(where)
    if not found:
        raise ValueError(f"there are no results in {where}")
    return of_lines(found)


def _of_commit(name: str) -> list[dict]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=machine.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{name} is no folder, no file and no commit of this repository")
        return done.stdout

    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").strip()
    paths = git("ls-tree", "--name-only", commit, "bench/results/").splitlines()
    return [
        line
        for path in paths
        if path.endswith(".jsonl")
        for line in lines.read_text(git("show", f"{commit}:{path}"), f"{name}:{path}")
    ]


@dataclass(frozen=True)
class Comparison:
    """How many figures both sides have, those that changed, how many only one side has, and the cases that both ran and
    one of them did not end.
    """

    num_compared: int
    changes: list[Change]
    only_a: int
    only_b: int
    machines: tuple[list[str], list[str]]
    failures: list[str]

    @property
    def across_machines(self) -> bool:
        return not set(self.machines[0]) & set(self.machines[1])


def compare(a: Sequence[Record], b: Sequence[Record]) -> Comparison:
    """Machine by machine; where the sides have none in common, one against the other."""
    machines = tuple(sorted({record.machine for record in side}) for side in (a, b))
    together = bool(set(machines[0]) & set(machines[1]))
    if not together and max(map(len, machines)) > 1:
        raise ValueError(f"no machine in common: {', '.join(machines[0])} against {', '.join(machines[1])}")
    sides = [{_key(record, together): record for record in side if record.value is not None} for side in (a, b)]
    pairs = [Change(sides[0][key], sides[1][key]) for key in sides[0] if key in sides[1]]
    changes = [pair for pair in pairs if is_beyond_noise(pair.a, pair.b)]
    only = [len(own) - len(pairs) for own in sides]
    return Comparison(len(pairs), changes, *only, machines, sorted(_failures(a, b, together)))


def _failures(a: Sequence[Record], b: Sequence[Record], together: bool) -> Iterator[str]:
    """Where one side has figures of a case and the other says why it has none."""
    ran = [{_key(record, together)[:-2]: record for record in side} for side in (a, b)]
    for case in ran[0].keys() & ran[1].keys():
        told = [side[case].status + f" ({side[case].error})" * bool(side[case].error) for side in ran]
        if (ran[0][case].status == "ok") != (ran[1][case].status == "ok"):
            yield f"{' / '.join(case[-4:])}: {told[0]} in A, {told[1]} in B"


def is_beyond_noise(a: Record, b: Record) -> bool:
    if a.value == b.value:
        return False
    change = abs(b.value / a.value - 1) if a.value else float("inf")
    if _is_spread(a, b):
        return change > LEAST and (a.high < b.low or b.high < a.low)
    return (_is_whole(a) and _is_whole(b)) or change > ONE_RUN


def _is_spread(*sides: Record) -> bool:
    return all((record.repeats or 1) > 1 for record in sides)


def _is_whole(record: Record) -> bool:
    return isinstance(record.value, int) and not record.repeats


def _key(record: Record, with_machine: bool) -> tuple:
    what = (record.suite, record.workload, record.system, record.model, record.dtype, record.at, record.measure)
    return (record.machine, *what) if with_machine else what


def render(found: Comparison) -> str:
    rows = [
        [
            *([c.a.machine] if not found.across_machines else []),
            " / ".join((c.a.workload, c.a.system, c.a.model, c.a.dtype)),
            f"{c.a.at} {c.a.measure}".strip(),
            _shown(c.a),
            _shown(c.b),
            "" if c.relative is None else f"{c.relative:+.1%}",
            c.note,
        ]
        for c in found.changes
    ]
    head = [*(["machine"] if not found.across_machines else []), "case", "figure", "A", "B", "change", ""]
    text = (
        f"{len(found.changes)} of {found.num_compared} figures changed beyond noise; {found.only_a} are only in A, "
        f"{found.only_b} only in B."
    )
    if found.across_machines:
        text = f"A: {found.machines[0][0]}. B: {found.machines[1][0]}. " + text
    return "\n\n".join([text, *found.failures, *([table(head, rows)] if rows else [])])


def _shown(record: Record) -> str:
    if _is_spread(record):
        return f"{record.value:.6g} ({record.low:.6g} to {record.high:.6g})"
    return f"{record.value:.6g}"
