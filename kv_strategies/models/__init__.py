"""Models of Llama architecture, by one name: see `load.py`. What they read in tests and benches: `text.py`."""

from .load import load_model

__all__ = ["load_model"]
