"""Compares every KV-cache strategy with the native caches: memory, speed, correctness. `python -m bench --help`."""
