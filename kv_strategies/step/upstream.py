"""What differs between the releases of Transformers that this package serves, and until when.

The package is written for the newest of them, where a cache is called `cache`; what is older is adapted here. The
releases are listed in patches/upstreams.txt.

| what | to 5.23 | from 5.24 | the old name there |
|---|---|---|---|
| keyword of the modules' forwards and of `create_causal_mask` | `past_key_values` | `cache` | warns, until 5.40 |
| keyword of `generate()` | `past_key_values` | `cache` | warns, until 6.0 |
| attribute of outputs | `past_key_values` | `cache` | warns, no end is announced |
| what `Cache.update` gets beyond the states | nothing | the forward's keywords | |

All of this module goes when the last release before 5.24 is no longer tested: callers then write `cache=`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaModel

#: What the installed release calls a cache.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def with_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword that hands a cache to `generate()`, to a module's forward or to `create_causal_mask`."""
    return {CACHE: cache}


def cache_of(output) -> Cache | None:
    """The cache that a forward or `generate()` returned with its output."""
    return getattr(output, CACHE)


def takes_cache(function: Callable) -> Callable:
    """For what upstream calls with a cache: `function` calls it `cache`, and gets it whatever the release calls it."""
    if CACHE == "cache":
        return function

    @wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if CACHE in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE)
        return function(*args, **kwargs)

    return renamed
