"""KV-cache strategies for a patched Hugging Face Transformers. See `build`, `Runner` and `STRATEGIES`."""

from .build import STRATEGIES, build
from .requests import Request, Result
from .runner import Runner

__all__ = ["STRATEGIES", "Request", "Result", "Runner", "build"]
