"""What changed between two sets of results beyond their noise: `make bench-compare A= B=`.

Each side is a folder, a `.jsonl` file, or a commit of this repository. Two spreads differ where their ranges do not
meet and their medians are more than `LEAST` apart. A whole number (bytes, counts) has no noise. A figure of one run has
an unknown one: it is shown where it moved by more than `ONE_RUN`. Cases asked with other parameters are named, and none
of their figures is compared.
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


def read(where: str) -> list[dict]:
    """The result lines of one side.

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
    return found


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
    """How many figures both sides have, those that changed, how many only one side has, the cases that both ran and one
    of them did not end, and those that both ran with other parameters, whose figures are in no other count.
    """

    num_compared: int
    changes: list[Change]
    only_a: int
    only_b: int
    machines: tuple[list[str], list[str]]
    failures: list[str]
    other_params: list[str]

    @property
    def across_machines(self) -> bool:
        return not set(self.machines[0]) & set(self.machines[1])


def compare(lines_a: Sequence[dict], lines_b: Sequence[dict]) -> Comparison:
    """Machine by machine; where the sides have none in common, one against the other."""
    a, b = of_lines(lines_a), of_lines(lines_b)
    machines = tuple(sorted({record.machine for record in side}) for side in (a, b))
    together = bool(set(machines[0]) & set(machines[1]))
    if not together and max(map(len, machines)) > 1:
        raise ValueError(f"no machine in common: {', '.join(machines[0])} against {', '.join(machines[1])}")
    differing = _differing(lines_a, lines_b, together)
    sides = [{_key(record, together): record for record in side if record.value is not None} for side in (a, b)]
    shared = [key for key in sides[0] if key in sides[1]]
    pairs = [Change(sides[0][key], sides[1][key]) for key in shared if key[:-2] not in differing]
    changes = [pair for pair in pairs if is_beyond_noise(pair.a, pair.b)]
    only = [len(own) - len(shared) for own in sides]
    failures = sorted(_failures(a, b, together))
    other_params = sorted(
        f"{_name(case)}: not compared, since A and B differ in {', '.join(names)}" for case, names in differing.items()
    )
    return Comparison(len(pairs), changes, *only, machines, failures, other_params)


def _differing(a: Sequence[dict], b: Sequence[dict], together: bool) -> dict[tuple, list[str]]:
    """The cases that both sides ran, and not with the same parameters -> the names of these."""

    def asked(found: Sequence[dict]) -> dict[tuple, dict]:  # the latest run counts, as in `of_lines`
        return {_case(line, together): line["params"] for line in sorted(found, key=lambda line: line["time"])}

    sides = asked(a), asked(b)
    found = {}
    for case in sides[0].keys() & sides[1].keys():
        mine, other = (side[case] for side in sides)
        if mine != other:
            same = [name for name in mine if name in other and mine[name] == other[name]]
            found[case] = [name for name in mine | other if name not in same]
    return found


def _failures(a: Sequence[Record], b: Sequence[Record], together: bool) -> Iterator[str]:
    """Where one side has figures of a case and the other says why it has none."""
    ran = [{_key(record, together)[:-2]: record for record in side} for side in (a, b)]
    for case in ran[0].keys() & ran[1].keys():
        told = [side[case].status + f" ({side[case].error})" * bool(side[case].error) for side in ran]
        if (ran[0][case].status == "ok") != (ran[1][case].status == "ok"):
            yield f"{_name(case)}: {told[0]} in A, {told[1]} in B"


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
    """A case, as `_case`, and which of its figures."""
    what = (record.suite, record.workload, record.system, record.model, record.dtype, record.at, record.measure)
    return (record.machine, *what) if with_machine else what


def _case(line: dict, with_machine: bool) -> tuple:
    what = tuple(line[name] for name in ("suite", "workload", "system", "model", "dtype"))
    return (lines.machine_of(line), *what) if with_machine else what


def _name(case: tuple) -> str:
    return " / ".join(case[-4:])


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
    return "\n\n".join([text, *found.failures, *found.other_params, *([table(head, rows)] if rows else [])])


def _shown(record: Record) -> str:
    if _is_spread(record):
        return f"{record.value:.6g} ({record.low:.6g} to {record.high:.6g})"
    return f"{record.value:.6g}"
