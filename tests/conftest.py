"""Where the tests run: Triton on a GPU, or in its interpreter where there is none."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# The same examples on every run of CI; others on every run elsewhere, which is where new failures are to be found.
hypothesis.settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

# A shell that starts tests in the background has them ignore Ctrl-C, and some are about what it does.
signal.signal(signal.SIGINT, signal.default_int_handler)

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: before any test module


def has_browser() -> bool:
    """What a person's machine may lack. In CI it has to be there."""
    from bench.report.browse import NAMES

    found = all(map(importlib.util.find_spec, ("playwright", "vl_convert"))) and any(map(shutil.which, NAMES))
    return found or bool(os.environ.get("CI"))


def has_tensorflow() -> bool:
    return bool(importlib.util.find_spec("tensorflow"))  # `.ci/run` installs it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = {"gpu": ON_GPU, "browser": has_browser(), "tensorflow": has_tensorflow()}
    lacking = {name for name, has in here.items() if not has}
    deselected = [item for item in items if any(map(item.get_closest_marker, lacking))]
    if deselected:
        items[:] = [item for item in items if item not in deselected]
        config.hook.pytest_deselected(items=deselected)


def pytest_report_header() -> list[str]:
    said = ["device: CPU; tests marked gpu are deselected, Triton kernels run in its interpreter"]
    if ON_GPU:
        said = [f"device: {torch.cuda.get_device_name()}"]
    if not has_browser():
        said.append("no Chromium, playwright or vl-convert-python: tests marked browser are deselected")
    if not has_tensorflow():
        said.append("no tensorflow (an extra of that name): tests marked tensorflow are deselected")
    return said


@pytest.fixture(autouse=True)
def grad_mode() -> Iterator[None]:
    """What is interrupted in the middle of `torch.no_grad` or `inference_mode` leaves later tests without gradients."""
    yield
    torch.set_grad_enabled(True)
    if torch.is_inference_mode_enabled():
        gc.collect()  # the guard of who was interrupted restores what was before when it goes


@pytest.fixture(autouse=True)
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does is tested on a CPU: offload streams through its buffers, but for tests marked in_place."""
    if not request.node.get_closest_marker("in_place"):
        monkeypatch.setattr("kv_strategies.offload.computes_on_host", lambda device: False)


@pytest.fixture(autouse=True)
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners are warmed up where a test says so, and not by themselves on a GPU: tests make many."""
    from kv_strategies import Runner

    monkeypatch.setitem(Runner.__init__.__kwdefaults__, "warm_up", False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")
