"""Values from users, checked and normalised once, where they enter."""

from __future__ import annotations

import math
import numbers
import os
import types
import typing
from pathlib import Path


def checked(option: str, value: object, hint: object) -> object:
    """A value as an annotation says: whole floats and numpy's numbers are numbers, and no number is true or false.
    Where both int and float are taken, a number stays what it is.

    Raises:
        ValueError: says what the option takes.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    own = int if isinstance(value, numbers.Integral) else float
    for kind in sorted(kinds, key=lambda kind: kind is not own):
        if kind is type(None) and value is None:
            return None
        if kind is int and is_number and (own is int or _as_float(value).is_integer()):
            return int(value)
        if kind is float and is_number and not math.isnan(_as_float(value)):
            return _as_float(value)
        if kind in (Path, os.PathLike) and isinstance(value, str | os.PathLike):
            return value
        if kind not in (int, float, type(None)) and (not isinstance(kind, type) or isinstance(value, kind)):
            return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    takes = " or ".join(names.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
    raise ValueError(f"{option} takes {takes}, got {value!r}")


def _as_float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value > 0 or -1)
