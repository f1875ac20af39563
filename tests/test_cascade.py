"""Cascade attention: what rows share is read once for all of them, and no result changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from common import VOCAB, baseline_tokens, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import Shape, assert_close
from test_kernels import build as build_case

from kv_strategies import Request, Runner, build, kernels
from kv_strategies.kernels import reference
from kv_strategies.kernels.blocks import cpu, gpu, triton_cascade, triton_decode, triton_prefill
from kv_strategies.step import plan
from kv_strategies.step.plan import Group, LayerStore, Plan

TINY = triton_cascade.Tuning(rows=16, tile=16, num_warps=4, num_stages=2, programs=12, split=16)
SHAPES = {
    "all rows": Shape((1,) * 5, (40, 33, 50, 34, 38), groups=((0, 5, 32),)),
    "one head a group, odd": Shape((1,) * 3, (22, 27, 25), dim=20, block_size=7, groups=((0, 3, 21),)),
    "three heads a group, two tiles": Shape((1,) * 8, (20,) * 8, group=3, num_kv_heads=1, groups=((1, 8, 16),)),
    "two groups in a tile": Shape((1,) * 6, (70, 68, 20, 33, 40, 34), group=2, groups=((0, 2, 64), (3, 6, 32))),
    "half a tile a group": Shape((1,) * 4, (9,) * 4, block_size=2, dtype=torch.float16, groups=((0, 2, 4), (2, 4, 6))),
    "short candidates": Shape((1, 1, 3, 5, 2), (39, 34, 37, 39, 9), groups=((0, 4, 32),)),
    "candidates of a tile and more": Shape((9, 18), (30, 40), group=2, num_kv_heads=1, groups=((0, 2, 16),)),
    "int8": Shape((1, 1, 4), (40, 35, 39), codes="int8", dtype=torch.float16, groups=((0, 3, 32),)),
    "int4": Shape((1, 1, 4), (40, 35, 39), codes="int4", dtype=torch.float16, groups=((0, 3, 32),)),
    "int4, groups in registers": Shape(
        (1,) * 5, (21, 58, 24, 70, 9), 1, 3, 64, 4, torch.float16, "int4", groups=((0, 2, 20), (2, 4, 12))
    ),
    "int8, groups in registers": Shape(
        (1,) * 5, (21, 58, 24, 70, 9), 1, 3, 64, 4, torch.float16, "int8", groups=((0, 2, 20), (2, 4, 12))
    ),
}


def check(shape: Shape, device: torch.device | str) -> None:
    case = build_case(shape, device)
    plain = replace(case.plan, row_groups=[], groups=None, shared_lens=None, scratch={})
    assert_close(
        gpu.attention(case.query, case.layer, case.plan, key=case.key, value=case.value, **case.options),
        reference.attention(case.query, case.layer, plain, **case.options),
    )


@pytest.fixture
def tiny(device, monkeypatch):
    monkeypatch.setattr(triton_cascade, "tuning", lambda *_: TINY)
    small_decode = triton_decode.Tuning(tile=16, num_warps=1, programs=6, least=16)
    monkeypatch.setattr(triton_decode, "tuning", lambda *_: small_decode)
    small_prefill = triton_prefill.Tuning(rows=16, tile=16, num_warps=4, num_stages=2, split=16, programs=8)
    monkeypatch.setattr(triton_prefill, "tuning", lambda *_: small_prefill)


@pytest.mark.parametrize("name", SHAPES)
def test_triton_cascade(device, tiny, name):
    check(SHAPES[name], device)


def test_shared_tokens_are_read_once(device, tiny):
    """Of what rows share only the first row's table is read: those of the others may say anything."""
    case = build_case(SHAPES["short candidates"], device)
    expected = reference.attention(case.query, case.layer, case.plan, **case.options)
    case.plan.block_tables[1:4, : 32 // 16] = 10**6
    assert_close(gpu.attention(case.query, case.layer, case.plan, **case.options), expected)


def test_no_cascade_under_a_window(device, tiny, monkeypatch):
    monkeypatch.setattr(gpu, "read_shared", None)
    check(replace(SHAPES["short candidates"], window=9, sinks=2), device)


def test_many_queries_read_for_themselves(device, tiny, monkeypatch):
    monkeypatch.setattr(triton_cascade, "MAX_QUERIES", 11)
    case = build_case(SHAPES["short candidates"], device)
    assert triton_cascade.read_shared(case.query, case.layer, case.plan, scaling=1.0) is not None  # 10 in the group
    monkeypatch.setattr(triton_cascade, "MAX_QUERIES", 9)
    assert triton_cascade.read_shared(case.query, case.layer, case.plan, scaling=1.0) is None
    check(SHAPES["short candidates"], device)


@st.composite
def grouped(draw) -> Shape:
    """Some stretches of rows share some of their blocks, as far as none of these tokens is new."""
    block_size = draw(st.sampled_from([1, 3, 16]))
    num_decodes = draw(st.integers(0, 5))
    query_lens = (1,) * num_decodes + tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    past_lens = [draw(st.integers(0, 60)) for _ in query_lens]
    groups, row = [], 0
    while row < len(query_lens):
        last = draw(st.integers(row + 1, len(query_lens)))
        blocks = draw(st.integers(0, min(past_lens[row:last]) // block_size))
        if blocks and last - row > 1:
            groups.append((row, last, blocks * block_size))
        row = last
    return Shape(
        query_lens=query_lens,
        row_lens=tuple(past + query for past, query in zip(past_lens, query_lens, strict=True)),
        groups=tuple(groups),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3])),
        block_size=block_size,
        codes=draw(st.sampled_from([None, None, "int8", "int4"])),
        window=draw(st.sampled_from([0, 0, 0, 20])),
        head_major=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=150, deadline=None)
@given(shape=grouped())
def test_groups_change_no_result_on_a_cpu(shape):
    case = build_case(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "MIN_RUN", 20)
        out = cpu.attention(case.query, case.layer, case.plan, **case.options)
    assert_close(out, reference.attention(case.query, case.layer, case.plan, **case.options))


@settings(max_examples=60, deadline=None)
@given(shape=grouped())
@pytest.mark.gpu
def test_groups_change_no_result(shape):
    check(shape, "cuda")


# a GPU: the sizes that matter, the tuned constants

HISTORY = 2048
SIZES = [(64, 16), (80, 1), (128, 64), (128, 16)]  # of a head, of a block
SWEEP = [
    *product(SIZES, [torch.float32, torch.bfloat16], [None]),
    *product([(128, 16)], [torch.float32, torch.bfloat16], ["int8", "fp8"]),
    ((96, 17), torch.float16, None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("size, dtype, codes", SWEEP)
def test_gpu_sweep(device, size, dtype, codes, group):
    dim, block_size = size
    short, long = 30 * block_size, HISTORY // block_size * block_size
    lens = [HISTORY + 8 + 7 * (row % 5) for row in range(40)]
    shape = Shape((1,) * 42, (900, *lens, 77), group=group, dim=dim, block_size=block_size, dtype=dtype, codes=codes)
    shape = replace(shape, groups=((1, 41, long),), head_major=False)
    check(shape, device)
    check(replace(shape, query_lens=(1, 1, *[8] * 39, 5), groups=((1, 20, short), (20, 41, long))), device)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
def test_gpu_graph_serves_other_groups(device, group):
    """Captured once with bounds, replayed for steps with other groups, fewer of them, and none."""
    num_rows, bound = 24, 4096
    shape = Shape((1,) * num_rows, (3000,) * num_rows, group=group, dim=128, dtype=torch.bfloat16, head_major=False)
    shape = replace(shape, groups=((0, num_rows, 2912),))
    case = build_case(shape, device)
    step_plan = case.plan
    bounded = replace(step_plan, row_lens=[bound] * num_rows, row_groups=[Group(0, num_rows, 0)], scratch={})

    def step(each: Plan) -> torch.Tensor:
        return kernels.attention(case.query, case.layer, each, **case.options)

    step(replace(bounded, scratch={}))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(bounded)
    for groups in ([(0, 24, 2912)], [(0, 3, 2912), (3, 11, 16), (20, 24, 1024)], [], [(22, 24, 64)]):
        step_plan.groups.zero_()
        step_plan.shared_lens.zero_()
        for index, (first, last, num_tokens) in enumerate(groups):
            step_plan.groups[index] = torch.tensor([first, last, num_tokens])
            step_plan.shared_lens[first:last] = num_tokens
        out.fill_(7.0)
        graph.replay()
        assert_close(out, reference.attention(case.query, case.layer, step_plan, **case.options))
    step_plan.context_lens[5] = 0  # a padding row
    graph.replay()
    assert (out[5] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_gpu_runner_with_groups(device, monkeypatch, cuda_graphs):
    """Users with a history each and candidates that come and go: tokens as from the native cache."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_llama(num_heads=4, num_kv_heads=2).to(device)
    histories = [[(7 * user + 3 * i + i // 5) % VOCAB for i in range(150)] for user in range(3)]
    requests = [
        Request([*histories[i // 4 % 3], *[i] * (i % 7 + 1)], max_new_tokens=4 + i % 9, n=1 + i % 2) for i in range(30)
    ]
    monkeypatch.setattr(plan, "MIN_TOKENS_SHARED", 4)
    monkeypatch.setattr(plan, "MIN_TOKENS_SPARED", 4)
    strategy = build("prefix", model, num_blocks=400, block_size=4)
    for history in histories:
        strategy.preload(history)
    runner = Runner(model, strategy, max_num_seqs=12, cuda_graphs=cuda_graphs)
    results = [result.token_ids for result in runner.generate(requests)]
    results += [result.token_ids for result in runner.generate([[1, 2, 3], [4, 5]])]
    assert results == baseline_tokens(model, requests) + baseline_tokens(model, [[1, 2, 3], [4, 5]])
    if cuda_graphs:
        assert {private > 0 for *_, private in runner._graphs._graphs} == {True, False}


def fan_out(device, num_rows: int = 128, history: int = 8192, heads: int = 32, kv_heads: int = 32, dim: int = 128):
    """Query, layer and plan of a decode step of candidates on one history, in the shape of Llama-2-7B."""
    num_blocks = history // 16 + num_rows
    slab = torch.randn(num_blocks, 2, kv_heads, 16, dim, dtype=torch.bfloat16, device=device)
    tables = torch.arange(history // 16, dtype=torch.int32).expand(num_rows, -1)
    own = torch.arange(history // 16, num_blocks, dtype=torch.int32)[:, None]
    lens = torch.full((num_rows,), history + 12, dtype=torch.int32, device=device)
    group = Group(0, num_rows, history)
    shared = Plan(
        cu_seqlens_q=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
        context_lens=lens,
        positions=lens.long() - 1,
        slot_mapping=torch.full((num_rows,), -1, device=device),
        block_tables=torch.cat((tables, own), 1).to(device),
        query_lens=[1] * num_rows,
        row_lens=lens.tolist(),
        num_decodes=num_rows,
        row_groups=[group],
        groups=torch.tensor([group] + [(0, 0, 0)] * (num_rows // 2 - 1), dtype=torch.int32, device=device),
        shared_lens=torch.full_like(lens, history),
    )
    query = torch.randn(num_rows, heads, dim, dtype=torch.bfloat16, device=device)
    return query, LayerStore(slab[:, 0], slab[:, 1]), shared


@pytest.mark.gpu
def test_gpu_fan_out(device):
    """128 candidates on a history of 8192, as large as it is meant for."""
    query, layer, shared = fan_out(device)
    apart = replace(shared, row_groups=[], scratch={})
    assert_close(*(kernels.attention(query, layer, each, scaling=128**-0.5) for each in (shared, apart)))
