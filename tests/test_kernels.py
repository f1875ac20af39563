"""Every implementation of store and attention against the reference, and the reference against torch's attention."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from kv_strategies import kernels
from kv_strategies.kernels import reference
from kv_strategies.kernels.blocks import (
    cpu,
    gpu,
    library,
    triton_decode,
    triton_prefill,
    triton_store,
)
from kv_strategies.kernels.blocks.turned import turned
from kv_strategies.kernels.linear import Rotary, rotate_heads
from kv_strategies.step.plan import NULL_BLOCK, NULL_SLOT, Group, LayerStore, Plan

#: Of K and V.
CODES = {
    "int8": (torch.int8, torch.int8),
    "fp8": (torch.float8_e4m3fn, torch.float8_e4m3fn),
    "k8v4": (torch.int8, reference.HALF_BYTES),
    "int4": (reference.HALF_BYTES, reference.HALF_BYTES),
}


@dataclass(frozen=True)
class Shape:
    """What one attention is made of; `build` turns it into tensors."""

    query_lens: tuple[int, ...] = (1,)
    row_lens: tuple[int, ...] = (20,)
    num_kv_heads: int = 2
    group: int = 1
    dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    codes: str | None = None
    scales: torch.dtype = torch.bfloat16  # of the codes
    window: int = 0
    sinks: int = 0
    sink_query: bool = False
    shuffled: bool = True
    groups: tuple[tuple[int, int, int], ...] = ()  # rows that share their first tokens, see plan.Group
    head_major: bool = True  # the pool's layout on a CPU; else that of a GPU
    seed: int = 0


@dataclass
class Case:
    plan: Plan
    layer: LayerStore
    query: torch.Tensor
    key: torch.Tensor  # of this step, as value
    value: torch.Tensor
    options: dict = field(default_factory=dict)


def build(shape: Shape, device: torch.device | str = "cpu") -> Case:
    """Rows with blocks scattered over a pool of NaN, their past stored, this step's K and V stored as well."""
    rng, generator = random.Random(shape.seed), torch.Generator().manual_seed(shape.seed)
    bs, heads, dim = shape.block_size, shape.num_kv_heads, shape.dim
    counts = [-(-n // bs) for n in shape.row_lens]
    num_blocks = sum(counts) + 2
    ids = list(range(num_blocks))
    if shape.shuffled:
        rng.shuffle(ids)
    tables = torch.full((len(counts), max(counts) + 1), NULL_BLOCK, dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([ids.pop() for _ in range(count)][:: 1 if shape.shuffled else -1])
    for first, last, num_tokens in shape.groups:
        tables[first:last, : num_tokens // bs] = tables[first, : num_tokens // bs].clone()
    shared_lens = [sum(n for first, last, n in shape.groups if first <= row < last) for row in range(len(counts))]
    groups = list(shape.groups) + [(0, 0, 0)] * (max(1, len(counts) // 2) - len(shape.groups))

    def slots(row: int, begin: int, end: int) -> torch.Tensor:
        index = torch.arange(begin, end)
        return tables[row, index // bs].long() * bs + index % bs

    pairs = list(zip(shape.query_lens, shape.row_lens, strict=True))
    step_slots = torch.cat([slots(row, n - q, n) for row, (q, n) in enumerate(pairs)])
    all_slots = torch.cat([slots(row, 0, n) for row, (_, n) in enumerate(pairs)])
    lens = torch.tensor([0, *shape.query_lens])
    plan = Plan(
        cu_seqlens_q=lens.cumsum(0).int().to(device),
        context_lens=torch.tensor(shape.row_lens).int().to(device),
        positions=torch.cat([torch.arange(n - q, n) for q, n in pairs]).to(device),
        slot_mapping=step_slots.to(device),
        block_tables=tables.to(device),
        query_lens=list(shape.query_lens),
        row_lens=list(shape.row_lens),
        num_decodes=next((row for row, q in enumerate(shape.query_lens) if q != 1), len(pairs)),
        row_groups=[Group(*group) for group in shape.groups],
        groups=torch.tensor(groups, dtype=torch.int32).to(device),
        shared_lens=torch.tensor(shared_lens, dtype=torch.int32).to(device),
    )

    def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
        store = torch.full((size[1], size[0], *size[2:]) if shape.head_major else size, float("nan")).to(dtype)
        return (store.transpose(0, 1) if shape.head_major else store).to(device)

    stored = CODES[shape.codes] if shape.codes else (shape.dtype, shape.dtype)
    layer = LayerStore(
        *(empty(num_blocks, heads, bs, dim // (1 + (own == reference.HALF_BYTES)), dtype=own) for own in stored)
    )
    if shape.codes:
        layer = LayerStore(*layer[:2], *(empty(num_blocks, heads, bs, dtype=shape.scales) for _ in "kv"))

    def states(num_tokens: int, num_heads: int) -> torch.Tensor:  # laid out as modeling_llama leaves them
        data = torch.randn(1, num_heads, num_tokens, dim, generator=generator).to(shape.dtype).to(device)
        return data.transpose(1, 2)[0]

    key, value = states(len(all_slots), heads), states(len(all_slots), heads)
    reference.store_kv(key, value, layer, all_slots.to(device))
    own = torch.cat([torch.arange(n - q, n) + sum(shape.row_lens[:row]) for row, (q, n) in enumerate(pairs)]).to(device)
    query, sink_query = (states(len(step_slots), heads * shape.group) for _ in "qs")
    options = {"scaling": dim**-0.5, "window": shape.window, "sinks": shape.sinks}
    options["sink_query"] = sink_query if shape.sink_query else None
    return Case(plan, layer, query, key[own], value[own], options)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# the reference


@pytest.mark.parametrize("group", [1, 3])
def test_reference_is_causal_attention(group):
    case = build(Shape(query_lens=(1, 63, 5), row_lens=(17, 63, 40), group=group))
    out = reference.attention(case.query, case.layer, case.plan, **case.options)
    starts = case.plan.cu_seqlens_q.tolist()
    for row, context_len in enumerate(case.plan.row_lens):
        table, index = case.plan.block_tables[row], torch.arange(context_len)
        k, v = (reference.gather(store, None, table, index) for store in case.layer[:2])
        q = case.query[starts[row] : starts[row + 1]].transpose(0, 1)
        mask = torch.ones(q.shape[1], context_len, dtype=torch.bool).tril(context_len - q.shape[1])
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0]
        assert_close(out[starts[row] : starts[row + 1]], expected.transpose(0, 1))


def test_reference_window_and_sinks():
    """Against a softmax over the visible tokens alone, written out for one query."""
    case = build(Shape(row_lens=(20,), num_kv_heads=1, window=5, sinks=2, sink_query=True))
    out = reference.attention(case.query, case.layer, case.plan, **case.options)[0, 0]
    index = torch.tensor([0, 1, 15, 16, 17, 18, 19])
    k, v = (reference.gather(store, None, case.plan.block_tables[0], index)[0] for store in case.layer[:2])
    scores = torch.cat((k[:2] @ case.options["sink_query"][0, 0], k[2:] @ case.query[0, 0])) * case.options["scaling"]
    assert_close(out, scores.softmax(0) @ v)


@pytest.mark.parametrize("codes, worst", [("int8", 0.5 / 127), ("fp8", 1 / 16), ("int4", 1 / 15)])
def test_codes_are_rounded_to_nearest(codes, worst):
    data = torch.randn(50, 3, 64)
    data[7, 1] = 0
    coded, scale = reference.quantise(data, CODES[codes][0])
    decoded = reference.dequantise(coded, scale)
    if codes == "int4":  # that is what is rounded
        data, decoded = reference.turn(data), reference.turn(decoded)
    error = (decoded - data).abs()
    assert (error <= worst * data.abs().amax(-1, keepdim=True) * 1.001).all()
    assert (decoded[7, 1] == 0).all()


@pytest.mark.parametrize(
    "implementations",
    [
        [reference.store_kv, kernels.store_kv, cpu.store_kv, triton_store.store_kv],
        [reference.attention, kernels.attention, cpu.attention, gpu.attention],
    ],
)
def test_one_signature(implementations):
    """A caller can be handed any of them. The reference alone knows other bytes and masks than the kernels."""
    extra = {"encode", "decode", "visible"}
    signatures = [inspect.signature(implementation).parameters for implementation in implementations]
    shapes = {tuple(str(p) for p in parameters.values() if p.name not in extra) for parameters in signatures}
    assert len(shapes) == 1


def test_the_reference_reads_blocks_alone():
    """Not the K and V of this step that a caller may give beside them."""
    case = build(Shape((1, 9), (20, 30), group=2, window=8, sinks=2))
    expected = reference.attention(case.query, case.layer, case.plan, **case.options)
    nothing = torch.full_like(case.key, float("nan"))
    out = reference.attention(case.query, case.layer, case.plan, key=nothing, value=nothing, **case.options)
    assert torch.equal(out, expected)


# the CPU path


@st.composite
def shapes(draw) -> Shape:
    rows = draw(st.lists(st.tuples(st.integers(1, 90), st.booleans()), min_size=1, max_size=5))
    rows = [(1 if decode else draw(st.integers(1, length)), length) for length, decode in rows]
    rows.sort(key=lambda row: row[0] != 1)
    return Shape(
        query_lens=tuple(query_len for query_len, _ in rows),
        row_lens=tuple(row_len for _, row_len in rows),
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3])),
        dim=draw(st.sampled_from([8, 20, 64])),
        block_size=draw(st.sampled_from([1, 2, 3, 7, 16, 17, 64, 100])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        codes=draw(st.sampled_from([None, None, "int8", "fp8", "int4", "k8v4"])),
        window=draw(st.sampled_from([0, 0, 1, 5, 30])),
        sinks=draw(st.sampled_from([0, 1, 4, 20])),
        sink_query=draw(st.booleans()),
        shuffled=draw(st.booleans()),
        head_major=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=200, deadline=None)
@given(shape=shapes(), min_run=st.sampled_from([1, 20, 256]), max_gathered=st.sampled_from([0, 40, 512]))
def test_cpu_attention(shape, min_run, max_gathered):
    case = build(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "MIN_RUN", min_run)
        patch.setattr(cpu, "MAX_GATHERED", max_gathered)
        patch.setattr(cpu, "CODE_TILE", 13)
        patch.setattr(cpu, "QUERY_TILE", 7)
        out = kernels.attention(case.query, case.layer, case.plan, key=case.key, value=case.value, **case.options)
    assert_close(out, reference.attention(case.query, case.layer, case.plan, **case.options))


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), hole=st.booleans())
def test_cpu_store(shape, hole):
    check_store(shape, kernels.store_kv, hole, "cpu")


def test_a_decode_step_copies_no_past_kv():
    case = build(Shape(row_lens=(300,), shuffled=False))
    ((k, v, *_), *rest) = cpu.parts(case.layer, case.plan, 0, 0, 300)
    assert not rest and k.shape == (1, 2, 300, 16)
    assert k.untyped_storage().data_ptr() == case.layer.k.untyped_storage().data_ptr()
    assert v.untyped_storage().data_ptr() == case.layer.v.untyped_storage().data_ptr()


@pytest.mark.parametrize("implementation", [reference.attention, kernels.attention])
def test_a_padding_row_gives_zeros(implementation):
    case = build(Shape(query_lens=(1, 1), row_lens=(20, 1)))
    case.plan.context_lens[1] = case.plan.row_lens[1] = 0
    out = implementation(case.query, case.layer, case.plan, **case.options)
    assert (out[1] == 0).all() and not out.isnan().any()


# Triton: in the interpreter without a GPU, which is why these are few and tiny


def check_store(shape: Shape, store_kv, hole: bool, device: torch.device | str) -> None:
    case = build(shape, device)
    slots = case.plan.slot_mapping.clone()
    if hole:
        slots[len(slots) // 2] = NULL_SLOT
    key, value = case.key * 2, case.value * 3
    stored, expected = (LayerStore(*(None if x is None else x.clone() for x in case.layer)) for _ in range(2))
    store_kv(key, value, stored, slots)
    reference.store_kv(key, value, expected, slots)
    assert_same_store(stored, expected)


def assert_same_store(stored: LayerStore, expected: LayerStore) -> None:
    """To the bit; but what is turned is summed in another order, so a code may be the next one and a scale differ."""
    turned = [plane.dtype == reference.HALF_BYTES for plane in stored[:2]] * 2
    for actual, wanted, is_turned in zip(stored, expected, turned, strict=False):
        if actual is None:
            continue
        if actual.dtype == reference.HALF_BYTES:
            off = (reference.unpack(actual) - reference.unpack(wanted)).abs()
            assert off.max() <= 2 and (off > 0).float().mean() < 0.01
        else:
            tolerance = 2**-8 if is_turned else 0
            torch.testing.assert_close(actual.float(), wanted.float(), atol=0, rtol=tolerance, equal_nan=True)


# bf16 products and rounding to bf16 and fp8 are wrong in Triton's interpreter: those are for the GPU.
@pytest.mark.parametrize("codes", [None, "int8", pytest.param("fp8", marks=pytest.mark.gpu), "k8v4", "int4"])
@pytest.mark.parametrize("head_major", [True, False])
def test_triton_store(device, codes, head_major):
    shape = Shape((1, 6), (20, 30), num_kv_heads=3, dim=20, block_size=7, dtype=torch.float16)
    shape = replace(shape, codes=codes, scales=torch.float32, head_major=head_major)
    check_store(shape, triton_store.store_kv, True, device)


# A rotation rounds to the model's dtype before the codes are made.
@pytest.mark.parametrize("codes", [None, "int8", pytest.param("fp8", marks=pytest.mark.gpu), "k8v4", "int4"])
@pytest.mark.parametrize("store_kv", [reference.store_kv, kernels.store_kv, triton_store.store_kv])
def test_store_rotates(device, codes, store_kv):
    shape = Shape((1, 6), (20, 30), num_kv_heads=3, group=2, dim=20, block_size=7, dtype=torch.float16)
    case = build(replace(shape, codes=codes, scales=torch.float32, head_major=False), device)
    qkv = torch.cat([case.query, case.key, case.value], dim=1)  # as a product leaves them
    query, key, value = qkv.clone().split([6, 3, 3], dim=1)
    rotary = Rotary(*torch.randn(2, len(qkv), 20, dtype=torch.float16).to(device), 9)
    slots = case.plan.slot_mapping.clone()
    slots[2] = NULL_SLOT
    stored, expected = (LayerStore(*(None if x is None else x.clone() for x in case.layer)) for _ in range(2))
    store_kv(key, value, stored, slots, query, rotary)
    turned = qkv[:, :9].clone()
    rotate_heads(turned, rotary)
    assert_close(torch.cat([query, key], dim=1), turned)
    assert torch.equal(value, case.value)
    reference.store_kv(key, value, expected, slots)
    assert_same_store(stored, expected)


def launched(launch, case: Case, out: torch.Tensor, *arguments, **sizes) -> torch.Tensor:
    """What a kernel writes to `out`, turned back where its codes are turned."""

    @turned
    def attend(query, layer, plan, **options):
        launch(query, layer, plan, out, *arguments, **sizes, **options)
        return out

    return attend(case.query, case.layer, case.plan, **case.options)


def check_decode(shape: Shape, device: torch.device, tuned: triton_decode.Tuning | None = None) -> None:
    case = build(shape, device)
    out = torch.full_like(case.query, 7.0)
    actual = launched(triton_decode.decode, case, out, tuned=tuned)
    expected = reference.attention(case.query, case.layer, case.plan, **case.options)
    decodes = case.plan.num_decodes
    assert_close(actual[:decodes], expected[:decodes])
    assert (out[decodes:] == 7.0).all()
    assert all((value[2] == 0).all() for value in case.plan.scratch.values() if isinstance(value, tuple))


def check_prefill(shape: Shape, device: torch.device, first: int = 0, tuned: triton_prefill.Tuning | None = None):
    case = build(shape, device)
    out = torch.full_like(case.query, 7.0)
    rows = len(shape.query_lens)
    actual = launched(triton_prefill.prefill, case, out, first, rows, tuned=tuned)
    expected = reference.attention(case.query, case.layer, case.plan, **case.options)
    begin = sum(shape.query_lens[:first])
    assert_close(actual[begin:], expected[begin:])
    assert (out[:begin] == 7.0).all()
    assert all((value[2] == 0).all() for value in case.plan.scratch.values() if isinstance(value, tuple))


# One warp is what makes `triton_decode_groups` take what suits it.
TINY_DECODE = triton_decode.Tuning(tile=8, num_warps=1, programs=15, least=16)
GROUPS = Shape((1, 1), (37, 8), 2, 4, 64, 16, torch.float16, "int8")
DECODES = {
    "one token": Shape(row_lens=(1,), block_size=1),
    "one head a group, many splits": Shape((1, 1, 1), (70, 16, 17), dim=20, block_size=3),
    "three heads a group": Shape((1, 1), (33, 50), group=3, dim=8, dtype=torch.float16),
    "one block holds all": Shape((1, 1), (63, 9), group=2, block_size=100, head_major=False),
    "a prompt beside": Shape((1, 4), (20, 9), block_size=17),
    "window": Shape((1, 1), (70, 4), window=30, block_size=7),
    "window, sinks": Shape((1, 1, 1), (70, 4, 12), group=2, window=9, sinks=4, sink_query=True),
    "sinks longer than a split": Shape((1,), (70,), window=9, sinks=20, sink_query=True),
    "int8": Shape((1, 1), (45, 8), codes="int8", dtype=torch.float16),
    "int8, sinks without a window": Shape((1,), (45,), codes="int8", sinks=4, sink_query=True),
    "int8, groups": Shape((1,), (45,), group=2, codes="int8", window=20, sinks=3),
    "int8, groups, float32 scales": replace(GROUPS, scales=torch.float32),
    "fp8": Shape((1,), (45,), group=2, codes="fp8"),
    "int8, groups in registers": GROUPS,
    "int8, groups in registers, one whole tile": Shape((1,), (16,), 1, 2, 64, 4, torch.float16, "int8"),
    "int8, groups in registers, large heads": Shape((1,), (29,), 1, 7, 128, 48, torch.float16, "int8"),
    "int4": Shape((1, 1), (45, 8), codes="int4", dtype=torch.float16),
    "int4, groups, window, sinks": Shape((1,), (45,), 1, 3, 20, codes="int4", window=20, sinks=3, sink_query=True),
    "int4, groups in registers": replace(GROUPS, codes="int4"),
    "int4, groups in registers, large heads": Shape((1,), (29,), 1, 7, 128, 48, torch.float16, "int4"),
    "k8v4": Shape((1,), (45,), codes="k8v4", window=20),
    "k8v4, groups in registers": replace(GROUPS, codes="k8v4", group=8, num_kv_heads=1, head_major=False),
    "fp8, groups in registers": replace(GROUPS, codes="fp8", group=8, num_kv_heads=1, head_major=False),
}


@pytest.mark.parametrize("num_warps", [1, pytest.param(4, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("part", [0, 16])
@pytest.mark.parametrize("name", DECODES)
def test_triton_decode(device, name, part, num_warps):
    tuned = replace(TINY_DECODE, part=part, num_warps=num_warps)
    check_decode(DECODES[name], device, replace(tuned, tile=16) if device.type == "cuda" else tuned)


@settings(deadline=None, max_examples=15)
@given(
    row_lens=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2]),
    codes=st.sampled_from([None, "int8", "int4"]),
    window=st.sampled_from([0, 20]),
    sinks=st.sampled_from([0, 3]),
    programs=st.integers(1, 40),
    least=st.sampled_from([8, 24]),
    fan=st.sampled_from([2, 3, 16]),
)
def test_triton_decode_in_parts_of_any_size(row_lens, heads, group, codes, window, sinks, programs, least, fan):
    shape = Shape((1,) * len(row_lens), tuple(row_lens), heads, group, codes=codes, window=window, sinks=sinks)
    shape = replace(shape, dtype=torch.float16, block_size=4, sink_query=sinks > 0)
    tuned = replace(TINY_DECODE, programs=programs, least=least)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with patch.object(triton_decode, "FAN", fan):
        check_decode(shape, device, replace(tuned, tile=16) if device.type == "cuda" else tuned)


@settings(deadline=None, max_examples=12)
@given(
    row_lens=st.lists(st.integers(1, 60), min_size=1, max_size=2),
    heads=st.integers(1, 2),
    group=st.integers(1, 8),
    codes=st.sampled_from(["int8", "k8v4", "int4"]),
    block_size=st.sampled_from([4, 12, 16]),
    programs=st.integers(1, 40),
    least=st.sampled_from([8, 24]),
    fan=st.sampled_from([2, 3, 16]),
)
def test_triton_decode_of_groups_in_parts_of_any_size(row_lens, heads, group, codes, block_size, programs, least, fan):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape((1,) * len(row_lens), tuple(row_lens), heads, group, 64, block_size, torch.float16, codes)
    with patch.object(triton_decode, "FAN", fan):
        check_decode(shape, device, replace(TINY_DECODE, programs=programs, least=least, tile=16))


def shuffled(programs: Iterable[int]) -> list[int]:
    return random.Random(0).sample(list(programs), len(programs))


def programs_run_in(order: Callable, monkeypatch) -> None:
    """Triton's interpreter runs one program after the other; a GPU promises no order."""
    builder = type(interpreter.interpreter_builder)
    set_index, set_size, programs = builder.set_grid_idx, builder.set_grid_dim, []

    def sized(self, x, y, z):
        programs[:] = order(range(x))
        set_size(self, x, y, z)

    monkeypatch.setattr(builder, "set_grid_dim", sized)
    monkeypatch.setattr(builder, "set_grid_idx", lambda self, x, y, z: set_index(self, programs[x], y, z))


@pytest.mark.parametrize("order", [None, reversed, shuffled])
def test_triton_decode_merges_groups_of_groups(device, monkeypatch, order):
    """Whoever arrives last; of groups the last of which is one part alone, too."""
    monkeypatch.setattr(triton_decode, "FAN", 2)
    if order and device.type == "cpu":
        programs_run_in(order, monkeypatch)
    for parts in (2, 3, 5, 9, 13):
        shape = Shape((1,), (16 * parts,), 1, 2, block_size=16, dtype=torch.float16)
        check_decode(shape, device, replace(TINY_DECODE, tile=16, programs=30, least=16))


TAKEN = [{}, {"codes": "fp8"}, {"group": 2}, {"group": 8}, {"dim": 128}, {"block_size": 4}, {"dtype": torch.bfloat16}]
TAKEN += [{"codes": "k8v4"}, {"codes": "int4"}, {"codes": "int4", "group": 1}]
LEFT = [{"codes": None}, {"group": 1}, {"group": 9}, {"dim": 80}, {"dim": 256}, {"block_size": 6}, {"window": 9}]
LEFT += [{"dtype": torch.float32}, {"scales": torch.float32}, {"sinks": 4, "sink_query": True}]


@pytest.mark.parametrize("change, is_taken", [*product(TAKEN, [True]), *product(LEFT, [False])])
def test_which_groups_stay_in_registers(monkeypatch, change, is_taken):
    taken = Mock()
    for name, called in {"decode_groups": taken, "decode_codes": Mock(), "decode_any": Mock()}.items():
        monkeypatch.setattr(triton_decode, name, called)
    for num_rows in (31, 32):  # times two KV heads
        shape = replace(GROUPS, query_lens=(1,) * num_rows, row_lens=(9,) * num_rows, **change)
        case = build(shape)
        triton_decode.decode(case.query, case.layer, case.plan, torch.empty_like(case.query), **case.options)
        assert taken.called == is_taken


@pytest.mark.parametrize("shape", [Shape((1, 1), (20, 1), window=8, sinks=2), GROUPS])
def test_triton_decode_padding_row(device, shape):
    case = build(shape, device)
    case.plan.context_lens[1] = 0
    out = torch.full_like(case.query, 7.0)
    triton_decode.decode(case.query, case.layer, case.plan, out, tuned=replace(TINY_DECODE, tile=16), **case.options)
    assert (out[1] == 0).all() and not out.isnan().any()


@pytest.mark.parametrize("group", [1, 2])
def test_triton_decode_row_ignores_its_neighbours(device, group, monkeypatch):
    """The same row alone and in a batch, to the bit, also where only one of them has few pairs."""
    monkeypatch.setattr(triton_decode, "FEW_PAIRS", 4)
    monkeypatch.setattr(triton_decode, "FAN", 2)
    tuned = replace(TINY_DECODE, tile=16, part=16)
    batch = build(Shape((1, 1), (77, 23), group=group), device)
    out = torch.empty_like(batch.query)
    triton_decode.decode(batch.query, batch.layer, batch.plan, out, tuned=tuned, **batch.options)
    plan = replace(
        batch.plan,
        context_lens=batch.plan.context_lens[:1],
        block_tables=batch.plan.block_tables[:1],
        query_lens=[1],
        row_lens=[77],
        num_decodes=1,
        scratch={},
    )
    alone = torch.empty_like(out[:1])
    triton_decode.decode(batch.query[:1], batch.layer, plan, alone, tuned=tuned, **batch.options)
    assert torch.equal(alone[0], out[0])


@pytest.mark.parametrize("query_len, dim", [(1, 16), (1, 64), (2, 16)])
def test_small_weights_of_small_codes_count(device, query_len, dim, monkeypatch):
    """Most of the softmax on many tokens of weight 3e-4 beside one, as after an attention sink, and V of about 0.01."""
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16  # both are multiplied as float16 when decoding
    if dim == 64:
        monkeypatch.setattr(triton_decode, "tuning", lambda *_: replace(TINY_DECODE, tile=32, least=800))
    case = build(Shape((query_len,), (800,), 1, 2, dim, codes="int8", dtype=torch.float16), device)
    key, value = torch.zeros(2, 800, 1, dim, dtype=dtype, device=device)
    key[0, :, 0], value[:] = 1.0, 0.01
    value[0] = 0.0
    blocks = case.plan.block_tables[0, :50].long()
    reference.store_kv(key, value, case.layer, (blocks[:, None] * 16 + torch.arange(16, device=device)).flatten())
    query = torch.zeros_like(case.query, dtype=dtype)
    query[..., 0] = 8.0 / case.options["scaling"]
    out = gpu.attention(query, case.layer, case.plan, **case.options)
    expected = reference.attention(query.float(), case.layer, case.plan, **case.options)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=0)


TINY_PREFILL = triton_prefill.Tuning(rows=16, tile=16, num_warps=4, num_stages=2, split=16)
PREFILLS = {
    "ragged": Shape((1, 23, 5), (9, 23, 40), block_size=3),
    "three heads a group": Shape((7, 20), (31, 20), group=3, num_kv_heads=1, dim=8, dtype=torch.float16),
    "one block holds all": Shape((18,), (40,), block_size=100, head_major=False),
    "window": Shape((30, 6), (30, 50), window=5, block_size=7),
    "window, sinks": Shape((30, 6), (30, 50), group=2, window=5, sinks=4, sink_query=True, num_kv_heads=1),
    "int8": Shape((20,), (30,), codes="int8", dtype=torch.float16),
    "fp8, sinks": Shape((20,), (30,), codes="fp8", window=9, sinks=20),
    "int4, sinks": Shape((20,), (30,), 1, 3, 20, codes="int4", window=9, sinks=4, sink_query=True),
    "k8v4": Shape((20,), (30,), codes="k8v4", dtype=torch.float16),
}


@pytest.mark.parametrize("splits", ["whole", "split"])
@pytest.mark.parametrize("name", PREFILLS)
def test_triton_prefill(device, name, splits):
    check_prefill(PREFILLS[name], device, tuned=replace(TINY_PREFILL, programs=1 if splits == "whole" else 50))


def test_triton_prefill_of_some_rows(device):
    check_prefill(Shape((1, 1, 12, 3), (9, 20, 30, 3)), device, first=2, tuned=TINY_PREFILL)


def attend(query, key, value, scaling, is_causal):
    """`library.attend` in plain torch, for sizes and dtypes that are not worth a plan of cuDNN's."""
    group, dtype = query.shape[1] // key.shape[1], query.dtype
    query, key, value = (states.float().transpose(0, 1) for states in (query, key, value))
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ key.mT * scaling
    if is_causal:
        scores += torch.full_like(scores, float("-inf")).triu(1)
    return (scores.softmax(-1) @ value).transpose(0, 1).to(dtype), scores.logsumexp(-1)


def in_whole_steps(query, key, value, scaling, is_causal):
    assert len(query) % library.STEP == len(key) % library.STEP == 0
    assert not (key.isnan().any() or value.isnan().any())  # a masked weight of 0 times NaN is NaN
    return attend(query, key, value, scaling, is_causal)


@settings(max_examples=15, deadline=None)
@given(
    query_len=st.integers(1, 90),
    past_len=st.integers(0, 150),
    group=st.sampled_from([1, 2, 3]),
    dim=st.sampled_from([8, 20, 64]),
    block_size=st.sampled_from([1, 7, 16, 100]),
    codes=st.sampled_from([None, "int8", "k8v4", "int4"]),
    head_major=st.booleans(),
)
def test_attentions_merge_into_one(query_len, past_len, group, dim, block_size, codes, head_major):
    """Of a chunk's own tokens and of those before it, codes a segment at a time."""
    shape = Shape((query_len,), (past_len + query_len,), group=group, dim=dim, block_size=block_size, codes=codes)
    case = build(replace(shape, head_major=head_major), "cuda" if torch.cuda.is_available() else "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "attend", in_whole_steps)
        patch.setattr(library, "prefers_cudnn", lambda _: True)
        patch.setattr(library, "STEP", 30)
        patch.setattr(library, "SEGMENT", 60)

        @turned
        def attention(query, layer, plan):
            own = (None, None) if codes else (case.key, case.value)
            return library.attention(query, *own, layer, plan.block_tables[0], past_len, case.options["scaling"])

        out = attention(case.query, case.layer, case.plan)
    assert_close(out, reference.attention(case.query, case.layer, case.plan, **case.options))


LONG = {
    "decode rows, a whole prompt, a chunk, a short prompt": Shape((1, 1, 24, 7, 3), (30, 5, 24, 20, 3), group=2),
    "a whole prompt alone": Shape((24,), (24,)),
    "a whole chunk alone": Shape((16,), (24,), group=3),
    "prompts with ends, a chunk off the steps": Shape((21, 8, 9), (21, 40, 29), block_size=3),
    "a chunk with an end": Shape((1, 19), (5, 35), group=2),
    "a window that hides": Shape((24, 24), (24, 32), window=10),
    "a window that does not": Shape((24, 24), (24, 32), window=40, sinks=4),
    "shared tokens": Shape((16, 16, 8), (48, 48, 8), groups=((0, 2, 32),)),
    "shared tokens, a window that does not": Shape((1, 8), (48, 40), window=48, sinks=2, groups=((0, 2, 32),)),
    "int8": Shape((1, 16, 24), (9, 24, 24), codes="int8"),
    "int4, chunks with ends": Shape((1, 19, 9), (9, 51, 9), 1, 3, codes="int4"),
    "a size without fused kernels": Shape((16,), (24,), dim=20),
}


@pytest.mark.parametrize("name", LONG)
def test_gpu_attention_gives_each_row_to_its_kernel(device, monkeypatch, name):
    changed = {"STEP": 8, "SEGMENT": 16, "prefers_cudnn": lambda _: True, "attend": in_whole_steps}
    for attribute, value in changed.items():
        monkeypatch.setattr(library, attribute, value)
    case = build(replace(LONG[name], dtype=torch.float16), device)
    out = gpu.attention(case.query, case.layer, case.plan, key=case.key, value=case.value, **case.options)
    assert_close(out, reference.attention(case.query, case.layer, case.plan, **case.options))


@pytest.mark.parametrize("longest, masks", [(40, (0, 0)), (41, (40, 3))])
def test_no_kernel_looks_for_a_window_that_hides_nothing(longest, masks, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "decode", lambda *_, window, sinks, **options: asked.append((window, sinks)))
    case = build(Shape((1, 1), (longest, 9), window=40, sinks=3))
    gpu.attention(case.query, case.layer, case.plan, **case.options)
    assert asked == [masks]


def test_what_the_library_gets(device, monkeypatch):
    monkeypatch.setattr(library, "prefers_cudnn", lambda _: True)
    half, single = torch.empty(1, 1, 64, dtype=torch.bfloat16), torch.empty(1, 1, 64)
    assert [library.num_queries(n, past, half) for past in (0, 50) for n in (1023, 1024, 5000)] == [0, 1024, 5000] * 2
    assert library.num_queries(4096, 0, single) == 0
    monkeypatch.setattr(library, "prefers_cudnn", lambda _: False)
    assert [library.num_queries(3000, past, half) for past in (0, 2048)] == [2048, 0]


# a GPU: the sizes that matter, the tuned constants

SWEEP = list(product([64, 80, 96, 128], [1, 3, 16, 17, 64, 256], [torch.float32, torch.float16, torch.bfloat16]))


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("dim, block_size, dtype", SWEEP)
def test_gpu_sweep(device, dim, block_size, dtype, group):
    shape = Shape((1, 1, 1, 70, 5, 600), (3001, 1, 260, 1500, 900, 600), group=group, dim=dim, block_size=block_size)
    shape = replace(shape, dtype=dtype, head_major=False)
    check_decode(shape, device)
    check_prefill(shape, device, first=3)
    check_prefill(replace(shape, query_lens=(1, 9), row_lens=(2900, 3001)), device)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("codes", [None, *CODES])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_long_prompts(device, group, codes, dtype):
    """Prompts and chunks that go to the library, in whole or but for their ends."""
    shape = Shape(
        (1, 1100, 1024, 2050, 1500), (30, 1100, 2048, 4098, 3000), group=group, dim=128, dtype=dtype, head_major=False
    )
    case = build(replace(shape, codes=codes), device)
    out = gpu.attention(case.query, case.layer, case.plan, key=case.key, value=case.value, **case.options)
    assert_close(out, reference.attention(case.query, case.layer, case.plan, **case.options))


@pytest.mark.gpu
@pytest.mark.parametrize("codes, window, sinks", [*product([None, *CODES], [0, 512], [0, 4])])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_windows_and_codes(device, codes, window, sinks, group, dtype):
    shape = Shape((1, 1, 70, 600), (2001, 3, 1500, 600), group=group, dim=128, dtype=dtype, head_major=False)
    shape = replace(shape, codes=codes, window=window, sinks=sinks, sink_query=sinks > 0)
    check_store(shape, triton_store.store_kv, True, device)
    check_decode(shape, device)
    check_prefill(shape, device, first=2)


@pytest.mark.gpu
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group, dim", [(1, 128), (2, 128), (4, 128), (7, 128), (8, 128), (4, 64), (8, 64)])
def test_gpu_groups_in_registers(device, codes, dtype, group, dim):
    """As many rows as it takes for the tuned constants, in parts of all sizes."""
    row_lens = (3001, 1, 16, 260, 2048, *(97 * row + 5 for row in range(35)))
    shape = Shape((1,) * 40, row_lens, group=group, dim=dim, dtype=dtype, codes=codes, head_major=False)
    check_decode(shape, device)
    check_decode(
        replace(shape, query_lens=(1, 1), row_lens=(3001, 800)), device, triton_decode.tuning(4, torch.int8, 64, True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
def test_gpu_decode_in_a_graph(device, group):
    """Captured once under an upper bound, replayed for other lengths, with the warm-up's plan long gone."""
    shape = Shape((1, 1, 1), (2000, 1200, 5), group=group, dim=128, dtype=torch.bfloat16, head_major=False)
    case = build(shape, device)

    def step(plan: Plan) -> torch.Tensor:
        return kernels.attention(case.query, case.layer, plan, **case.options)

    step(replace(case.plan, scratch={}))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(replace(case.plan, row_lens=[4096] * 3, scratch={}))
    for lens in ([2000, 1200, 5], [700, 1, 0], [1999, 1200, 5], [2000, 300, 2]):
        case.plan.context_lens.copy_(torch.tensor(lens))
        out.fill_(7.0)
        graph.replay()
        assert_close(out, reference.attention(case.query, case.layer, case.plan, **case.options))
