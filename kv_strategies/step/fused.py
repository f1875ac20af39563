"""The decoder stack with fewer passes over memory: the same layers, the same mathematics, a third of the kernels.

One decode step of a layer reads its weights, its K and V, and almost nothing else; yet modules run one by one launch
some twenty kernels for it, most of them to read and write a few kilobytes. Here a layer is four products, each with
its neighbours inside (see `kernels/linear/`), around what the strategy does:

    x --- norm, q k v, rotary ---> attend ---> o, + x ---> norm, gate up, silu * ---> down, + x ---> x

For that q, k and v are one matrix, as are gate and up. The merged matrix is the storage, and the modules' own
parameters become views of its rows: nothing is held twice, and the plain layers keep working, which is what runs
wherever something asks for them (`supports` says when).

Costs: the weights are copied once, one layer at a time.
"""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.utils import output_capturing

from ..kernels.linear import Norm, Rotary, linear, rotates_later
from .upstream import takes_cache

#: What has been decided about a model, for all its strategies; None where the plain layers run.
_STACKS: WeakKeyDictionary[LlamaForCausalLM, FusedStack | None] = WeakKeyDictionary()


class FusedStack:
    """Stands in for all decoder layers of a model: called as one of them is, it runs them all."""

    def __init__(self, model: LlamaForCausalLM):
        """Merges the weights of each layer, in place."""
        attention = model.model.layers[0].self_attn
        self.device = attention.q_proj.weight.device
        self._head_dim, self._scaling = attention.head_dim, attention.scaling
        self._layers = [_Layer(layer) for layer in model.model.layers]
        modules = [module for layer in model.model.layers for module in layer.modules()]
        members = [members for module in modules for members in (module._modules, module._parameters)]
        self._members = [(members, name, member) for members in members for name, member in members.items()]
        self._hooks = [(hooks, len(hooks)) for module in modules for hooks in _hooks(module)]

    @property
    def is_current(self) -> bool:
        """Whether the modules are as they were when they were merged: none replaced, moved or hooked since."""
        return (
            all(members[name] is member for members, name, member in self._members)
            and all(len(hooks) == count for hooks, count in self._hooks)
            and all(layer.is_in_place for layer in self._layers)
        )

    @takes_cache
    def __call__(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], cache, **kwargs) -> Tensor:
        """The layers one after the other. Arguments as of `LlamaDecoderLayer.forward`.

        Args:
            hidden_states: [B, n, hidden]
            position_embeddings: cos and sin, [B or 1, n, D] each.
            cache: one that attends.
        """
        num_rows, num_columns, hidden = hidden_states.shape
        cos, sin = (part.expand(num_rows, -1, -1).flatten(0, 1) for part in position_embeddings)
        if not cos.is_cuda:
            cos, sin = cos.float(), sin.float()  # once, not once a layer
        x = hidden_states.reshape(-1, hidden).clone()  # [T, hidden], changed in place from layer to layer
        product = partial(linear, is_replayed=cache.plan.is_replayed)
        for layer_idx, layer in enumerate(self._layers):
            heads = [size // self._head_dim for size in layer.qkv_sizes]
            rotary = Rotary(cos, sin, heads[0] + heads[1])
            inside, later = (None, rotary) if rotates_later(x) else (rotary, None)
            qkv = product(x, *layer.qkv, norm=layer.input_norm, rotary=inside)
            qkv = qkv.view(num_rows, num_columns, -1, self._head_dim).transpose(1, 2)  # [B, Hq + 2 Hkv, n, D]
            out = cache.attend(layer_idx, *qkv.split(heads, dim=1), self._scaling, later)  # [B, n, Hq * D]
            product(out.flatten(0, 1), *layer.o, residual=x)
            gated = product(x, *layer.gate_up, norm=layer.mlp_norm, gated=True)
            product(gated, *layer.down, residual=x)
        return x.view(hidden_states.shape)


class _Layer:
    """The weights of one layer: (weight, bias) pairs, bias None where there is none."""

    def __init__(self, layer: LlamaDecoderLayer):
        attention, mlp = layer.self_attn, layer.mlp
        qkv, gate_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
        self.qkv_sizes = [module.out_features for module in qkv]
        self.qkv, self.gate_up = _merge(qkv), _merge(gate_up)
        self.o, self.down = _weights(attention.o_proj), _weights(mlp.down_proj)
        self.input_norm, self.mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._first = attention.q_proj.weight

    @property
    def is_in_place(self) -> bool:
        """Whether the modules read the merged memory."""
        return self._first.data_ptr() == self.qkv[0].data_ptr()


def stack_of(model: LlamaForCausalLM) -> FusedStack | None:
    """The stack that runs the layers of `model`, made when it is first asked for; None where they run by themselves."""
    if model not in _STACKS:
        _STACKS[model] = FusedStack(model) if supports(model) else None
    stack = _STACKS[model]
    if stack is None or stack.is_current:
        return stack
    if not supports(model):  # adapters or hooks have come, and may go again
        return None
    stack = _STACKS[model] = FusedStack(model)
    return stack


def supports(model: LlamaForCausalLM) -> bool:
    """Whether the layers are upstream's own, so that running them otherwise changes nothing that anyone could see.

    Not so with quantised or adapted linear layers, tensor parallelism, hooks (offloading, probes), layers on several
    devices, weights shared between layers, another activation, or replaced methods.
    """
    layers = list(model.model.layers)
    kinds = {LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, nn.Linear, SiLUActivation, nn.SiLU}
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    modules = [module for layer in layers for module in layer.modules()]
    return (
        bool(layers)
        and all(type(module) in kinds for module in modules)
        and not any("forward" in vars(module) or _has_hooks(module) for module in modules)
        and all(type(parameter) is nn.Parameter for parameter in parameters)  # a sharded one is of another type
        and len({(parameter.device, parameter.dtype, parameter.is_inference()) for parameter in parameters}) == 1
        and parameters[0].is_floating_point()
        and len({parameter.data_ptr() for parameter in parameters}) == len(parameters)
        and all(type(layer.mlp.act_fn) in (SiLUActivation, nn.SiLU) for layer in layers)
    )


def head_of(model: LlamaForCausalLM) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the product that gives the logits, for `linear`; None where one could see the difference, and
    not by rounding alone.
    """
    head = model.lm_head
    if type(model) is not LlamaForCausalLM or head.weight.dtype != model.model.norm.weight.dtype:
        return None
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter or not head.weight.is_contiguous():
        return None
    modules = (model, head)
    if any("forward" in vars(module) or module._compiled_call_impl or _has_hooks(module) for module in modules):
        return None
    return _weights(head)


def is_observed() -> bool:
    """Whether this forward has to show what is between the layers (`output_hidden_states`)."""
    return bool(output_capturing._active_collector.get())


def _has_hooks(module: nn.Module) -> bool:
    hooks = [hook for hooks in _hooks(module) for hook in hooks.values()]
    return any(hook.__module__ != output_capturing.__name__ for hook in hooks)  # those wait until they are wanted


def _hooks(module: nn.Module) -> tuple[dict, dict]:
    return module._forward_pre_hooks, module._forward_hooks


def _merge(modules: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """One matrix of all rows, whose rows become the modules' own weights; and the same for the biases."""
    merged = []
    for name in ("weight", "bias"):
        parts = [getattr(module, name) for module in modules]
        if all(part is None for part in parts):
            merged.append(None)
            continue
        parts = [
            module.weight.new_zeros(module.out_features) if part is None else part
            for part, module in zip(parts, modules, strict=True)
        ]
        with torch.inference_mode(modules[0].weight.is_inference()), torch.no_grad():  # what they were, they stay
            whole = torch.cat([part.detach() for part in parts])
            for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                part.data = rows
        merged.append(whole)
    return merged[0], merged[1]


def _weights(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def _norm(module: LlamaRMSNorm) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)
