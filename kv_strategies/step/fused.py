"""The decoder stack with fewer passes over memory: the same layers, the same mathematics, a third of the kernels.

One decode step of a layer reads its weights, its K and V, and almost nothing else; yet modules run one by one launch
some twenty kernels for it, most of them to read and write a few kilobytes. Here a layer is four products, each with
its neighbours inside (see `kernels/linear/`), around what the strategy does:

    x --- norm, q k v, rotary ---> attend ---> o, + x ---> norm, gate up, silu * ---> down, + x ---> x

For that q, k and v are one matrix, as are gate and up. The merged matrix is the storage, and the modules' own
parameters become views of its rows: nothing is held twice, and the plain layers keep working, which is what runs
wherever something asks for them (`supports` says when).

Over several ranks (`ranks.py`) these are the heads and columns that are here. o and down then give a part each of x:
the first rank adds it to x and the bias, the others to nothing, and the sum of all is x.

Costs: the weights are copied once, one layer at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from copy import copy
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)
from transformers.utils import output_capturing

from ..kernels.linear import Norm, Rotary
from .defaults import current
from .ranks import ranks_of
from .shards import local, sharded_dim
from .upstream import takes_cache
from .version import has_upstream_functions, hooks_of, is_globally_hooked, is_replaced, is_upstream, watch

#: Over several ranks, what is spread by columns, and what is whole on all; the rest of a layer is spread by rows.
_COLUMNS, _WHOLE = (
    [f"{module}.{kind}" for module in ("self_attn.o_proj", "mlp.down_proj")] for kind in ("weight", "bias")
)
_KINDS = {LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, nn.Linear, SiLUActivation, nn.SiLU}


class FusedStack:
    """Stands in for all decoder layers of a model: called as one of them is, it runs them all."""

    def __init__(self, model: LlamaForCausalLM):
        """Merges the weights of each layer, in place."""
        layers = _layers(model)
        attention = layers[0].self_attn
        self.device = attention.q_proj.weight.device  # of the first layer
        self._ranks = ranks_of(model)
        self._layers = [_Layer(layer, self._ranks.is_first) for layer in layers]
        self._model = weakref.ref(model)
        self._read = _read(layers)

    @property
    def is_current(self) -> bool:
        """Whether the layers are upstream's own and read what was merged."""
        model = self._model()
        return model is not None and supports(model) and _read(_layers(model)) == self._read

    def first(self) -> FusedStack:
        """Its first layer alone, which launches what each of them does."""
        stack = copy(self)
        stack._layers = self._layers[:1]
        return stack

    @takes_cache
    def __call__(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], cache, **kwargs) -> Tensor:
        """The layers one after the other. Arguments as of `LlamaDecoderLayer.forward`.

        Args:
            hidden_states: [B, n, hidden]
            position_embeddings: cos and sin, [B or 1, n, D] each.
            cache: one that attends.
        """
        num_rows, _, hidden = hidden_states.shape
        cos, sin = (part.expand(num_rows, -1, -1).flatten(0, 1) for part in position_embeddings)
        if not cos.is_cuda:
            cos, sin = cos.float(), sin.float()  # once, not once a layer
        x = hidden_states.reshape(-1, hidden).clone()  # [T, hidden], changed in place from layer to layer
        for device, layers in groupby(self._layers, key=attrgetter("device")):
            with current(device):
                x, cos, sin = (tensor.to(device) for tensor in (x, cos, sin))
                x = self._run(layers, x, cos, sin, cache)
        return x.view(hidden_states.shape)

    def _run(self, layers: Iterable[_Layer], x: Tensor, cos: Tensor, sin: Tensor, cache) -> Tensor:
        """Layers of one device, one after the other, on x [T, hidden], which they may write over -> [T, hidden]."""
        kernels, ranks = cache.strategy.kernels, self._ranks
        product, rotates_later = partial(kernels.linear, plan=cache.plan), kernels.rotates_later(x)
        for layer in layers:
            rotary = Rotary(cos, sin, layer.heads[0] + layer.heads[1])
            inside, later = (None, rotary) if rotates_later else (rotary, None)
            qkv = product(x, *layer.qkv, norm=layer.input_norm, rotary=inside)
            qkv = qkv.view(x.shape[0], -1, cos.shape[1]).split_with_sizes(layer.heads, 1)  # 3 of [T, H, D]
            out = cache.attend_flat(layer.index, *qkv, layer.scaling, later)  # [T, Hq, D]
            x = ranks.add(product(out.flatten(1), *layer.o, residual=x if ranks.is_first else None))
            gated = product(x, *layer.gate_up, norm=layer.mlp_norm, gated=True)
            x = ranks.add(product(gated, *layer.down, residual=x if ranks.is_first else None))
        return x


class _Layer:
    """The weights of one layer: (weight, bias) pairs, bias None where there is none, or where another rank adds it."""

    def __init__(self, layer: LlamaDecoderLayer, is_first: bool):
        attention, mlp = layer.self_attn, layer.mlp
        qkv, gate_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
        self.index, self.scaling = attention.layer_idx, attention.scaling
        self.device = attention.q_proj.weight.device
        self.heads = [len(local(module.weight)) // attention.head_dim for module in qkv]
        self.qkv, self.gate_up = _merge(qkv), _merge(gate_up)
        weights = [_weights(module) for module in (attention.o_proj, mlp.down_proj)]
        self.o, self.down = (pair if is_first else (pair[0], None) for pair in weights)
        self.input_norm, self.mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)


class _Made:
    """The stack of a model, and the number of the layout (`version.py`) that it was last seen to fit."""

    def __init__(self) -> None:
        self.layout, self.stack, self.is_used = -1, None, False


def stack_of(model: LlamaForCausalLM) -> FusedStack | None:
    """The stack that runs the layers of `model`, made when it is first asked for; None where they run by themselves.

    It lives as long as somebody watches the model (`version.py`), as every strategy does.
    """
    watched = watch(model)
    with watched.lock:
        numbers = watched.numbers
        made = watched.made.setdefault("stack", _Made())
        if made.layout != numbers.layout:
            made.is_used = supports(model)  # adapters or hooks come, and go again
            if made.is_used and (made.stack is None or not made.stack.is_current):
                made.stack = FusedStack(model)
                watched.adopt()
            made.layout = numbers.layout
        return made.stack if made.is_used else None


def supports(model: LlamaForCausalLM) -> bool:
    """Whether the layers are upstream's own, so that running them otherwise changes nothing that anyone could see.

    Not so with quantised or adapted linear layers, weights sharded otherwise than upstream's plan for Llama does, hooks
    (offloading, probes; also those of all modules), a layer on several devices, weights shared between layers, another
    activation, replaced methods, of one module or of its class, or layers that disagree about a head.
    """
    layers = _layers(model)
    named = [named for layer in layers for named in layer.named_parameters()]
    parameters = [local(parameter) for _, parameter in named]
    modules = [module for layer in layers for module in layer.modules()]
    attentions = [getattr(layer, "self_attn", None) for layer in layers]
    return (
        bool(layers)
        and all(type(module) in _KINDS for module in modules)
        and all(type(layer) is LlamaDecoderLayer for layer in layers)
        and all(map(is_upstream, {LlamaModel, *map(type, modules)}))
        and has_upstream_functions()
        and not is_globally_hooked()
        and not any(_is_changed(module) for module in modules)
        and _are_sharded(named)
        and len({(parameter.dtype, parameter.is_inference()) for parameter in parameters}) == 1
        and all(len({parameter.device for parameter in layer.parameters()}) == 1 for layer in layers)
        and parameters[0].is_floating_point()
        and len({(parameter.device, parameter.data_ptr()) for parameter in parameters}) == len(parameters)
        and all(type(layer.mlp.act_fn) in (SiLUActivation, nn.SiLU) for layer in layers)
        and len({attention.head_dim for attention in attentions}) == 1
        and len({attention.layer_idx for attention in attentions}) == len(attentions)
    )


def _are_sharded(named: list[tuple[str, Tensor]]) -> bool:
    """Whether all parameters are whole, or all sharded as upstream's plan for Llama does; by names within a layer."""
    dims = [
        (sharded_dim(parameter), None if "norm" in name or name in _WHOLE else int(name in _COLUMNS))
        for name, parameter in named
    ]
    is_sharded = any(dim is not None for dim, _ in dims)
    return all(dim == (wanted if is_sharded else None) for dim, wanted in dims) and all(
        type(parameter) is nn.Parameter or dim is not None for (_, parameter), (dim, _) in zip(named, dims, strict=True)
    )


def _layers(model: LlamaForCausalLM) -> list[LlamaDecoderLayer]:
    return list(model.model.layers)[: model.config.num_hidden_layers]


def _read(layers: list[LlamaDecoderLayer]) -> list[tuple]:
    """What a stack takes from the layers, by which it is known again: where weights lie, and numbers."""
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    return [
        *(
            (p.device, p.data_ptr(), p.shape, p.stride(), p.dtype)
            for layer in layers
            for p in map(local, layer.parameters())
        ),
        *((layer.self_attn.layer_idx, layer.self_attn.scaling, layer.self_attn.head_dim) for layer in layers),
        *((norm.variance_epsilon,) for norm in norms),
    ]


class Tail(NamedTuple):
    """What is behind the layers: the final norm, and weight and bias of the product that gives the logits, or over
    several ranks some of their columns.
    """

    norm: Norm
    weight: Tensor
    bias: Tensor | None


def tail_of(model: LlamaForCausalLM) -> Tail | None:
    """What `model` does with the states of its last layer, for `linear`; None where one could see the difference, and
    not by rounding alone.
    """
    inner, head, norm = model.model, model.lm_head, model.model.norm
    if (type(model), type(inner)) != (LlamaForCausalLM, LlamaModel):
        return None
    if (type(head), type(norm)) != (nn.Linear, LlamaRMSNorm) or head.weight.dtype != norm.weight.dtype:
        return None
    dim = sharded_dim(head.weight)
    if (dim is None and type(head.weight) is not nn.Parameter) or dim or not local(head.weight).is_contiguous():
        return None
    if is_globally_hooked() or not all(map(is_upstream, (LlamaForCausalLM, LlamaModel, nn.Linear, LlamaRMSNorm))):
        return None
    if any(map(_is_changed, (model, inner, head, norm))) or norm.weight.device != head.weight.device:
        return None
    return Tail(_norm(norm), *_weights(head))


def is_observed() -> bool:
    """Whether this forward has to show what is between the layers (`output_hidden_states`)."""
    return bool(output_capturing._active_collector.get())


def _is_changed(module: nn.Module) -> bool:
    """Whether calling it does something else than its class says."""
    return is_replaced(module) or bool(module._compiled_call_impl or hooks_of(module))


def _merge(modules: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """One matrix of all rows, whose rows become the modules' own weights; and the same for the biases."""
    merged = []
    for name in ("weight", "bias"):
        parts = [local(getattr(module, name)) for module in modules]
        if all(part is None for part in parts):
            merged.append(None)
            continue
        parts = [
            (weight := local(module.weight)).new_zeros(len(weight)) if part is None else part
            for part, module in zip(parts, modules, strict=True)
        ]
        with torch.inference_mode(modules[0].weight.is_inference()), torch.no_grad():  # what they were, they stay
            whole = _adjoining(parts)
            if whole is None:
                whole = torch.cat([part.detach() for part in parts])
            for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                part.data = rows
        merged.append(whole)
    return merged[0], merged[1]


def _adjoining(parts: list[Tensor]) -> Tensor | None:
    """The matrix whose rows these are already, one behind the other, as another stack has left them."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != end:
            return None
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += part.numel() * part.element_size()
    shape = sum(map(len, parts)), *first.shape[1:]
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


def _weights(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return local(module.weight).detach(), None if module.bias is None else local(module.bias).detach()


def _norm(module: LlamaRMSNorm) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)
