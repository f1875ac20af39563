"""Launches that layers share: a kept kernel serves only what Triton would have compiled alike."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_kernels import CODES, Shape, assert_close
from test_kernels import build as build_case
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kv_strategies.kernels import reference
from kv_strategies.kernels.blocks import (
    triton_cascade,
    triton_decode,
    triton_decode_any,
    triton_decode_codes,
    triton_decode_groups,
    triton_prefill,
    triton_store,
    triton_turn,
)
from kv_strategies.kernels.linear import Norm, Rotary, triton_fused
from kv_strategies.kernels.triton_launch import Launch
from kv_strategies.step.plan import LayerStore

KERNELS = {
    triton_cascade: ["cascade_kernel"],
    triton_decode_any: ["decode_kernel"],
    triton_decode_codes: ["decode_codes_kernel"],
    triton_decode_groups: ["decode_groups_kernel"],
    triton_prefill: ["prefill_kernel"],
    triton_store: ["store_kernel"],
    triton_turn: ["turn_kernel"],
    triton_fused: ["rms_norm_kernel", "silu_mul_kernel"],
}


class Watched(JITFunction):
    """A kernel that is never compiled: it asks Triton what each launch is specialised for."""

    def __init__(self, kernel, launched: list):
        options = vars(kernel).get("kwargs", vars(kernel))  # of the interpreter's, and of others
        names = ("do_not_specialize", "do_not_specialize_on_alignment")
        super().__init__(kernel.fn, **{name: options.get(name) for name in names})
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(self.signature, self.params, backend)
        self.launched = launched

    def __getitem__(self, grid):
        return partial(Compiled, self, grid)


class Compiled(CompiledKernel):
    """What a `Watched` kernel gives for a launch, as a compiled one would."""

    def __init__(self, kernel: Watched, grid, *args, **options):
        self.kernel = kernel
        self.made_for = self._list("asked", grid, *args, **options)

    def __del__(self):
        pass  # nothing was loaded

    def __getitem__(self, grid):
        def run(*args) -> None:
            assert self._list("kept", grid, *args) == self.made_for

        return run

    def _list(self, how: str, grid, *args, **options) -> list:
        """What decides what is compiled, but options: dtypes, alignment, special numbers, and `tl.constexpr`."""
        bound, specialisation, _ = self.kernel.bind(*args, **options)
        values = [(v.shape, v.stride()) if torch.is_tensor(v) else v for v in bound.values()]
        self.kernel.launched.append((how, self.kernel.fn.__name__, (*grid, 1, 1)[:3], specialisation, values))
        fixed = [bound[param.name] for param in self.kernel.params if param.is_constexpr]
        return specialisation + fixed


@contextmanager
def watched():
    """Inside, nothing is launched but listed: whether Triton was asked, kernel, grid, specialisation, arguments."""
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(module, name, Watched(getattr(module, name), launched))
        yield launched


def somewhere(tensor: torch.Tensor, draw) -> torch.Tensor:
    """The same numbers at another address, some with another distance from row to row."""
    offset, gap = draw(st.sampled_from([0, 0, 1, 2, 8, 16])), draw(st.sampled_from([0, 0, 1, 16]))
    row = tensor[0].numel() + gap
    memory = torch.zeros(offset + len(tensor) * row + 64, dtype=tensor.dtype)
    begin = -memory.data_ptr() % 64 // tensor.element_size() + offset
    flat = memory[begin : begin + len(tensor) * row].view(len(tensor), row)[:, : row - gap]
    return flat.view(tensor.shape).copy_(tensor)


@settings(max_examples=60, deadline=None, phases=set(Phase) - {Phase.shrink})
@given(st.data())
def test_what_is_kept_is_what_would_be_asked_for(data):
    """Layers with tensors at any address and of any strides, each launched as if it were the only one."""
    draw = data.draw
    groups = draw(st.sampled_from([(), ((0, 2, 32),)]))
    codes, group = draw(st.sampled_from([None, *CODES])), draw(st.sampled_from([1, 4]))
    shape = Shape((1, 1, 12, 3), (60, 50, 30, 3), group=group, codes=codes, dtype=torch.bfloat16, groups=groups)
    case = build_case(shape)
    with watched() as launched:
        for _ in range(draw(st.integers(2, 5))):
            layer = LayerStore(*(None if plane is None else somewhere(plane, draw) for plane in case.layer))
            query, key, value = (somewhere(states, draw) for states in (case.query, case.key, case.value))
            cos, sin = (somewhere(torch.ones(len(query), shape.dim), draw) for _ in "cs")
            rotary = draw(st.sampled_from([None, Rotary(cos, sin, 0)]))
            x, weight = somewhere(case.query.flatten(1), draw), somewhere(torch.ones(1, case.query[0].numel()), draw)
            eps, scaling = draw(st.sampled_from([1e-5, 1e-6])), draw(st.sampled_from([0.1, 0.2]))
            window = 0 if groups else draw(st.sampled_from([0, 20]))
            options = {"scaling": scaling, "window": window, "sinks": draw(st.sampled_from([0, 4]))}

            tuned = draw(st.sampled_from([None, triton_decode.Tuning(tile=16, num_warps=1)]))
            told = []
            for plan in (case.plan, replace(case.plan, scratch={})):
                del launched[:]
                triton_store.store_kv(key, value, layer, plan.slot_mapping, query, rotary, plan)
                shared = triton_cascade.read_shared(query, layer, plan, scaling=scaling)
                triton_decode.decode(query, layer, plan, query, **options, shared=shared, tuned=tuned)
                triton_prefill.prefill(query, layer, plan, query, 2, 4, **options, shared=shared)
                triton_turn.turn(query, plan)
                triton_fused.rms_norm(x, Norm(weight[0], eps), plan)
                triton_fused.silu_mul(x, plan)
                told.append([launch[1:] for launch in launched])
            assert told[0] == told[1]


def test_alike_layers_ask_once():
    case = build_case(Shape(dtype=torch.bfloat16))
    out = torch.empty_like(case.query)
    with watched() as launched:
        for _ in range(3):
            triton_decode.decode(case.query, case.layer, case.plan, out, **case.options)
        for _ in range(2):
            triton_turn.turn(case.query)  # without a plan
    assert [how for how, *_ in launched] == ["asked", "kept", "kept", "asked", "asked"]


@pytest.mark.parametrize("who", ["run", "hook", "amd"])
def test_nothing_is_kept_from_who_takes_part_in_launches(who, monkeypatch):
    """Somebody who compiles without launching, a hook, a compiler that looks at more."""
    case = build_case(Shape(dtype=torch.bfloat16))
    with watched() as launched:
        if who == "run":
            monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)
        elif who == "hook":
            triton_turn.turn_kernel.add_pre_run_hook(lambda *args, **options: None)
        else:
            monkeypatch.setattr(torch.version, "hip", "7")
        for _ in range(2):
            triton_turn.turn(case.query, case.plan)
    assert [how for how, *_ in launched] == ["asked", "asked"]


@pytest.mark.gpu
def test_gpu_kept_kernels(device, monkeypatch):
    """Layers by the kernel that the first has asked for; a profiler's hook sees all of them."""
    case, seen = build_case(Shape(dtype=torch.bfloat16), device), []
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [seen.append])
    for _ in range(3):
        query, out = torch.randn_like(case.query), torch.empty_like(case.query)
        triton_decode.decode(query, case.layer, case.plan, out, **case.options)
        assert_close(out, reference.attention(query, case.layer, case.plan, **case.options))
    (kept,) = (made for made in case.plan.scratch.values() if isinstance(made, Launch))
    assert kept.compiled is not None and len(seen) == 3
