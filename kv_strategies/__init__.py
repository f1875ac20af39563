"""KV-cache strategies for a patched Hugging Face Transformers. See `build`, `Runner` and `STRATEGIES`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .registry import STRATEGIES, Preset, build, register
    from .runner import Runner
    from .step.requests import Request, Result

__all__ = ["STRATEGIES", "Preset", "Request", "Result", "Runner", "build", "register"]

_HOME = {
    "STRATEGIES": "registry",
    "Preset": "registry",
    "build": "registry",
    "register": "registry",
    "Request": "step.requests",
    "Result": "step.requests",
    "Runner": "runner",
}


def __getattr__(name: str) -> object:
    """Import on first use, so that `python -m kv_strategies.paged` starts without torch and transformers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
