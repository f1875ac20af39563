"""All workloads of ours, in the order of their tables and of the cases of a suite; imported with the package."""

# isort: off
from bench.suites import machine  # noqa: F401
from bench.suites.default import throughput, latency, concurrency, busy, tokens, sharing, pressure, pool  # noqa: F401
from bench.suites.strategies import prefix, chat, fan_out, window, offload, eight_bits, stream, long_generation  # noqa: F401
from bench.suites.evict import blocks, step, first_token as evict_first_token, crowd, endless  # noqa: F401
from bench.suites import cost, replay  # noqa: F401
from bench.suites.limit import attention, decode, first_token, long_context, profile, batching, deterministic  # noqa: F401
from bench.suites.serving import outside, open_loop, first_minute  # noqa: F401
from bench.suites import quality, parallel, tensorflow  # noqa: F401
