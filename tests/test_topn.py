"""Top-N attention: the reference against its definition and against exact attention, Triton against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import Shape, assert_close, build, shapes

from kv_strategies.kernels import reference
from kv_strategies.kernels.blocks import topn, triton_topn


def run(implementation, case, **options):
    tally = topn.new_tally(case.query.device)
    decodes = case.plan.num_decodes
    both = {**case.options, **options}
    if both["sink_query"] is not None:
        both["sink_query"] = both["sink_query"][:decodes]
    return implementation(case.query[:decodes], case.layer, case.plan, tally, **both), tally


@settings(max_examples=60, deadline=None)
@given(shape=shapes())
def test_all_tokens_give_exact_attention(shape):
    case = build(shape)
    exact = reference.attention(case.query, case.layer, case.plan, **case.options)[: case.plan.num_decodes]
    for options in ({"top_n": 1000}, {"top_n": 1000, "renormalise": True}, {"mass": 1.0}):
        out, tally = run(topn.reference, case, **options)
        assert_close(out, exact)
        assert tally[3] < 1e-5


@settings(max_examples=60, deadline=None)
@given(top_n=st.integers(1, 40), mass=st.sampled_from([0.0, 0.3, 0.9, 0.999]), seed=st.integers(0, 999))
def test_the_error_is_bounded_by_the_mass_dropped(top_n, mass, seed):
    case = build(Shape(row_lens=(37,), group=2, seed=seed))
    exact = reference.attention(case.query, case.layer, case.plan, **case.options)
    options = {"mass": mass} if mass else {"top_n": top_n}
    out, tally = run(topn.reference, case, **options)
    reads, kept, dropped, worst = tally.tolist()
    assert reads == 4 and dropped <= 4 * worst + 1e-6
    v = reference.gather(case.layer.v, None, case.plan.block_tables[0], torch.arange(37))
    assert (out - exact).norm(dim=-1).max() <= worst * v.norm(dim=-1).max() + 1e-5
    assert worst <= 1 - mass + 1e-6
    if not mass:
        assert kept == 4 * min(top_n, 37)


def test_mass_keeps_no_token_too_many():
    case = build(Shape(row_lens=(4,), num_kv_heads=1, dim=8))
    weights = torch.tensor([0.1, 0.5, 0.15, 0.25])
    case.layer.k[case.plan.block_tables[0, 0].long(), 0, :4] = weights.log()[:, None] * torch.eye(8)[0]
    case.query[:] = torch.eye(8)[0]
    for mass, kept in ((0.2, 1), (0.49, 1), (0.6, 2), (0.76, 3), (0.95, 4)):
        _, tally = run(topn.reference, case, mass=mass, scaling=1.0)
        assert tally[1] == kept, mass


def test_of_equal_weights_the_earlier_goes_first(device):
    case = build(Shape(row_lens=(20,), num_kv_heads=1, dim=8), device)
    case.query[:] = 0
    for implementation in (topn.reference, triton_topn.topn_attention):
        out, tally = run(implementation, case, top_n=3)
        v = reference.gather(case.layer.v, None, case.plan.block_tables[0], torch.arange(3, device=device))
        assert_close(out[0, 0], v[0].sum(0) / 20)
        _, tally = run(implementation, case, mass=0.501)
        assert tally[1] == 11


SMALL = triton_topn.Tuning(split=32, tile=16, span=4, chunk=64, rows=16)  # so that little is already much
CASES = {
    "one token": Shape(row_lens=(1,), block_size=1),
    "many splits and chunks": Shape((1, 1, 1), (300, 16, 17), dim=20, block_size=3, num_kv_heads=1),
    "three heads a group": Shape((1, 1), (33, 50), group=3, dim=8, dtype=torch.float16, num_kv_heads=1),
    "a prompt beside": Shape((1, 4), (20, 9), block_size=17),
    "window, sinks": Shape((1, 1, 1), (70, 4, 12), group=2, window=9, sinks=4, sink_query=True, num_kv_heads=1),
    "int8": Shape((1, 1), (45, 8), codes="int8", dtype=torch.float16),
    "int4": Shape((1, 1), (45, 8), codes="int4", dtype=torch.float16, window=20, sinks=3, sink_query=True),
}


@pytest.mark.parametrize("options", [{"top_n": 5}, {"top_n": 20, "renormalise": True}, {"mass": 0.9}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_topn(device, name, options):
    case = build(CASES[name], device)
    out, tally = run(triton_topn.topn_attention, case, tuned=SMALL, **options)
    expected, wanted = run(topn.reference, case, **options)
    assert_close(out, expected)
    torch.testing.assert_close(tally, wanted, atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes().filter(lambda shape: 1 in shape.query_lens),
    options=st.sampled_from([{"top_n": n} for n in (1, 2, 3, 7, 16, 40)] + [{"mass": 0.303}, {"mass": 0.907}]),
    num_keys=st.sampled_from([None, None, 1, 2, 5]),
    tuned=st.sampled_from([SMALL, replace(SMALL, span=1, chunk=128), replace(SMALL, span=32, chunk=16), None]),
)
def test_triton_chooses_as_the_reference_does(shape, options, num_keys, tuned):
    """Also among tokens that weigh the same, of which there are many where a row has but a few keys."""
    # The interpreter gets neither products of bfloat16 nor fp8 right.
    shape = replace(shape, dtype=torch.float16 if shape.dtype == torch.bfloat16 else shape.dtype)
    shape = replace(shape, codes=shape.codes and "int8")
    case = build(shape, "cuda" if torch.cuda.is_available() else "cpu")
    if num_keys:
        repeat_keys(case, num_keys)
    out, tally = run(triton_topn.topn_attention, case, tuned=tuned, **options)
    expected, wanted = run(topn.reference, case, **options)
    assert_close(out, expected)
    torch.testing.assert_close(tally, wanted, atol=1e-3, rtol=1e-3)
    assert tally[1] == wanted[1]


def repeat_keys(case, num_keys: int) -> None:
    """Give every token of a row the key of one of its first few. Small whole numbers: their products are exact in
    whatever order a processor adds, so that equal keys weigh the same wherever they stand.
    """
    bs = case.layer.block_size
    numbers = [case.query, case.options["sink_query"], case.layer.k if case.layer.k_scale is None else None]
    for tensor in (tensor for tensor in numbers if tensor is not None):
        tensor.mul_(2).round_()
    for table, num_tokens in zip(case.plan.block_tables.long(), case.plan.row_lens, strict=True):
        index = torch.arange(num_tokens, device=table.device)
        source = index * 7 % 11 % min(num_keys, num_tokens)
        for plane in (case.layer.k, case.layer.k_scale):
            if plane is not None:
                plane[table[index // bs], :, index % bs] = plane[table[source // bs], :, source % bs]


def test_scores_of_minus_infinity_and_signed_zero_are_in_order(device):
    case = build(Shape(row_lens=(24,), num_kv_heads=1, dim=8), device)
    index = torch.arange(24, device=device)
    keys = case.layer.k[case.plan.block_tables[0].long()[index // 16], 0, index % 16]
    keys[:] = 0
    keys[::3, 0], keys[1::3], keys[20, 0] = float("-inf"), -0.0, 1
    case.layer.k[case.plan.block_tables[0].long()[index // 16], 0, index % 16] = keys
    case.query[:] = torch.eye(8, device=device)[0] * 20
    for options in ({"top_n": 1}, {"top_n": 4}, {"top_n": 20}, {"mass": 0.9999}):
        out, tally = run(triton_topn.topn_attention, case, tuned=SMALL, scaling=0.05, **options)
        expected, wanted = run(topn.reference, case, scaling=0.05, **options)
        assert_close(out, expected)
        torch.testing.assert_close(tally, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["a prompt beside", "window, sinks", "int8"])
def test_the_reference_works_where_its_query_is(name, device):
    case = build(CASES[name], device)
    expected, wanted = run(topn.reference, case, mass=0.9)
    with torch.device("meta"):  # where a tensor goes that is made without saying where
        out, tally = run(topn.reference, case, mass=0.9)
    assert torch.equal(out, expected) and torch.equal(tally, wanted)


def test_a_padding_row_gives_zeros_and_is_not_counted(device):
    case = build(Shape((1, 1), (20, 1)), device)
    case.plan.context_lens[1] = 0
    for implementation in (topn.reference, triton_topn.topn_attention):
        out, tally = run(implementation, case, top_n=3)
        assert (out[1] == 0).all() and tally[0] == 2
