"""Where the tests run: Triton on a GPU, or in its interpreter where there is none."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# The same examples on every run of CI; others on every run elsewhere, which is where new failures are to be found.
hypothesis.settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: before any test module


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ON_GPU:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)


def pytest_report_header() -> str:
    if ON_GPU:
        return f"device: {torch.cuda.get_device_name()}"
    return "device: CPU; tests marked gpu are deselected, Triton kernels run in its interpreter"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")
