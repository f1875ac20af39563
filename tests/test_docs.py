"""The pages run: what they show as Python, as a shell line or as output is what happens.

A page's ```python blocks run in order, in one namespace. A ```text block behind one is all that it prints; where it
raises, the error is the last line. A block whose first line is `# NAME.ext` is a file. A ```sh block with ```text
behind it runs beside the files of its page, which count as an installed package where one of them is a pyproject.toml.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [ROOT / name for name in ("kv_strategies", "bench", "tests", "examples", "patches")]
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE_NAME = re.compile(r"# (\w+\.\w+)\n")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")  # to files, not to other sites
_NUMBER = re.compile(r"[+-]?\d+\.\d+(?:e[+-]?\d+)?")

#: Runs the blocks of the pages given as JSON on standard input, and says what each of them printed.
_RUN = """
import contextlib, io, json, sys, warnings
warnings.filterwarnings("error", "`.*` is deprecated", FutureWarning)
def run(page, blocks):
    names, printed = {"__name__": page}, []
    for line, source in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                exec(compile("\\n" * line + source, page, "exec"), names)
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
        printed.append(out.getvalue())
    return printed
pages = json.load(sys.stdin)
json.dump({page: run(page, blocks) for page, blocks in pages.items()}, sys.stdout)
"""


class Block(NamedTuple):
    kind: str
    line: int  # of its fence
    source: str
    output: str | None  # what it is said to print

    @property
    def file_name(self) -> str | None:
        found = _FILE_NAME.match(self.source)
        return found and found[1]


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    matches = list(_FENCED.finditer(text))
    for match, behind in zip_longest(matches, matches[1:]):
        has_output = behind and behind[1] == "text" and not text[match.end() : behind.start()].strip()
        line = text[: match.start()].count("\n") + 1
        found.append(Block(match[1], line, match[2], behind[2] if has_output else None))
    return found


def of_kind(kind: str, page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.kind == kind and not block.file_name]


def environment(*folders: Path) -> dict[str, str]:
    paths = [*map(str, folders), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def same(said: str, printed: str) -> bool:
    """Word for word; numbers with a decimal point within a twentieth, since they are another machine's."""
    if _NUMBER.sub("#", said).split() != _NUMBER.sub("#", printed).split():
        return False
    numbers = zip(_NUMBER.findall(said), _NUMBER.findall(printed), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.05, abs=0.01) for a, b in numbers)


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """Page -> what each of its blocks printed. One process for all, which loads the model once."""
    pages = {
        str(page): [(block.line, block.source) for block in found]
        for page in PAGES
        if (found := of_kind("python", page))
    }
    command = [sys.executable, "-c", _RUN]
    run = subprocess.run(command, input=json.dumps(pages), capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("page", [page for page in PAGES if of_kind("python", page)], ids=lambda page: page.name)
def test_python(page, printed):
    for block, found in zip(of_kind("python", page), printed[str(page)], strict=True):
        where = f"{page.name}, line {block.line}, printed:\n{found}"
        if block.output is None:
            assert not re.search(r"^\w+(Error|Exception|Warning|Blocks): ", found, re.MULTILINE), where
        else:
            assert same(block.output, found), where


@pytest.mark.parametrize("page", [page for page in PAGES if of_kind("sh", page)], ids=lambda page: page.name)
def test_shell(page, tmp_path):
    for block in blocks(page):
        if block.file_name:
            (tmp_path / block.file_name).write_text(block.source)
    if (tmp_path / "pyproject.toml").exists():
        install(tmp_path)
    for block in of_kind("sh", page):
        if block.output is None:
            continue
        words = shlex.split(block.source, comments=True)
        program = {"kv-strategies": ["-m", "kv_strategies.cli"], "python": []}[words[0]]
        command = [sys.executable, *program, *words[1:]]
        run = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
        assert same(block.output, run.stdout), f"{page.name}, line {block.line}:\n{run.stdout}{run.stderr[-2000:]}"


def install(folder: Path) -> None:
    """What `pip install` leaves of a pyproject.toml that `importlib.metadata` reads; pip itself needs an index."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_of_files_lead_somewhere(page):
    text = page.read_text()
    for target in _LINK.findall(text):
        assert (page.parent / target).exists(), target
    for name in set(re.findall(r"`([\w/]+\.py)`", text)) if page.name != "upstream.md" else ():  # it names upstream's
        assert any(next(folder.glob(f"**/{name}"), None) for folder in SOURCES) or (ROOT / name).exists(), name


@pytest.mark.parametrize("recent", [1, 6, 24, 64, 256])
def test_the_strategy_that_a_page_has_one_install_serves(recent, monkeypatch, tmp_path):
    from common import tiny_llama

    from kv_strategies import STRATEGIES, Request, Runner, build

    page = ROOT / "docs/adding-a-strategy.md"
    (source,) = (block.source for block in blocks(page) if block.file_name == "kv_every_fourth.py")
    (tmp_path / "kv_every_fourth.py").write_text(source)
    preset = runpy.run_path(str(tmp_path / "kv_every_fourth.py"))["EVERY_FOURTH"]
    monkeypatch.setitem(STRATEGIES, "installed", preset)
    model = tiny_llama()
    strategy = build("installed", model, num_blocks=40, recent=recent)
    (result,) = Runner(model, strategy).generate([Request(range(1, 51), max_new_tokens=300)])
    assert len(result.token_ids) == 300


def test_every_figure_key_is_explained(tmp_path):
    """docs/stats.md has a row for each key of `stats()`, and no other."""
    from common import tiny_llama

    from kv_strategies import build

    model, keys = tiny_llama(), set()
    for name, options in (
        ("paged", {}),
        ("offload", {"top_n": 2}),
        ("offload", {"host_bytes": 1 << 20}),
        ("evict", {}),
        ("prefix", {"shared_path": tmp_path / "shared", "shared_bytes": 1 << 20}),
    ):
        keys |= set(build(name, model, num_blocks=4, **options).stats())
    explained = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/stats.md").read_text(), re.MULTILINE)
    assert set(explained) == keys and len(explained) == len(keys)


def test_every_option_is_explained():
    """docs/options.md has a row for each option, with its default, and no other."""
    from common import OUTSIDE

    from kv_strategies import STRATEGIES, build

    of_all = inspect.signature(build).parameters.values()
    known = {(p.name, repr(p.default)) for p in of_all if p.kind is p.KEYWORD_ONLY}
    for name, preset in STRATEGIES.items():
        if name not in OUTSIDE:
            known |= {(name, option, repr(p.default)) for option, p in preset.options.items()}
    rows = [_cells(line) for line in (ROOT / "docs/options.md").read_text().splitlines() if line.startswith("| `")]
    said = [tuple(cell.strip("`") for cell in row[:-1]) for row in rows]
    assert set(said) == known and len(said) == len(known)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_measured_rows_stand_in_the_results(page):
    """Each row under "Measured", and on to the end of its page, is one of a results table that is linked there."""
    measured = page.read_text().partition("\n## Measured\n")[2]
    results = [page.parent / target for target in _LINK.findall(measured) if "bench/results/" in target]
    known = [_cells(line) for path in results for line in path.read_text().splitlines() if line.startswith("|")]
    for line in measured.splitlines():
        if line.startswith("|"):
            assert any(_is_within(_cells(line), row) for row in known), f"{page.name}: no longer in the results: {line}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def _is_within(cells: list[str], row: list[str]) -> bool:
    """Whether a row has these cells, in this order."""
    rest = iter(row)
    return all(cell in rest for cell in cells)
