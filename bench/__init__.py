"""Compares every KV-cache strategy with the native caches: memory, speed, correctness. `python -m bench --help`."""

import os

#: The cores this process may use, as they are before torch is imported: where the environment has OpenMP bind threads,
#: it binds this one to the first of them, and a case would inherit that.
CORES = os.sched_getaffinity(0)
