"""The fused stack against the layers it stands in for, and each kernel against its plain version."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from common import VOCAB, tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

from kv_strategies import Request, Runner, build, registry
from kv_strategies.kernels import FAST, linear
from kv_strategies.kernels.linear import Norm, Rotary, cpu, plain, triton_few_rows, triton_fused, triton_one_row
from kv_strategies.kernels.linear.triton_one_row import Tuning
from kv_strategies.step import fused, graphs
from kv_strategies.step.fused import FusedStack
from kv_strategies.step.graphs import StackGraphs, StackStep
from kv_strategies.step.plan import Plan, PlanBuffer, Row
from kv_strategies.step.upstream import with_cache

EXACT = {"atol": 1e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}  # those of either side are 2e-5 off float64


def model_of(kind: str):
    torch.manual_seed(1)
    model = tiny_llama(
        **{"plain": {}, "biased": {"attention_bias": True, "mlp_bias": True}, "mha": {"num_kv_heads": 4}}[kind]
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Counts the forwards that went through a stack."""
    seen, call = [], FusedStack.__call__
    monkeypatch.setattr(FusedStack, "__call__", lambda *args, **kwargs: seen.append(1) or call(*args, **kwargs))
    return seen


def replayed(device) -> Plan:
    """A step of one row that a CUDA graph holds."""
    plan = PlanBuffer(device, 1, 1, 1, 16).fill([Row(np.zeros(1, np.int32), 1, 1)])
    return replace(plan, is_replayed=True)


def fused_strategy(model, name="paged"):
    strategy = build(name, model, num_blocks=64, block_size=4)
    strategy.fused = True
    return strategy


@pytest.mark.parametrize("kind", ["plain", "biased", "mha"])
@pytest.mark.parametrize("rotates_later", [False, True])
@torch.no_grad()
def test_the_stack_computes_what_the_layers_do(kind, rotates_later, device, forwards, monkeypatch):
    if device.type == "cpu":  # as with many rows on a GPU
        monkeypatch.setattr(registry, "FAST", FAST._replace(rotates_later=lambda x: rotates_later))
    model = model_of(kind).to(device)
    steps = [torch.randint(VOCAB, (2, n), device=device) for n in (7, 1, 3, 1)]
    expected, before = [], model.state_dict()
    before = {name: weight.clone() for name, weight in before.items()}
    cache = build("baseline", model).cache()
    for ids in steps:
        expected.append(model(ids, **with_cache(cache)).logits)
    strategy = fused_strategy(model)
    assert strategy.stack is not None
    cache = strategy.cache()
    for ids, logits in zip(steps, expected, strict=True):
        torch.testing.assert_close(model(ids, **with_cache(cache)).logits, logits, **LOGITS)
    assert len(forwards) == 4
    strategy.fused = False
    cache = strategy.cache()
    for ids, logits in zip(steps, expected, strict=True):  # the plain layers, over the merged weights
        torch.testing.assert_close(model(ids, **with_cache(cache)).logits, logits, **LOGITS)
    assert len(forwards) == 4
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_models_made_for_inference_only(mode):
    """Parameters made in inference mode stay such when they are merged, and can be read in any mode."""
    with torch.inference_mode():
        model = model_of("biased")
    ids = torch.randint(VOCAB, (1, 5))
    with mode():
        expected = model(ids, **with_cache(build("baseline", model).cache())).logits
        assert fused_strategy(model).stack is not None
        got = model(ids, **with_cache(fused_strategy(model).cache())).logits  # a second one reads merged weights
    torch.testing.assert_close(got, expected, **LOGITS)
    assert all(parameter.is_inference() for parameter in model.parameters())


@torch.no_grad()
def test_weights_are_held_once():
    model = model_of("biased")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    strategies = [fused_strategy(model), fused_strategy(model)]
    stack = strategies[0].stack
    assert stack is strategies[1].stack is fused.stack_of(model), "one stack a model"
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == 4 * sum(sizes.values())
    attention = model.model.layers[1].self_attn
    first, last = attention.q_proj.weight, attention.v_proj.weight
    assert first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    ids = torch.randint(VOCAB, (1, 5))
    was = model(ids, **with_cache(strategies[0].cache())).logits
    model.load_state_dict({name: weight * 1.5 for name, weight in model.state_dict().items()})  # into the same memory
    now = model(ids, **with_cache(strategies[0].cache())).logits
    assert not torch.allclose(was, now)
    torch.testing.assert_close(now, model(ids, **with_cache(build("baseline", model).cache())).logits, **LOGITS)


@pytest.mark.parametrize("rotates_later", [False, True])
def test_padded_generate_and_runner_run_through_the_stack(rotates_later, device, forwards, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(registry, "FAST", FAST._replace(rotates_later=lambda x: rotates_later))
    model = model_of("plain").to(device)
    prompts = [[5, 6, 7, 8, 9], [3, 4]]
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]], device=device)
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]], device=device)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    strategy = fused_strategy(model)
    assert torch.equal(model.generate(ids, **with_cache(strategy.cache()), **options), expected)
    assert torch.equal(model.generate(ids, **with_cache(strategy.cache(ids, mask)), **options), expected)
    results = Runner(model, strategy).generate([Request(prompt, max_new_tokens=6) for prompt in prompts])
    assert [result.token_ids for result in results] == expected[:, 5:].tolist()
    assert len(forwards) >= 18 or device.type == "cuda"  # of which replays are none


def fake_record(work, stream):
    """A graph that replays by running again: same inputs, same memory for the result."""
    output = work()
    return lambda: output.copy_(work()), output


def follow_in_place(step, plan):
    """What a graph reads is memory; here it is a plan."""
    step.plan = step.plan or plan
    vars(step.plan).update(vars(plan))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generate_replays_the_stack(mode, monkeypatch):
    model = model_of("plain")
    strategy = fused_strategy(model, "prefix")
    replayed = StackGraphs(strategy.stack, strategy.block_size)
    monkeypatch.setattr(graphs, "_warm_up", lambda work, stream: work())
    monkeypatch.setattr(graphs, "_record", fake_record)
    monkeypatch.setattr(graphs, "_SMALLEST_BUCKET", 8)
    monkeypatch.setattr(graphs, "_bounded", lambda plan, *bounds: plan)  # kernels of a CPU read lengths on the host
    monkeypatch.setattr(StackStep, "follow", follow_in_place)
    monkeypatch.setattr(strategy.door, "graphs", lambda strategy: replayed)
    prompts = torch.tensor([[0, 0, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for options in ({}, {"num_beams": 2}, {"max_new_tokens": 30}, {"output_hidden_states": True}):
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False} | options
        with mode():
            expected = model.generate(prompts, **options, return_dict_in_generate=True).sequences
        for cache in (strategy.cache(), strategy.cache(prompts, mask), strategy.cache(prompts, mask)):
            with torch.no_grad():  # the other mode, over the same buffers
                got = model.generate(prompts, **with_cache(cache), **options, return_dict_in_generate=True).sequences
            assert torch.equal(got, expected)
    assert strategy.num_hit_tokens > 0
    assert {bucket for _, bucket, _ in replayed._steps} == {8, 16, 32, 64}
    assert all(step._replay is not None for (_, bucket, _), step in replayed._steps.items() if bucket > 8)


@torch.no_grad()
def test_what_asks_for_the_layers_gets_them(forwards):
    model = model_of("plain")
    strategy = fused_strategy(model)
    ids = torch.randint(VOCAB, (1, 5))
    expected = model(ids, output_hidden_states=True)
    output = model(ids, **with_cache(strategy.cache()), output_hidden_states=True)
    for states, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(states, wanted, **EXACT)
    assert not forwards
    assert strategy.stack is not None, "the capture hooks stay, and are no reason"

    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: seen.append(1))
    assert strategy.stack is None
    model(ids, **with_cache(strategy.cache()))
    assert seen
    handle.remove()
    assert strategy.stack is not None

    projection = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = nn.Sequential(projection)  # as an adapter would
    assert strategy.stack is None
    model.model.layers[0].self_attn.q_proj = projection
    assert strategy.stack is not None

    model.double().float()  # moves the weights out of the merged memory
    stack = strategy.stack
    assert stack is not None and stack.is_current


def change_activation(model):
    model.model.layers[0].mlp.act_fn = nn.GELU()


def replace_method(model):
    model.model.layers[0].input_layernorm.forward = lambda x: x


def share_weights(model):
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight


def mix_dtypes(model):
    model.model.layers[0].mlp.half()


class Quantised(nn.Linear):
    """As quantisation libraries do."""


def quantise(model):
    model.model.layers[0].mlp.down_proj = Quantised(96, 64, bias=False)


@pytest.mark.parametrize("change", [change_activation, replace_method, share_weights, mix_dtypes, quantise])
def test_other_models_keep_their_layers(change):
    model = model_of("plain")
    assert fused.supports(model)
    change(model)
    assert not fused.supports(model)
    assert fused_strategy(model).stack is None


class Louder(LlamaForCausalLM):
    """Whose logits are its own."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output


def test_the_head_of_other_models_is_their_own(device):
    model = model_of("plain").to(device)
    assert fused.tail_of(model) is not None
    for change in ("class", "hook", "method"):
        model = model_of("plain").to(device)
        if change == "class":
            model.__class__ = Louder
        elif change == "hook":
            model.lm_head.register_forward_hook(lambda module, args, output: -output)
        else:
            model.forward = partial(Louder.forward, model)
        assert fused.tail_of(model) is None


# --- kernels

SHAPES = [(64, 96), (37, 50), (20, 130), (1, 7)]  # N, K
TUNINGS = [None, Tuning(16, 32, 4, 2), Tuning(4, 16, 1, 3), Tuning(2, 64, 1, 1)]


def arguments(num_rows, n, k, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows * n)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    return draw(num_rows, k), draw(n, k) / k**0.5, draw(n), Norm(1 + draw(k) / 4, 1e-5), draw


def run(x, weight, bias, tuned, **options):
    """The kernel for one row, twice."""
    residual = options.pop("residual", None)
    outs = []
    for _ in range(2):
        given = options if residual is None else {"residual": residual.clone()}
        outs.append(triton_one_row.linear(x, weight, bias, **given, tuned=tuned))
    assert torch.equal(*outs), "the same every time"
    return outs[0]


@pytest.mark.parametrize("tuned", TUNINGS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_one_row(n, k, tuned, device):
    x, weight, bias, norm, draw = arguments(1, n, k, device)
    torch.testing.assert_close(run(x, weight, None, tuned), x @ weight.mT, **EXACT)
    torch.testing.assert_close(
        run(x, weight, bias, tuned, norm=norm), plain.reference(x, weight, bias, norm=norm), **EXACT
    )
    residual = draw(1, n)
    expected = plain.reference(x, weight, bias, residual=residual.clone())
    torch.testing.assert_close(run(x, weight, bias, tuned, residual=residual), expected, **EXACT)


@pytest.mark.parametrize("tuned", TUNINGS)
@pytest.mark.parametrize(("half", "heads", "rotated"), [(8, 4, 3), (3, 5, 2), (20, 3, 3)])
def test_one_row_rotated_and_gated(half, heads, rotated, tuned, device):
    x, weight, bias, norm, draw = arguments(1, heads * 2 * half, 50, device)
    rotary = Rotary(draw(1, 2 * half), draw(1, 2 * half), rotated)
    for options in ({"rotary": rotary}, {"gated": True}):
        expected = plain.reference(x, weight, bias, norm=norm, **options)
        torch.testing.assert_close(run(x, weight, bias, tuned, norm=norm, **options), expected, **EXACT)


def test_many_rows(device):
    x, weight, bias, norm, draw = arguments(9, 40, 50, device)
    residual = draw(9, 40)
    for given in ({"gated": True}, {"residual": residual}, {}):
        for given_bias in (bias, None):
            copies = [{k: v.clone() if k == "residual" else v for k, v in given.items()} for _ in range(2)]
            got = linear.many_rows(x, weight, given_bias, norm=norm, **copies[0])
            torch.testing.assert_close(got, plain.reference(x, weight, given_bias, norm=norm, **copies[1]), **EXACT)
    assert torch.equal(triton_fused.rms_norm(x[:, ::1], norm), triton_fused.rms_norm(x.clone(), norm))


@pytest.mark.parametrize(
    ("is_native", "has_tiles", "suits_mkl"),
    [(True, True, False), (False, True, False), (False, False, False), (False, True, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_columns", [40, 3 * cpu.PIECES])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 9, cpu.MAX_TURNED_ROWS, cpu.MAX_TURNED_ROWS + 1])
def test_products_of_a_cpu(num_rows, num_columns, dtype, is_native, has_tiles, suits_mkl, monkeypatch):
    """Each form, with a tile that is no part of the matrix, against float64."""
    monkeypatch.setattr(cpu, "is_native", lambda dtype: is_native)
    monkeypatch.setattr(cpu, "has_tiles", lambda: has_tiles)
    monkeypatch.setattr(cpu, "suits_mkl", lambda: suits_mkl)
    monkeypatch.setattr(cpu, "TILE", 17 * 50)
    x, weight, bias, norm, draw = arguments(num_rows, num_columns, 50, "cpu", dtype)
    given = [
        {"rotary": Rotary(draw(num_rows, 10), draw(num_rows, 10), 3)},
        {"gated": True},
        {"residual": draw(num_rows, num_columns)},
    ]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    for options in (*given, {}):
        for given_bias in (bias, None):
            wide = {name: value.double() if torch.is_tensor(value) else value for name, value in options.items()}
            wide_bias = None if given_bias is None else given_bias.double()
            wide_norm = Norm(norm.weight.double(), norm.eps)
            expected = plain.reference(x.double(), weight.double(), wide_bias, norm=wide_norm, **wide)
            copies = {name: value.clone() if torch.is_tensor(value) else value for name, value in options.items()}
            got = linear.linear(x, weight, given_bias, norm=norm, **copies)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=tolerance)


@torch.inference_mode()
def test_the_runner_computes_logits_as_the_head_does():
    """Greedy tokens with the head as a product and as the module, which a hook asks for."""
    model = model_of("plain")
    requests = [Request([i + 1] * (i + 3), max_new_tokens=6) for i in range(3)]
    strategy = build("paged", model, num_blocks=64, block_size=4)
    expected = [result.token_ids for result in Runner(model, strategy).generate(requests)]
    seen = []
    handle = model.lm_head.register_forward_hook(lambda *args: seen.append(1))
    assert [result.token_ids for result in Runner(model, strategy).generate(requests)] == expected
    assert len(seen) == 6
    handle.remove()
    assert [result.token_ids for result in Runner(model, strategy).generate(requests)] == expected
    assert len(seen) == 6


def test_upstream_norm_and_rotary_are_meant(device):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    x, _, _, norm, draw = arguments(6, 8, 48, device)
    module = LlamaRMSNorm(48, norm.eps).to(device)
    module.weight.data = norm.weight
    torch.testing.assert_close(plain.rms_norm(x, norm), module(x), **EXACT)
    cos, sin = draw(6, 8), draw(6, 8)
    heads = x.view(1, 6, 6, 8).transpose(1, 2)  # [1, heads, T, D]
    first, second = apply_rotary_pos_emb(heads[:, :2], heads[:, 2:4], cos[None], sin[None])
    plain.rotate(x, Rotary(cos, sin, 4))
    torch.testing.assert_close(x.view(6, 6, 8)[:, :4].transpose(0, 1), torch.cat([first, second], dim=1)[0], **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 17, 64, 65])
def test_gpu_products_of_a_7b_layer(num_rows, device):
    """bf16, tuned sizes: no worse than cuBLAS with kernels of its own around it, against float64."""
    first = "rotary" if num_rows == 1 else "plain"
    for n, k, option in ((12288, 4096, first), (4096, 4096, "residual"), (22016, 4096, "gated"), (4096, 11008, "")):
        x, weight, _, norm, draw = arguments(num_rows, n, k, device, torch.bfloat16)
        options = {
            "rotary": {"norm": norm, "rotary": Rotary(draw(num_rows, 128), draw(num_rows, 128), 64)},
            "plain": {"norm": norm},
            "residual": {"residual": draw(num_rows, n)},
            "gated": {"norm": norm, "gated": True},
            "": {},
        }[option]

        def cast(value, dtype):
            if isinstance(value, tuple):
                return type(value)(*(cast(part, dtype) for part in value))
            return value.to(dtype, copy=True) if torch.is_tensor(value) else value

        wide = {name: cast(value, torch.float32) for name, value in options.items()}
        exact = plain.reference(x.float(), weight.float(), **wide).double()
        plainly = plain.reference(x, weight, **{name: cast(v, torch.bfloat16) for name, v in options.items()})
        error_plainly = (plainly.double() - exact).norm() / exact.norm()
        for plan in (None, replayed(device)):
            given = {name: cast(value, torch.bfloat16) for name, value in options.items()}
            got = linear.linear(x, weight, **given, plan=plan)
            error = (got.double() - exact).norm() / exact.norm()
            assert error < 1.05 * error_plainly + 1e-4, (num_rows, n, k, float(error), float(error_plainly))


def test_few_rows_suit_only_their_kernel(device, monkeypatch):
    """What the copy engine and the tensor cores of Hopper do not take goes to cuBLAS, as does what no graph holds."""
    x, weight, *_, norm, draw = arguments(4, 24, 40, device, torch.bfloat16)
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    assert triton_few_rows.suits(x, weight) == is_hopper
    monkeypatch.setattr(triton_few_rows, "can_overlap", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton_few_rows.suits(x, weight)

    seen = []
    monkeypatch.setattr(triton_few_rows, "linear", lambda *args, **options: seen.append((args, options)))
    residual = draw(4, 24)
    linear.many_rows(x, weight, None, norm=norm, residual=residual)
    assert not seen
    linear.many_rows(x, weight, None, norm=norm, residual=residual, plan=replayed(device))
    ((args, options),) = seen
    assert torch.equal(args[0], triton_fused.rms_norm(x, norm)) and args[1] is weight
    assert options["residual"] is residual and not options["gated"]

    for given in (
        (x.float(), weight.float()),
        (x, weight.half()),
        (x[:, :36].contiguous(), weight[:, :36].contiguous()),  # rows that are no whole 16 bytes apart
        (x.flatten()[4:-36].view(3, 40), weight),  # rows that begin between
        (x.repeat(17, 1), weight),
    ):
        assert not triton_few_rows.suits(*given)


COMPILE_FOR_HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from kv_strategies.kernels.linear.triton_few_rows import Tuning, rows_kernel

tuned, layout = Tuning(), gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
for gated, early in ((True, True), (False, False)):
    rows, width = 32, tuned.tile_n // 2 if gated else tuned.tile_n
    sizes = {"N": 4096, "PIECES": 16, "SHARE": 20, "BIAS": gated, "GATED": gated, "ADD": not gated,
             "STAGES": tuned.stages, "EARLY": early}
    types = {"weight": f"tensordesc<bf16[{width}, {tuned.tile_k}],{layout!r}>",
             "x": f"tensordesc<bf16[{rows}, {tuned.tile_k}],{layout!r}>", "bias": "*bf16", "out": "*bf16",
             "parts": "*fp32", "arrived": "*i32", "num_rows": "i32", "out_stride": "i32"}
    names = rows_kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    source = GluonASTSource(rows_kernel, signature, {(names.index(name),): size for name, size in sizes.items()}, {})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True})
    assert "wgmma" in built.asm["ptx"] and built.metadata.shared < 227 * 1024
"""


def test_few_rows_compile_for_hopper():
    """Gluon is experimental: whether the Triton that is installed has it as the kernel needs it takes no GPU to see."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE_FOR_HOPPER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tuned", [None, triton_few_rows.Tuning(128, 64, 3), triton_few_rows.Tuning(64, 256, 2)])
@pytest.mark.parametrize(("n", "k"), [(24, 40), (1000, 584), (4096, 11008), (22016, 4096)])
def test_gpu_few_rows(n, k, tuned, dtype, device):
    """Against float64, whatever is cut in how many parts; and every row as it is without its neighbours."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("for Hopper")
    tuned = {"tuned": tuned} if tuned else {}
    for num_rows in (2, 7, 16, 33, 64):
        x, weight, bias, _, draw = arguments(num_rows, n, k, device, dtype)
        residual = draw(num_rows, n)
        for options in ({}, {"bias": bias}, {"gated": True}, {"gated": True, "bias": bias}, {"residual": residual}):
            wide = {name: value.double() if torch.is_tensor(value) else value for name, value in options.items()}
            exact = plain.reference(x.double(), weight.double(), **wide)
            outs = []
            for rows in (slice(None), slice(None), slice(2)):
                copies = {**options, "residual": residual[rows].clone()} if "residual" in options else options
                outs.append(triton_few_rows.linear(x[rows], weight, **copies, **tuned))
            assert torch.equal(outs[0], outs[1]), "the same every time"
            assert torch.equal(outs[0][:2], outs[2]), "the same beside others"
            error = (outs[0].double() - exact).norm() / exact.norm()
            assert error < {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype], (num_rows, list(options), float(error))


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_stack_in_a_graph(device):
    """A captured decode step gives the tokens of the eager plain layers, in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model_of("plain").to(device)
    requests = [Request([i + 1] * (i + 3), max_new_tokens=20) for i in range(5)]
    tokens = []
    for is_fused, in_graphs in ((False, False), (True, False), (True, True)):
        strategy = build("paged", model, num_blocks=64, block_size=4)
        strategy.fused = is_fused
        results = Runner(model, strategy, cuda_graphs=in_graphs).generate(requests)
        tokens.append([result.token_ids for result in results])
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paged", "prefix", "window", "contiguous"])
def test_gpu_generate_replays_the_stack(name, device):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model_of("plain").to(device)
    prompts = torch.tensor([[0, 0, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]], device=device)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7], device=device)
    expected = model.generate(prompts, attention_mask=mask, max_new_tokens=40, do_sample=False)
    strategy = build(name, model, num_blocks=64)
    for cache in (strategy.cache(), strategy.cache(prompts, mask), strategy.cache(prompts, mask)):
        got = model.generate(prompts, attention_mask=mask, max_new_tokens=40, do_sample=False, **with_cache(cache))
        assert torch.equal(got, expected)
    assert strategy.door.graphs(strategy)._steps[2, 1024, 0]._replay is not None


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_graphs_of_few_rows_share_memory(device):
    """Graphs of several sizes over one pool of memory, replayed in any order: none leaves another's counters off."""
    torch.manual_seed(5)
    memory, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    weights = [torch.randn(n, 512, device=device, dtype=torch.bfloat16) for n in (640, 512, 9000)]
    graph_of, plan = {}, replayed(device)
    for num_rows in (64, 48, 32, 20, 16, 5):
        x = torch.randn(num_rows, 512, device=device, dtype=torch.bfloat16)

        def work(x=x):
            noise = [torch.full((1 << 16,), -1, dtype=torch.int32, device=x.device) for _ in range(8)]
            del noise  # memory that the graphs use over and over
            return [linear.linear(x, weight, plan=plan) for weight in weights]

        if num_rows != 64:  # without a warm-up, a graph has what it needs to itself
            graphs._warm_up(work, stream)
        graph_of[num_rows] = *graphs._record(work, stream, memory), [x @ weight.mT for weight in weights], x
    for num_rows in (5, 20, 64, 48, 16, 32, 64, 20):
        replay, outs, expected, _x = graph_of[num_rows]  # which the graph reads
        replay()
        for out, wanted in zip(outs, expected, strict=True):
            torch.testing.assert_close(out, wanted, atol=0.5, rtol=2e-2)
