"""Code that calls `model.generate()` by itself, with the caches of a strategy: a pipeline, a trainer, a harness.

    with strategy.installed():
        pipeline("text-generation", model=model, tokenizer=tokenizer)("One, two,")

Inside, `model.generate` is a door before the method: a call that brings no cache and asks for no other kind gets a new
one, which knows the prompt. The door belongs to the one model, and is seen by all threads; where several strategies are
installed on it, the newest one serves. Calls that have begun keep the cache they got.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .step.upstream import with_cache

if TYPE_CHECKING:
    from .strategy import Strategy

_LOCK = threading.Lock()
_CACHES = ("cache", "past_key_values")  # what generate() calls one, in any release


@contextmanager
def installed(strategy: Strategy, salt: str = "") -> Iterator[Strategy]:
    """See `Strategy.installed`."""
    model, entry = strategy.model, (strategy, salt)
    with _LOCK:
        before = vars(model).get("generate")
        door = before if isinstance(before, _Door) else _Door(model.generate, before)
        door.entries.append(entry)
        model.generate = door
    try:
        yield strategy
    finally:
        with _LOCK:
            newest = next(i for i in reversed(range(len(door.entries))) if door.entries[i] is entry)
            del door.entries[newest]
            if not door.entries and vars(model).get("generate") is door:
                if door.before is None:
                    del model.generate
                else:
                    model.generate = door.before


class _Door:
    """Stands for `model.generate`."""

    def __init__(self, generate: Callable, before: Callable | None):
        functools.update_wrapper(self, generate)  # whoever looks at its signature finds it
        self.generate, self.before = generate, before
        self.entries: list[tuple[Strategy, str]] = []  # the newest last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entry = next(iter(self.entries[-1:]), None)
        if entry is None or not _wants_cache(entry[0].model, args, kwargs):
            return self.generate(*args, **kwargs)
        strategy, salt = entry
        cache = strategy.cache(*_prompt(strategy.model, args, kwargs), salt)
        said = {name: value for name, value in kwargs.items() if name not in _CACHES}  # None, where it is said at all
        return self.generate(*args, **said, **with_cache(cache))


def _wants_cache(model, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate()` leaves it to the model which cache it gets."""
    if any(kwargs.get(name) is not None for name in _CACHES):
        return False
    use_cache, kind = (_option(model, args, kwargs, name) for name in ("use_cache", "cache_implementation"))
    return use_cache is not False and kind is None


def _prompt(model, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Token ids and mask of a call; None where it does not show them, or leaves it to upstream what is padding."""
    ids = args[0] if args else next((kwargs[name] for name in ("inputs", "input_ids") if name in kwargs), None)
    mask = kwargs.get("attention_mask")
    if not torch.is_tensor(ids) or ids.dim() != 2 or not ids.shape[1] or kwargs.get("inputs_embeds") is not None:
        return None, None
    pad = _option(model, args, kwargs, "pad_token_id")
    if mask is None and pad is not None and (ids == pad).any():
        return None, None
    return ids, mask


def _option(model, args: tuple, kwargs: dict[str, Any], name: str) -> Any:
    """What a call says, or its generation config, or the model's."""
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    said = [kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None)]
    return next((value for value in said if value is not None), None)
