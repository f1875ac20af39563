"""Results as one table, and what changed between two of them."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bench_command import LINE

from bench import compare, lines, records, report
from bench.__main__ import main
from bench.measure import spread


def record_of(values, **changes):
    line = LINE | {"result": {"step": spread(values)}} | changes
    (record,) = records.of_lines([line])
    return record


TIMES = st.lists(st.floats(1e-3, 10.0), min_size=2, max_size=5)


@given(TIMES, TIMES)
def test_a_change_is_beyond_noise_where_ranges_do_not_meet(a, b):
    apart = max(a) < min(b) or max(b) < min(a)
    far = abs(spread(b)["median"] / spread(a)["median"] - 1) > compare.LEAST
    assert compare.is_beyond_noise(record_of(a), record_of(b)) == (apart and far)


@given(st.floats(1e-3, 10.0), st.floats(1e-3, 10.0), st.integers(1, 1000), st.integers(1, 1000))
def test_one_run_has_unknown_noise_and_a_count_has_none(a, b, n, m):
    one = compare.is_beyond_noise(record_of([a]), record_of([b, b]))
    assert one == (abs(b / a - 1) > compare.ONE_RUN)
    counts = [records.of_lines([LINE | {"result": {"peak": value}}])[0] for value in (n, m)]
    assert compare.is_beyond_noise(*counts) == (n != m)


def leaves(value):
    """Every figure of a result, as its author wrote it."""
    if isinstance(value, dict) and "median" in value:
        return [value["median"]]
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, list):
        rows = [{k: v for k, v in item.items() if k not in records.NAMES or not isinstance(v, (str, int))}
                for item in value if isinstance(item, dict)]  # fmt: skip
        return [leaf for row in rows for leaf in leaves(row)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_the_table_holds_every_figure_once(tmp_path):
    found = lines.read(report.RESULTS)
    table = [record for line in found for record in records.of_line(line)]
    figures = [record for record in table if record.value is not None]
    assert [record.value for record in figures] == [leaf for line in found for leaf in leaves(line.get("result", {}))]
    keys = [(compare._key(record, True), record.time) for record in figures]
    assert len(set(keys)) > 1000 and len(set(keys)) == len(keys)
    records.write_csv(table, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    shown = [{k: "" if v is None else str(v) for k, v in asdict(record).items()} for record in table]
    assert read == shown


def write(folder, *found):
    folder.mkdir()
    (folder / "default-cpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return str(folder)


def test_two_folders_a_file_and_a_commit(tmp_path, capsys):
    slow = LINE | {"result": {"step": spread([1.0, 1.1]), "peak": 100, "old": 1}}
    fast = LINE | {"result": {"step": spread([0.5, 0.6]), "peak": 100}}
    a, b = write(tmp_path / "a", slow), write(tmp_path / "b", fast)
    assert main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 figures changed beyond noise; 1 are only in A, 0 only in B." in out and "-47.6%" in out
    assert main(["compare", a, f"{a}/default-cpu.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == []
    assert main(["compare", "HEAD", "HEAD"]) == 0
    assert capsys.readouterr().out.startswith("0 of ")


def test_a_case_that_only_one_side_ended_is_told(tmp_path, capsys):
    failed = {key: value for key, value in LINE.items() if key != "result"} | {"status": "failed", "error": "no room"}
    a = write(tmp_path / "a", LINE | {"result": {"step": spread([1.0, 1.1])}})
    b = write(tmp_path / "b", failed)
    assert main(["compare", a, b]) == 0
    name = " / ".join(LINE[key] for key in ("workload", "system", "model", "dtype"))
    assert f"{name}: ok in A, failed (no room) in B" in capsys.readouterr().out
    assert main(["compare", b, b]) == 0
    assert "failed" not in capsys.readouterr().out


def test_cases_that_were_asked_otherwise_are_told_and_not_compared(tmp_path, capsys):
    old = LINE | {"params": {"lengths": [9], "new_tokens": 1}, "time": "2025-01-01T00:00:00+00:00"}
    slow = LINE | {"result": {"step": spread([1.0, 1.1]), "peak": 100}}
    fast = LINE | {"result": {"step": spread([0.5, 0.6]), "peak": 90}}
    others = [side | {"system": "window"} for side in (slow, fast)]
    asked = fast | {"params": {"lengths": [1, 2], "new_tokens": 1, "repeats": 3}}
    a, b = write(tmp_path / "a", slow, others[0]), write(tmp_path / "b", old, asked, others[1])
    assert main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 figures changed beyond noise; 0 are only in A, 0 only in B." in out
    said = "throughput / paged / m / float32: not compared, since A and B differ in lengths, repeats"
    assert said in out.splitlines() and "| throughput / paged" not in out
    assert main(["compare", a, b, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["other_params"] == [said] and {change["a"]["system"] for change in found["changes"]} == {"window"}
    again = write(tmp_path / "again", old, slow)  # of two runs the later counts
    assert main(["compare", a, again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["other_params"] == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no folder, no file and no commit of this repository"),
        ("", "there are no results in"),
        ("{", "default-cpu.jsonl, line 1 is no JSON"),
        (json.dumps(LINE | {"schema": 9}), "its schema is 9, this bench reads 1"),
    ],
)
def test_sides_that_are_none(tmp_path, capsys, content, said):
    side = tmp_path / "side"
    if content is not None:
        side.mkdir()
        (side / "default-cpu.jsonl").write_text(content)
    assert main(["compare", str(side), str(side)]) == 1
    assert said in capsys.readouterr().err
    assert main(["compare", str(side)]) == 2
