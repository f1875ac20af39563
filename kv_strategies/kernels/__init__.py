"""Store K and V into blocks, attend over a block table, compact rows: one signature, three implementations.

    reference.py          the specification, plain torch, any device
    blocks/cpu.py         torch's flash attention over zero-copy views of the blocks
    blocks/triton_*.py    the GPU: store, split-KV decode, prefill, cascade, compaction
    blocks/library.py     the GPU: long prompts, by cuDNN
    linear/               what a decoder layer has beside attention, in the same manner
    triton_launch.py      what the layers of a step launch alike, decided once
    */invariant.py        both, so that no result depends on what is computed beside it
    triton_compile.py     many of the GPU's compiled at once, ahead of a warm-up

Tensors choose by where they live. The reference serves anywhere, and can be handed to a caller in place of the two
functions here. See `reference.py` for what the arguments mean.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..step.plan import LayerStore, Plan
from . import reference
from .blocks import cpu, topn
from .blocks import invariant as invariant_blocks
from .blocks.topn import topn_attention
from .linear import Rotary
from .linear import invariant as invariant_linear
from .linear import linear as fast_linear
from .linear import rotates_later as fast_rotates_later
from .reference import Decode, Encode, Visible


def store_kv(
    key: Tensor,
    value: Tensor,
    layer: LayerStore,
    slot_mapping: Tensor,
    query: Tensor | None = None,
    rotary: Rotary | None = None,
    plan: Plan | None = None,
) -> None:
    """Write this step's K and V, [T, Hkv, D] each, into the slots [T]; slot -1 writes nothing. See `reference`.

    With `rotary`, queries [T, Hq, D] and keys come as the product left them, and are rotated in place first.
    """
    store = cpu.store_kv
    if key.is_cuda:
        from .blocks.triton_store import store_kv as store  # Triton is there only where a GPU is
    store(key, value, layer, slot_mapping, query, rotary, plan)


def attention(
    query: Tensor,
    layer: LayerStore,
    plan: Plan,
    *,
    scaling: float,
    window: int = 0,
    sinks: int = 0,
    sink_query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """Causal attention of the queries [T, Hq, D] over what the block tables hold -> [T, Hq, D]. See `reference`.

    `key` and `value` [T, Hkv, D], optional, are this step's own (stored already): among many of them a GPU is spared
    the detour through the blocks.
    """
    attend = cpu.attention
    if query.is_cuda:
        from .blocks.gpu import attention as attend
    options = {"scaling": scaling, "window": window, "sinks": sinks, "sink_query": sink_query}
    return attend(query, layer, plan, key=key, value=value, **options)


def compact(plane: Tensor, sources: Tensor, targets: Tensor, kept: Tensor) -> None:
    """Move survivors of a row into its first blocks, in a plane [N, L, Hkv, block_size, ..]. See `reference`."""
    if plane.is_cuda:
        from .blocks.triton_compact import compact as move
    else:
        move = reference.compact
    move(plane, *(indices.to(plane.device) for indices in (sources, targets, kept)))


class Kernels(NamedTuple):
    """What stores and attends for a strategy, by the signatures of `reference.py` and `blocks/topn.py`, and computes
    the products of the fused stack, by those of `linear/`.
    """

    name: str
    store_kv: Callable[..., None]
    attention: Callable[..., Tensor]
    topn_attention: Callable[..., Tensor] | None
    linear: Callable[..., Tensor] = fast_linear
    rotates_later: Callable[[Tensor], bool] = fast_rotates_later
    capturable: bool = True  # whether a CUDA graph can hold their work
    needs_stack: bool = False  # whether only the fused stack keeps what they promise


#: Those of the device at hand: they know the codecs of this package, and masks of a window and sinks.
FAST = Kernels("fast", store_kv, attention, topn_attention)
#: The same for `deterministic=True`, where all tokens are seen and all of their bytes are read.
INVARIANT = Kernels(
    "invariant",
    store_kv,
    invariant_blocks.attention,
    None,
    invariant_linear.linear,
    invariant_linear.rotates_later,
    needs_stack=True,
)


def reference_kernels(encode: tuple[Encode, Encode], decode: Decode, visible: Visible) -> Kernels:
    """The specification at work, for bytes and masks that no fast kernel knows. See `Codec` and `Retention`."""
    return Kernels(
        "reference",
        partial(reference.store_kv, encode=encode),
        partial(reference.attention, decode=decode, visible=visible),
        partial(topn.reference, decode=decode, visible=visible),
        capturable=False,
    )
