"""Kernels that are compiled ahead, in threads: those that a warm-up launches, and nothing runs meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kv_strategies.kernels import triton_compile

ROOT = Path(__file__).parent.parent


def found(what: str, tmp_path: Path) -> dict:
    """What `launches.py` says, in a process where nothing is compiled and no kernel is interpreted."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "launches.py", what], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_what_is_compiled_ahead_is_what_a_warm_up_launches(tmp_path):
    """By what Triton would compile for, of every kernel; with fewer steps, and a layer each."""
    for name, said in found("keys", tmp_path).items():
        assert said["lacking"] == said["useless"] == [], name
        assert said["steps"][0] < said["steps"][1]
        assert {"rows_kernel", "linear_kernel", "store_kernel"} < set(said["kernels"])
        attention = {"choose_kernel"} if name == "offload" else {"decode_kernel", "prefill_kernel"}
        assert attention < set(said["kernels"])


def test_kernels_compile_in_threads_and_run_nothing(tmp_path):
    said = found("threads", tmp_path)
    assert said["launched"] == ["other"] and said["then"] == ["MainThread"] * 4
    assert sorted(said["compiled in"]) == ["ThreadPoolExecutor"] * 4 + ["other"]
    assert "wrong_kernel" in said["error"] or "as it was written" in said["error"]
    assert said["restored"] and said["restored then"] and said["from work"] == "from work"


def test_another_triton_compiles_at_the_first_launch(monkeypatch):
    assert triton_compile.can_compile_ahead()
    for name in ("triton.runtime._async_compile", "triton.runtime.jit"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, name, None)
            assert not triton_compile.can_compile_ahead()
    from triton.runtime import jit

    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *arguments, grid: None)
    assert not triton_compile.can_compile_ahead()


@pytest.mark.gpu
def test_a_runner_is_warmed_up_by_itself(tmp_path):
    said = found("warmed", tmp_path)
    assert said["ahead"] and said["behind"] == []
    assert said["done"] and said["graphs"][0] == said["graphs"][1] > 0
