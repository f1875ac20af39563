"""The forward: a Llama model over packed tokens, its attention handed to a strategy.

Upstream asks a cache for K and V as two dense tensors (`update`), which a paged store cannot give without copying all
of it. The patched model asks differently, twice: `plan_forward` once a forward, in place of building a mask, and
`attend` once a layer, in place of `update` and attention. `AttendingCache` answers both; the doors tell it the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from ..kernels import Kernels
from ..kernels.linear import Rotary
from . import fused
from .defaults import current
from .fused import FusedStack
from .plan import Plan
from .ranks import Ranks
from .shards import embed
from .upstream import takes_cache, with_cache

NEEDS_STACK = (
    "deterministic=True runs layers, norm and head in its own order of addition, and this model cannot be run so: "
    "hooks, adapters, replaced methods, quantised layers, or output_hidden_states want modules to be called "
    "one by one. Take them away, or build without it"
)


class Seen(NamedTuple):
    """A model as it was when somebody last looked, which whoever runs a forward does before (`Strategy.follow`)."""

    layout: int  # see `version.py`
    content: int
    stack: FusedStack | None  # what runs its layers; None for the layers themselves
    is_opaque: bool  # hooks want to be called, or replaced methods, which no graph does


class Attends(Protocol):
    """What stores K and V and computes the attention: a strategy."""

    name: str
    model: LlamaForCausalLM
    kernels: Kernels
    fused: bool
    ranks: Ranks
    seen: Seen
    addresses: tuple[int, int]  # differ where a captured step would read or write elsewhere

    def follow(self) -> None: ...

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        scaling: float,
        rotary: Rotary | None = None,
    ) -> Tensor: ...


class AttendingCache(Cache):
    """What the patched model sees: a cache that attends. The plan says to what."""

    def __init__(self, strategy: Attends):
        super().__init__(layers=[])
        self.strategy = strategy
        self.plan: Plan | None = None

    @property
    def decoder_layers(self):
        """The stack that `LlamaModel` runs: the strategy's own, in one piece, or the plain layers."""
        if self._has_stack():
            return [self._stack()]
        if self.strategy.kernels.needs_stack:
            raise ValueError(NEEDS_STACK)
        model = self.strategy.model
        return model.model.layers[: model.config.num_hidden_layers]

    def _has_stack(self) -> bool:
        """Whether all layers run in one piece: not where somebody looks at each of them."""
        return self._stack() is not None and not fused.is_observed()

    def _stack(self) -> Callable[..., Tensor] | None:
        """What stands in for the layers: the fused stack, or a captured step of it."""
        return self.strategy.seen.stack

    @takes_cache
    def plan_forward(self, config, inputs_embeds: Tensor, attention_mask, cache, position_ids) -> None:
        """Called in place of `create_causal_mask`. The plan is there already; the model may have changed."""
        self.strategy.follow()

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store K and V of the new tokens and attend to all tokens of the row.

        Args:
            query: [B, Hq, n, D]; key, value: [B, Hkv, n, D], keys rotated.

        Returns:
            [B, n, Hq * D]
        """
        num_rows, _, num_columns, _ = query.shape
        flat = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        return self.attend_flat(layer_idx, *flat, scaling).reshape(num_rows, num_columns, -1)

    def attend_flat(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """The same for tokens one behind the other, row by row.

        Args:
            query: [B * n, Hq, D]; key, value: [B * n, Hkv, D], keys rotated, unless `rotary` comes with them.

        Returns:
            [B * n, Hq, D]
        """
        return self.strategy.attend(layer_idx, query, key, value, self.plan.on(query.device), scaling, rotary)

    def update(self, *args, **kwargs):
        raise RuntimeError(
            f"a {self.strategy.name!r} cache has no dense K and V to return: this model's attention is not patched. "
            "It serves the LlamaForCausalLM that the strategy was built for"
        )

    def __bool__(self) -> bool:
        return True  # also while it is empty: `cache or DynamicCache()` means this one

    def __reduce__(self):
        raise TypeError(
            f"a {self.strategy.name!r} cache cannot be pickled: its K and V are blocks of a pool of this process. "
            "strategy.save(path) keeps those that are shared"
        )

    @property
    def is_compileable(self) -> bool:
        return False  # else generate() would compile the forward by itself

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_linear(self) -> list[bool]:
        # generate() skips what is cached unless all layers are linear, as all are of a cache that lists none.
        return [False] * len(self.strategy.model.model.layers)


def forward(cache: AttendingCache, plan: Plan, input_ids: Tensor, last: Tensor | int) -> Tensor:
    """Logits [R, V] of the packed tokens at `last`: by the fused stack and what is around it, or by the model's own
    modules, where these have to be called.

    Args:
        input_ids: [T]; last: [R] indices into T, or 0 for all of them.

    Raises:
        ValueError: the kernels serve the fused stack alone, and the model cannot be run so.
    """
    strategy, cache.plan = cache.strategy, plan
    model = strategy.model
    strategy.follow()
    stack = None if fused.is_observed() else strategy.seen.stack
    tail = None if stack is None else fused.tail_of(model)
    if tail is None:
        if strategy.kernels.needs_stack:
            raise ValueError(NEEDS_STACK)
        inputs = {"input_ids": input_ids[None], "position_ids": plan.positions[None], "use_cache": True}
        if isinstance(last, int) or all(part.device == last.device for part in model.model.norm.parameters()):
            return model(**inputs, **with_cache(cache), logits_to_keep=last).logits[0]
        states = model.model(**inputs, **with_cache(cache)).last_hidden_state[0]  # where the last layer is
        return model.lm_head(states[last.to(states.device)])
    states = embed(model.model.embed_tokens, input_ids[None], strategy.ranks)  # [1, T, hidden]
    angles = model.model.rotary_emb(states, position_ids=plan.positions[None])
    states = stack(states, position_embeddings=angles, **with_cache(cache))[0]
    states = states if isinstance(last, int) else states[last.to(states.device)]
    states = states.to(tail.weight.device)
    with current(states.device):
        logits = strategy.kernels.linear(states, tail.weight, tail.bias, norm=tail.norm, plan=plan)
    return strategy.ranks.join(logits, model.config.vocab_size)
