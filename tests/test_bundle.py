"""`make bundle` and `rebuild.py`, on a small repository with a Makefile that only records what was asked of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bundle
from fork import ForkError

MAKEFILE = "patch model:\n\t@echo $@ with $(PYTHON) >> made\n"


@pytest.fixture
def repository(tmp_path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    (root / "Makefile").write_text(MAKEFILE)
    (root / ".gitignore").write_text("models/\n.cache/\nmade\n")
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.com", "-c", "commit.gpgsign=false"]
    for args in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--message", "Begin"]):
        subprocess.run(["git", *args], cwd=root, check=True)
    return root


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(range(256)) * 100)
    empty = tmp_path / "empty"
    empty.touch()
    return {"models/weights.gguf": weights, ".cache/site/package/__init__.py": empty}


def rebuild(parts: Path, into: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, parts / "rebuild.py", "--into", into, "--python", "python-of-the-host"]
    return subprocess.run(command, capture_output=True, text=True)


def test_what_goes_in_comes_out(repository, files, tmp_path):
    parts, into = tmp_path / "bundle", tmp_path / "there/rebuilt"
    manifest = bundle.write_bundle(repository, files, parts, part_size=10_000)
    assert len(manifest["parts"]) > 2
    assert all((parts / part["name"]).stat().st_size <= 10_000 for part in manifest["parts"])

    done = rebuild(parts, into)
    assert done.returncode == 0, done.stderr
    for name, path in files.items():
        assert (into / name).read_bytes() == path.read_bytes()
    assert (into / "Makefile").read_text() == MAKEFILE
    assert (into / "made").read_text() == "patch with python-of-the-host\nmodel with python-of-the-host\n"
    git = ["git", "-C", into]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert head == manifest["commit"]
    assert subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True).stdout == b""


def test_the_same_commit_gives_the_same_parts(repository, files, tmp_path):
    first = bundle.write_bundle(repository, files, tmp_path / "first", part_size=10_000)
    files["models/weights.gguf"].touch()
    second = bundle.write_bundle(repository, dict(reversed(files.items())), tmp_path / "second", part_size=10_000)
    assert first == second


def test_a_bundle_replaces_the_one_before_it(repository, files, tmp_path):
    bundle.write_bundle(repository, files, tmp_path / "bundle", part_size=1_000)
    manifest = bundle.write_bundle(repository, files, tmp_path / "bundle")
    assert {p.name for p in (tmp_path / "bundle").iterdir()} == {"manifest.json", "rebuild.py", "part-00"}
    assert len(manifest["parts"]) == 1


def test_a_missing_file_is_named(repository, files, tmp_path):
    files["models/kjv.txt"] = tmp_path / "nowhere"
    with pytest.raises(ForkError, match=r"models/kjv\.txt"):
        bundle.write_bundle(repository, files, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("fault", ["missing", "damaged", "another whole", "no manifest", "folder taken"])
def test_a_bad_bundle_is_refused_and_leaves_nothing(repository, files, tmp_path, fault):
    parts, into = tmp_path / "bundle", tmp_path / "rebuilt"
    manifest = bundle.write_bundle(repository, files, parts, part_size=10_000)
    match fault:
        case "missing":
            (parts / "part-01").unlink()
        case "damaged":
            (parts / "part-01").write_bytes(b"x" + (parts / "part-01").read_bytes()[1:])
        case "another whole":
            (parts / "manifest.json").write_text(json.dumps(manifest | {"sha256": "0" * 64}))
        case "no manifest":
            (parts / "manifest.json").unlink()
        case "folder taken":
            into.mkdir()
    before = sorted(tmp_path.iterdir())
    done = rebuild(parts, into)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    expected = {"missing": "part-01", "damaged": "part-01", "another whole": "whole", "no manifest": "manifest.json"}
    assert expected.get(fault, "exists") in done.stderr
    assert sorted(tmp_path.iterdir()) == before
