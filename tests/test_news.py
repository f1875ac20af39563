"""`make upstream-news`, with an index that is made up: one line a release, whatever is the matter with it."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

import fork
import news

PATCH = """\
--- a/src/model.py
+++ b/src/model.py
@@ -1,3 +1,4 @@
 line 1
 line 2
+and more
 line 3
"""
LINES = "line 1\nline 2\nline 3\n"


def archive(path: Path, text: str = LINES) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/src/model.py")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text.encode()))
    return path


class Index:
    """Stands in for pip: releases of a made-up project, by version, and the text of their one file."""

    def __init__(self, **releases: str):
        self.releases = {version.removeprefix("v").replace("_", "."): text for version, text in releases.items()}
        self.without_archive: set[str] = set()

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        if args[0] == "index":
            said = f"made-up (9)\nAvailable versions: {', '.join(self.releases)}\n  INSTALLED: 1.0\n"
            return subprocess.CompletedProcess(args, 0, said, "WARNING: pip index is experimental\n")
        version = args[-1].removeprefix("made-up==")
        if version in self.without_archive:
            return subprocess.CompletedProcess(args, 1, "", "ERROR: no matching\nERROR: No archive for it\n")
        archive(Path(args[args.index("--dest") + 1], f"made-up-{version}.tar.gz"), self.releases[version])
        return subprocess.CompletedProcess(args, 0, "", "")


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> fork.Fork:
    """Made-up 1.9.0 and 1.10.0 are tested."""
    series = tmp_path / "patches/1.10"
    series.mkdir(parents=True)
    (series / "0001-More.patch").write_text(PATCH)
    (series / "series").write_text("0001-More.patch\n")
    zeros = "0" * 64
    (tmp_path / "patches/upstreams.txt").write_text(
        f"1.10  made-up==1.10.0 --hash=sha256:{zeros}\n1.9  made-up==1.9.0 --hash=sha256:{zeros}\n"
    )
    monkeypatch.setattr(
        news, "run_tests", lambda root, tree: f"{(tree / 'src/model.py').read_text().count('more')} ran"
    )
    return fork.Fork(tmp_path)


def lines(checkout: fork.Fork, monkeypatch, index) -> list[str]:
    monkeypatch.setattr(news, "pip", index)
    found = list(news.news(checkout))
    assert not [line for line in found if "\n" in line]
    assert not list((checkout.root / "build").glob("*")), "what was unpacked is gone"
    return found


def test_nothing_newer(checkout, monkeypatch):
    index = Index(v1_10_0=LINES, v1_9_5=LINES, v1_8=LINES)  # 1.9.5 is not tested, but older than what is
    assert lines(checkout, monkeypatch, index) == ["the index offers nothing newer than made-up 1.10.0"]


def test_a_line_a_newer_release_oldest_first(checkout, monkeypatch):
    index = Index(v2_0=LINES.replace("2", "two"), v1_11_1=LINES, v1_11_0=LINES, v1_10_0=LINES)
    index.without_archive = {"1.11.0"}
    found = lines(checkout, monkeypatch, index)
    digest = found[1].rpartition(" ")[2]
    assert found == [
        "made-up 1.11.0: its source archive could not be fetched (ERROR: No archive for it)",
        f"made-up 1.11.1: patches/1.10 applies, 1 ran, sha256 {digest}",
        "made-up 2.0: patches/1.10/0001-More.patch does not apply at src/model.py, line 1",
    ]
    assert len(digest) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize("said", ["ERROR: No matching distribution found for made-up\n", ""])
def test_an_index_that_does_not_answer(checkout, monkeypatch, capsys, said):
    monkeypatch.setattr(news, "pip", lambda *args: subprocess.CompletedProcess(args, 1, "", said))
    monkeypatch.setattr(news, "Fork", lambda root: checkout)
    assert news.main() == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert "does not answer for made-up" in error
    assert said.strip() in error


@pytest.mark.parametrize(
    ("returncode", "said", "told"),
    [
        (0, "....\n4 passed in 1.2s\n", "4 passed in 1.2s"),
        (1, "F\n= summary =\nFAILED tests/a.py::b - KeyError\n1 failed\n", "FAILED tests/a.py::b - KeyError"),
        (2, "ERROR tests/a.py - ImportError: d\n1 error in 1s\n", "ERROR tests/a.py - ImportError: d"),
        (4, "", "no pytest"),
    ],
)
def test_what_the_tests_say_in_one_line(tmp_path, monkeypatch, returncode, said, told):
    def run(command, cwd, env, **kwargs):
        assert env["PYTHONPATH"].startswith(str(tmp_path / "tree/src"))
        return subprocess.CompletedProcess(command, returncode, said, "what\nno pytest\n")

    monkeypatch.setattr(news.subprocess, "run", run)
    assert news.run_tests(tmp_path, tmp_path / "tree") == told


def test_the_fast_tests_are_there():
    root = Path(news.__file__).resolve().parent.parent
    assert all((root / name).is_file() for name in news.FAST_TESTS)
