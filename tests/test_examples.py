"""The examples run as they stand, and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAID = {
    "generate.py": ["80 of 82 prompt tokens were there already\n   the native cache's tokens"],
    "stream.py": ["'The capital of France is' -> ' Paris", "first token after"],
    "saved_prefix.py": ["blocks saved", "after the restart: ", "tokens were there"],
    "offload.py": ["second visit: 1040 of 1080", "blocks brought back from lower tiers"],
    "speculate.py": ["guesses right", "the same tokens: True"],
    "codec_raw4.py": ["bytes a token, by the reference kernels"],
    "retention_every_fourth.py": ["-1 -1 -1"],
}
#: Of an example that needs a package which the tests do not bring: what it says without, on standard error.
WITHOUT = {"harness.py": ("lm_eval", "pip install lm-eval")}
if find_spec("lm_eval"):
    SAID["harness.py"] = [f"{name:8} 8 of 8 answers as native" for name in ("paged", "prefix")]


def run_python(program: Path, *folders: Path) -> subprocess.CompletedProcess:
    paths = [*map(str, folders), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAID, *WITHOUT}


@pytest.mark.parametrize("name", SAID)
def test_example(name):
    run = run_python(EXAMPLES / name)
    assert run.returncode == 0, run.stderr[-2000:]
    for text in SAID[name]:
        assert text in run.stdout, run.stdout


@pytest.mark.parametrize("name", WITHOUT)
def test_an_example_says_what_it_lacks(name, tmp_path):
    package, said = WITHOUT[name]
    (tmp_path / f"{package}.py").write_text("raise ImportError")  # as if it were not installed
    run = run_python(EXAMPLES / name, tmp_path)
    assert run.returncode == 1 and said in run.stderr


@pytest.mark.parametrize("name", ["codec_raw4.py", "retention_every_fourth.py"])
def test_a_strategy_from_outside_is_short(name):
    assert len([line for line in (EXAMPLES / name).read_text().splitlines() if line.strip()]) <= 40
