"""Load: thousands of requests through a pool of a twentieth of what they would take together (`load.py`)."""

from __future__ import annotations

import os

import pytest
from load import Load

NUM_REQUESTS = int(os.environ.get("LOAD_REQUESTS", 10_000))


@pytest.mark.parametrize(
    ("name", "options"),
    [("paged", {}), ("prefix", {}), ("prefix+offload", {"resident": "kv", "host_bytes": 1 << 21})],
)
def test_many_requests_in_a_small_pool(name, options, record_property):
    told = Load(name, NUM_REQUESTS, **options).round()
    assert told["bytes grown"] < 32 << 20, "memory is flat"
    for what, count in told.items():
        record_property(what, count)
    print(f"\n{name}: {told}")
