"""The examples run as they stand, and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAID = {
    "generate.py": ["80 of 82 prompt tokens were there already\n   the native cache's tokens"],
    "stream.py": ["'The capital of France is' -> ' Paris", "first token after"],
    "saved_prefix.py": ["blocks saved", "after the restart: ", "tokens were there"],
    "offload.py": ["second visit: 1040 of 1080", "blocks brought back from lower tiers"],
    "codec_int4.py": ["bytes a token, by the reference kernels"],
    "retention_every_fourth.py": ["-1 -1 -1"],
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_example(name):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    for text in SAID[name]:
        assert text in run.stdout, run.stdout


@pytest.mark.parametrize("name", ["codec_int4.py", "retention_every_fourth.py"])
def test_a_strategy_from_outside_is_short(name):
    assert len([line for line in (EXAMPLES / name).read_text().splitlines() if line.strip()]) <= 40
