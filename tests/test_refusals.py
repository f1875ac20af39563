"""Models that no strategy can serve are refused by name, with what to pass instead."""

from __future__ import annotations

import warnings

import pytest
import torch
from common import tiny_llama
from torch import nn

from kv_strategies import build


class Adapted(nn.Module):
    """As peft wraps a model: its base model holds the adapters."""

    def __init__(self, model, is_prompt_learning=False):
        super().__init__()
        self.base = model
        self.peft_config = {"default": None}
        kind = "PREFIX_TUNING" if is_prompt_learning else "LORA"
        self.active_peft_config = type("Config", (), {"is_prompt_learning": is_prompt_learning, "peft_type": kind})()

    def get_base_model(self):
        return self.base


def refused(model, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("paged", model, num_blocks=4)


def test_an_adapted_model_is_asked_for_its_base():
    model = tiny_llama()
    refused(Adapted(model), r"this is a Adapted: pass model.get_base_model\(\)")
    build("paged", Adapted(model).get_base_model(), num_blocks=4)
    refused(Adapted(model, is_prompt_learning=True), "PREFIX_TUNING: prompt learning puts K and V of its own")


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
