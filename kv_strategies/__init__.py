"""KV-cache strategies for a patched Hugging Face Transformers. See `build`, `Runner` and `STRATEGIES`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.load import load_model
    from .paged import OutOfBlocks
    from .registry import STRATEGIES, Preset, build, register
    from .runner import Runner
    from .step.requests import Event, Request, Result
    from .strategy import Strategy

__all__ = [
    "STRATEGIES",
    "Event",
    "OutOfBlocks",
    "Preset",
    "Request",
    "Result",
    "Runner",
    "Strategy",
    "build",
    "load_model",
    "register",
]

_HOME = {
    "STRATEGIES": "registry",
    "Event": "step.requests",
    "OutOfBlocks": "paged",
    "Preset": "registry",
    "Request": "step.requests",
    "Result": "step.requests",
    "Runner": "runner",
    "Strategy": "strategy",
    "build": "registry",
    "load_model": "models.load",
    "register": "registry",
}


def __getattr__(name: str) -> object:
    """Import on first use, so that `python -m kv_strategies.paged` starts without torch and transformers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
