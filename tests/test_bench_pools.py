"""The same requests in pools of several sizes, and more and more of them at once."""

from __future__ import annotations

from test_bench import measured, rows_of, tiny  # noqa: F401

from bench.report import page as pages
from bench.suites.default.pool import AGAIN, DISK, HOST
from bench.workload import in_words


def test_a_pool_too_small_gives_the_same_tokens(tiny):  # noqa: F811
    points = [[1, AGAIN], [2, AGAIN], [0.5, AGAIN], [0.5, HOST], [0.5, DISK], [0.01, AGAIN]]
    params = {"lengths": [20, 30, 25], "new_tokens": 40, "points": points, "repeats": 1}
    found = measured(tiny, "pool", "paged", params)
    whole, double, again, host, disk, none = found["result"]["points"]
    assert double["kv_bytes"] == 2 * whole["kv_bytes"] == 4 * again["kv_bytes"]
    assert whole["preemptions"] == double["preemptions"] == 0 < min(p["preemptions"] for p in (again, host, disk))
    assert again["computed_again"] > 0 == whole["computed_again"]
    assert {point["identical"] for point in (whole, double, again, host, disk)} == {3}
    assert "error" in none and none["error"] in pages.render([found], "title")
    assert in_words(found).count("tokens/s") == 5


def test_more_at_once(tiny):  # noqa: F811
    params = {"lengths": [9, 20, 14, 30], "new_tokens": 6, "at_once": [1, 4]}
    found = measured(tiny, "concurrency", "paged", params)
    alone, all_of_them = found["result"]["points"]
    assert alone["ttft"]["p99"] > alone["ttft"]["p50"]  # who comes last waits for all others
    assert all_of_them["itl"].keys() == {"p50", "p90", "p99"}
    page = pages.render([found], "title")
    assert "4 requests of 9 to 30 tokens, 6 new each" in page and rows_of(page, "4") and in_words(found)
