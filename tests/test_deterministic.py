"""`deterministic=True`: a row's bits are its own, in each kernel and through a whole run."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from common import VOCAB, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import Shape, assert_close
from test_kernels import build as build_case

from kv_strategies import Request, Runner, build
from kv_strategies.kernels import reference
from kv_strategies.kernels.blocks import invariant as invariant_blocks
from kv_strategies.kernels.blocks import triton_invariant
from kv_strategies.kernels.linear import Norm, Rotary, plain
from kv_strategies.kernels.linear import invariant as invariant_linear
from kv_strategies.kernels.linear import triton_invariant as triton_linear
from kv_strategies.step.upstream import with_cache

DTYPES = [torch.float32, torch.bfloat16]


# --- products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(33, 47), (96, 64), (192, 576)])
@torch.no_grad()
def test_a_row_of_a_product_is_its_own(dtype, sizes, device):
    """Alone, among others, in another place among them: the same bits; and what is meant, to rounding."""
    n, k = sizes
    torch.manual_seed(0)
    k -= k % 8  # as the copy engine and tensor cores want it
    x = torch.randn(700, k, device=device, dtype=dtype)
    weight = torch.randn(2 * n, k, device=device, dtype=dtype) / k**0.5
    bias = torch.randn(2 * n, device=device, dtype=dtype)
    norm = Norm(torch.rand(k, device=device, dtype=dtype) + 0.5, 1e-5)
    residual = torch.randn(700, 2 * n, device=device, dtype=dtype)

    def products(rows: slice) -> list[torch.Tensor]:
        return [
            invariant_linear.linear(x[rows], weight),
            invariant_linear.linear(x[rows], weight, bias, norm=norm),
            invariant_linear.linear(x[rows], weight, bias, norm=norm, gated=True),
            invariant_linear.linear(x[rows], weight, residual=residual[rows].clone()),
        ]

    whole = products(slice(None))
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(whole[0], plain.reference(x, weight), **tolerance)
    torch.testing.assert_close(whole[2], plain.reference(x, weight, bias, norm=norm, gated=True), **tolerance)
    torch.testing.assert_close(whole[3], plain.reference(x, weight, residual=residual.clone()), **tolerance)
    for begin, end in ((0, 1), (5, 6), (0, 3), (1, 64), (7, 72), (3, 303), (1, 700)):
        for part, expected in zip(products(slice(begin, end)), whole, strict=True):
            assert torch.equal(part, expected[begin:end]), (begin, end)


@torch.no_grad()
def test_rotary_of_a_row_is_its_own():
    x, weight = torch.randn(37, 24), torch.randn(60, 24)
    cos, sin = torch.randn(37, 20), torch.randn(37, 20)
    whole = invariant_linear.linear(x, weight, rotary=Rotary(cos, sin, 2))
    for row in range(37):
        rotary = Rotary(cos[row : row + 1], sin[row : row + 1], 2)
        assert torch.equal(invariant_linear.linear(x[row : row + 1], weight, rotary=rotary), whole[row : row + 1])


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"gated": True, "bias": True}, {"residual": True}])
@torch.no_grad()
def test_the_triton_product_is_what_is_meant(options, device):
    torch.manual_seed(0)
    x, weight = torch.randn(21, 40, device=device), torch.randn(36, 40, device=device)
    bias = torch.randn(36, device=device) if options.get("bias") else None
    residual = torch.randn(21, 36, device=device) if options.get("residual") else None
    tile = triton_linear.Tile(16, 16, 16, num_stages=1, num_warps=4)
    given = {"gated": options.get("gated", False)}
    out = triton_linear.linear(
        x, weight, bias, **given, residual=None if residual is None else residual.clone(), tile=tile
    )
    expected = plain.reference(x, weight, bias, **given, residual=residual)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@torch.no_grad()
def test_all_tiles_add_alike():
    """The one thing that nobody promises: that tensor cores add a row the same way in every shape of a tile. Of numbers
    of all sizes, so that it shows what an adder drops."""
    torch.manual_seed(0)
    for n, k in ((512, 4096), (384, 11008), (320, 1000), (128, 96), (96, 40)):
        x = torch.randn(1500, k, device="cuda") * torch.exp2(torch.randint(-9, 9, (1500, k), device="cuda"))
        x = x.bfloat16()
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        for gated, residual in ((False, False), (True, False), (False, True)):
            added = torch.randn(1500, n, device="cuda", dtype=torch.bfloat16) if residual else None
            tiles = {
                triton_linear.tuning(rows, columns, x.dtype, gated, copies)
                for rows in (1, 17, 65, 513)
                for columns in (128, 4096, 16384)
                for copies in (False, True)
            }
            outs = [
                triton_linear.linear(x, weight, gated=gated, residual=added.clone() if residual else None, tile=tile)
                for tile in tiles
            ]
            assert len(tiles) >= 3
            assert all(torch.equal(outs[0], out) for out in outs)


# --- attention


@st.composite
def rows(draw) -> Shape:
    lens = draw(st.lists(st.integers(1, 600), min_size=1, max_size=3))
    return Shape(
        query_lens=tuple(draw(st.integers(1, n)) for n in lens),
        row_lens=tuple(lens),
        num_kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 3])),
        dim=draw(st.sampled_from([16, 20])),
        codes=draw(st.sampled_from([None, "int8", "fp8", "int4", "k8v4"])),
        seed=draw(st.integers(0, 99)),
    )


def of_queries(case, row: int, begin: int, end: int):
    """The plan and the queries of some of a row's queries alone."""
    starts = case.plan.cu_seqlens_q.tolist()
    context_len = case.plan.row_lens[row] - (case.plan.query_lens[row] - end)
    plan = replace(
        case.plan,
        cu_seqlens_q=torch.tensor([0, end - begin], dtype=torch.int32, device=case.plan.device),
        context_lens=torch.tensor([context_len], dtype=torch.int32, device=case.plan.device),
        block_tables=case.plan.block_tables[row : row + 1],
        query_lens=[end - begin],
        row_lens=[context_len],
        num_decodes=int(end - begin == 1),
        scratch={},
    )
    return plan, case.query[starts[row] + begin : starts[row] + end]


@settings(max_examples=40, deadline=None)
@given(rows(), st.data())
def test_a_query_is_its_own(shape, data):
    check_queries(shape, data.draw, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codes", [None, "int8", "fp8", "int4"])
@pytest.mark.parametrize("group", [1, 4])
def test_a_query_is_its_own_on_a_gpu(dtype, codes, group):
    rng = random.Random(1)
    for seed in range(6):
        lens = [rng.choice([1, 17, 256, 257, 1000, 3000]) for _ in range(4)]
        shape = Shape(
            tuple(1 if rng.random() < 0.3 else rng.randint(1, n) for n in lens), tuple(lens), 2, group, 128,
            dtype=dtype, codes=codes, head_major=False, seed=seed,
        )  # fmt: skip
        check_queries(shape, lambda strategy: rng.randint(strategy[0], strategy[1]), torch.device("cuda"))


def check_queries(shape: Shape, draw, device: torch.device) -> None:
    case = build_case(shape, device)
    scaling = case.options["scaling"]
    whole = invariant_blocks.attention(case.query, case.layer, case.plan, scaling=scaling)
    assert_close(whole, reference.attention(case.query, case.layer, case.plan, scaling=scaling))
    starts = case.plan.cu_seqlens_q.tolist()
    for row, query_len in enumerate(shape.query_lens):
        bounds = (0, query_len - 1) if device.type == "cuda" else st.integers(0, query_len - 1)
        begin = draw(bounds)
        for end in {begin + 1, query_len}:
            plan, query = of_queries(case, row, begin, end)
            out = invariant_blocks.attention(query, case.layer, plan, scaling=scaling)
            assert torch.equal(out, whole[starts[row] + begin : starts[row] + end]), (row, begin, end)


TINY = triton_invariant.Sizes(rows=16, tile=16, segment=32, num_warps=4, num_stages=1)


@pytest.mark.parametrize("codes", [None, "int8"])
@pytest.mark.parametrize("group", [1, 3])
def test_the_triton_kernel_split_or_not(group, codes, device):
    """One program for all segments of a row, and one for each: the same bits, and what is meant."""
    case = build_case(Shape((1, 9, 20), (37, 9, 70), 2, group, 20, codes=codes), device)
    outs = []
    for is_split in (False, True):
        out = torch.full_like(case.query, 7.0)
        triton_invariant.attend(
            case.query, case.layer, case.plan, out, 0, 3, scaling=0.2, sizes=TINY, is_split=is_split
        )
        outs.append(out)
    assert torch.equal(*outs)
    assert_close(outs[0], reference.attention(case.query, case.layer, case.plan, scaling=0.2))
    plan, query = of_queries(case, 2, 19, 20)
    out = torch.empty_like(query)
    triton_invariant.attend(query, case.layer, plan, out, 0, 1, scaling=0.2, sizes=TINY, is_split=True)
    if device.type == "cuda":
        assert torch.equal(out, outs[0][-1:])
    else:  # products of the interpreter are numpy's, where a row's place matters
        assert_close(out, outs[0][-1:])


# --- whole runs


def logits_of(runner: Runner, requests: list[Request]) -> dict[tuple[int, int], torch.Tensor]:
    """(number of the request, number of the token) -> the logits [V] that it was drawn from."""
    draw, seen = runner._draw, {}

    def look(sequences, logits, drawn):
        for seq, row in zip(sequences, logits, strict=False):  # a graph may have rows of padding
            seen[seq.request.request_id, seq.num_issued] = row.clone()
        return draw(sequences, logits, drawn)

    runner._draw = look
    numbered = [replace(request, request_id=number) for number, request in enumerate(requests)]
    results = runner.generate(numbered)
    assert all(result.finish_reason == "length" for result in results)
    return seen


NAMES = ["paged", "prefix", "contiguous", "prefix+offload", "prefix+int8", "offload+fp8", "prefix+int4"]


def requests_of(rng: random.Random, count: int) -> list[Request]:
    shared = [rng.randrange(3, VOCAB) for _ in range(40)]
    made = []
    for number in range(count):
        start = shared[: rng.choice([0, 0, 16, 33, 40])]
        prompt = start + [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 30))]
        sampled = {"temperature": 0.8, "seed": number} if number % 3 == 0 else {}
        made.append(Request(prompt, max_new_tokens=rng.randint(2, 24), **sampled))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_beside_a_request_changes_a_bit(name, dtype, device):
    """Alone, together, in chunks of any size, after a hit, preempted: the logits of each token are the same bits."""
    model = tiny_llama().to(device, dtype)
    requests = requests_of(random.Random(3), 10)
    expected, num_hits, num_preemptions = None, 0, 0
    for max_num_seqs, chunk, num_blocks in ((1, 512, 200), (6, 512, 200), (8, 9, 200), (6, 33, 26)):
        sizes = {"num_blocks": num_blocks, "block_size": 4}
        if name == "contiguous":
            sizes = {"num_blocks": 8, "max_length": 128}
        strategy = build(name, model, **sizes, deterministic=True)
        runner = Runner(model, strategy, max_num_seqs=max_num_seqs, max_batch_tokens=chunk)
        for _ in range(2):  # the second time everything is a hit, where there are any
            logits = logits_of(runner, requests)
            expected = expected or logits
            assert logits.keys() == expected.keys()
            assert all(torch.equal(logits[key], expected[key]) for key in expected)
        num_hits += strategy.stats()["hit_tokens"]
        num_preemptions += runner.num_preemptions
    assert (num_hits > 0) == ("prefix" in name)
    assert num_preemptions or name == "contiguous"


@torch.no_grad()
def test_generate_computes_the_same_keys(device):
    """What `generate()` publishes is what the runner would have computed: its hits change no bit either."""
    model = tiny_llama().to(device)
    prompts = [[5, *range(7, 43), number] for number in range(3, 6)]
    alone = logits_of(Runner(model, build("paged", model, num_blocks=64, block_size=4, deterministic=True)),
                      [Request(prompt, max_new_tokens=4) for prompt in prompts])  # fmt: skip
    strategy = build("prefix", model, num_blocks=64, block_size=4, deterministic=True)
    ids = torch.tensor([prompts[0]] * 2, device=device)
    model.generate(ids, **with_cache(strategy.cache(ids)), max_new_tokens=5, do_sample=False)
    runner = Runner(model, strategy)
    after = logits_of(runner, [Request(prompt, max_new_tokens=4) for prompt in prompts])
    assert strategy.stats()["hit_tokens"] >= 3 * 36
    assert all(torch.equal(after[key], alone[key]) for key in alone)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("window", {}, "window"),
        ("offload", {"top_n": 4}, "offload"),
        ("offload", {"mass": 0.9}, "offload"),
        ("raw4", {}, "kernels of its own"),
        ("paged", {"kernels": "reference"}, "kernels of its own"),
        ("baseline", {}, "upstream"),
        ("paged", {"deterministic": "yes"}, "true or false"),
    ],
)
def test_what_cannot_be_deterministic_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        build(name, tiny_llama(), num_blocks=8, **{"deterministic": True} | options)


def test_a_model_with_hooks_is_refused(device):
    model = tiny_llama().to(device)
    strategy = build("paged", model, num_blocks=32, deterministic=True)
    runner = Runner(model, strategy)
    before = runner.generate([Request([5, 6, 7], max_new_tokens=3)])
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="hooks, adapters"):
        build("paged", model, num_blocks=32, deterministic=True)
    with pytest.raises(ValueError, match="hooks, adapters"):
        runner.generate([Request([5, 6, 7], max_new_tokens=3)])
    with pytest.raises(ValueError, match="hooks, adapters"):
        model.generate(torch.tensor([[5, 6]], device=device), **with_cache(strategy.cache()), max_new_tokens=2)
    hook.remove()
    assert runner.generate([Request([5, 6, 7], max_new_tokens=3)])[0].token_ids == before[0].token_ids
