"""Models that no strategy can serve are refused by name, with what to pass instead."""

from __future__ import annotations

import warnings

import pytest
import torch
from common import tiny_llama
from torch import nn

from kv_strategies import build


def refused(model, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("paged", model, num_blocks=4)


def test_a_compiled_model_is_named():
    model = tiny_llama()
    refused(torch.compile(model), r"compiled model \(LlamaForCausalLM under torch.compile\).*pass model._orig_mod")


def test_a_quantised_model_is_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(tiny_llama(), {nn.Linear}, dtype=torch.qint8)
    refused(model, r"model.layers.0.self_attn.q_proj is a torch\.ao\..*a quantised layer.*not weights")


def test_codes_in_place_of_weights_are_named():
    model = tiny_llama()
    projection = model.model.layers[1].self_attn.k_proj
    projection.weight = nn.Parameter(projection.weight.data.to(torch.int8), requires_grad=False)
    refused(model, "model.layers.1.self_attn.k_proj is a torch.nn.modules.linear.Linear, a quantised layer")


def test_weights_on_meta_are_named():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.to("meta")
    refused(model, r"model.layers.1.mlp.up_proj.weight is on the meta device")


def test_another_model_is_named():
    refused(nn.Linear(2, 2), r"of type 'Linear' \(Linear\), and only LlamaForCausalLM is patched")
