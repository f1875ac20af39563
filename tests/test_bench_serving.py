"""Requests that arrive by themselves: the driver, and what the workloads say of a run whose moments are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_bench import GPU, line, measured

from bench.case import Bench, Case
from bench.report import page as pages
from bench.serving import Arrival, lognormal, percentiles, poisson, serve, waits
from bench.systems import Capacity, open_system
from bench.workload import in_words


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return str(folder)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=300), st.sampled_from([50, 90, 99]))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values, percent):
    found = percentiles(values)[f"p{percent}"]
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100
    assert sum(value < found for value in values) < len(values) * percent / 100


def test_arrivals_have_their_rate_and_lengths_their_bounds():
    moments = poisson(4000, 8.0, seed=1)
    assert (
        moments == sorted(moments)
        and moments == poisson(4000, 8.0, seed=1)
        and moments[-1] / 500 == pytest.approx(1, 0.1)
    )
    assert poisson(3, math.inf, seed=1) == [0.0] * 3
    lengths = lognormal(4000, 6.6, 0.9, 32, 6000, seed=1)
    assert min(lengths) >= 32 and max(lengths) <= 6000
    assert sorted(lengths)[2000] == pytest.approx(math.exp(6.6), rel=0.1)


@pytest.mark.parametrize("name", ["paged", "generate_batch"])
def test_every_request_gets_all_its_tokens_and_none_before_it_was_due(name, model):
    bench = Bench(Case("open loop", name, model, "float32", "cpu", {}), None, say=lambda text: None)
    arrivals = [Arrival(0.05 * i, prompt, 2 + i) for i, prompt in enumerate(bench.prompts([20, 7, 30, 12], seed=1))]
    system = open_system(name, bench.model, Capacity([[40] * 4]))
    moments = serve(system, arrivals)
    assert [len(row) for row in moments] == [2, 3, 4, 5]
    for arrival, row in zip(arrivals, moments, strict=True):
        assert arrival.at < row[0] and row == sorted(row)
    found = waits(arrivals, moments)
    assert found["ttft"]["p99"] == max(row[0] - arrival.at for arrival, row in zip(arrivals, moments, strict=True))


SMALL = {"requests": 3, "slots": 2, "chunk": 64, "prompts": (3.0, 0.5, 8, 40), "answers": (1.0, 0.3, 2, 5)}
SMALL |= {"options": {"target_itl": 0.009}}
POINTS = {"points": [["paged", 2, 24], ["no such system", 2, 24]], "new_tokens": 4, "repeats": 1, "chunk": 64}


@pytest.mark.parametrize(
    ("workload", "params", "row"),
    [
        ("open loop", SMALL | {"rates": [50]}, "| paged, in steps of 9 ms, 50 requests/s: ITL p90 |"),
        ("first minute", SMALL, "| paged, in steps of 9 ms: from a start to ready |"),
    ],
)
def test_serving_is_measured_with_the_options_of_the_case(workload, params, row, model):
    found = measured(model, workload, "paged, in steps of 9 ms", params, suite="limit")
    assert row in pages.render([found], "title")
    failed = found | {"status": "failed", "error": "no such system"}
    failed.pop("result")
    page = pages.render([failed], "title")
    assert f"| {workload}, paged, in steps of 9 ms |" in page and "no such system | failed |" in page


def test_a_part_that_fails_is_a_row(model):
    found = measured(model, "from outside", "paged", POINTS, suite="limit")
    page = pages.render([found], "title")
    assert "| failed |" in page and "not run" not in page
    assert "no such system" in in_words(found)


def test_a_batch_is_run_twice_in_a_process(model):
    found = measured(model, "first minute", "paged, 3 requests", {"batches": [[[20, 7, 30], 4, 3 * 48]]}, suite="limit")
    (batch,) = found["result"]["batches"]
    assert batch["requests"] == 3 and batch["first"] > 0 and batch["again"] > 0
    assert "| `Runner`, 3 requests, again: tokens/s |" in pages.render([found], "title")


def test_what_must_be_reached_stands_beside_a_gpus_figures():
    def on_gpu(workload, result, model, **params):
        about = {"about": GPU, "suite": "limit", "model": model, "dtype": "bfloat16"}
        return line(workload, "paged", result, **about, params=params)

    waited = {name: {"p50": 0.04, "p90": 0.09, "p99": 0.2} for name in ("ttft", "itl")}
    row = {"rate": 12, "tokens_per_second": 9.0} | waited
    point = {"system": "int8", "batch": 32, "context": 8192, "first": 7.0, "step": 0.011}
    start = {"load": 2.0, "ready": 5.0, "all": 36.0} | waited
    found = [
        on_gpu("open loop", {"rows": [row]}, "llama-3.1-8b-random"),
        on_gpu("from outside", {"points": [point]}, "llama-3.1-8b-random"),
        on_gpu("first minute", {"batches": [{"requests": 64, "first": 3000.0, "again": 4100.0}]}, "llama-2-7b-random"),
        on_gpu("first minute", start, "llama-3.1-8b-random", requests=200),
    ]
    page = pages.render(found, "title")
    assert "| paged, 12 requests/s: TTFT p90 | at most 95.0 ms | 90.0 ms | reached | 108 ms |" in page
    assert "| int8, 32 x 8192: TTFT | at most 6500 ms | 7000 ms | missed by 7.7% | fp8 6588 ms |" in page
    assert "| int8, 32 x 8192: ms a token | at most 12.00 ms | 11.00 ms | reached | fp8 13.99 ms |" in page
    assert "| `Runner`, 64 requests, first time: tokens/s | at least 3700 | 3000 | missed by 18.9% |" in page
    assert "| paged, `warm_up=False`: the first 200 requests | at most 12.0 s | 36.0 s | missed by 200.0% |" in page
