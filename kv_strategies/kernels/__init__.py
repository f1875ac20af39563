"""Store K and V into blocks, attend over a block table: one signature, three implementations.

    reference.py   the specification, plain torch, any device
    cpu.py         torch's flash attention over zero-copy views of the blocks
    triton_*.py    the GPU: store, split-KV decode, prefill, cascade
    library.py     the GPU: long prompts, by cuDNN

Tensors choose by where they live. See `reference.py` for what the arguments mean. What a decoder layer has beside
attention is in `linear.py`, in the same manner.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..step.plan import LayerStore, Plan
from . import cpu, reference, topn
from .linear import Rotary, rotate_heads
from .topn import topn_attention


def store_kv(
    key: Tensor,
    value: Tensor,
    layer: LayerStore,
    slot_mapping: Tensor,
    query: Tensor | None = None,
    rotary: Rotary | None = None,
) -> None:
    """Write this step's K and V, [T, Hkv, D] each, into the slots [T]; slot -1 writes nothing. See `reference`.

    With `rotary`, queries [T, Hq, D] and keys come as the product left them, and are rotated in place first.
    """
    if key.is_cuda:
        from .triton_store import store_kv as store_on_gpu  # Triton is there only where a GPU is

        store_on_gpu(key, value, layer, slot_mapping, query, rotary)
        return
    if rotary is not None:
        rotate_heads(query, rotary)
        rotate_heads(key, rotary)
    cpu.store_kv(key, value, layer, slot_mapping)


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
    options = {"scaling": scaling, "window": window, "sinks": sinks, "sink_query": sink_query}
    if query.is_cuda:
        from .gpu import attention as attention_on_gpu

        return attention_on_gpu(query, layer, plan, key=key, value=value, **options)
    return cpu.attention(query, layer, plan, **options)


class Kernels(NamedTuple):
    """What stores and attends for a strategy; all of it by the signatures of `reference.py` and `topn.py`."""

    name: str
    store_kv: Callable[..., None]
    attention: Callable[..., Tensor]
    topn_attention: Callable[..., Tensor]
    capturable: bool  # whether a CUDA graph can hold their work


#: Those for the device at hand: it encodes and decodes the codecs of this package, and masks by window and sinks.
FAST = Kernels("fast", store_kv, attention, topn_attention, capturable=True)


def reference_kernels(encode: Callable, decode: Callable, visible: Callable) -> Kernels:
    """The specification at work, for bytes and masks that no fast kernel knows. See `Codec` and `Retention`."""
    return Kernels(
        "reference",
        partial(reference.store_kv, encode=encode),
        partial(reference.attention, decode=decode, visible=visible),
        partial(topn.reference, decode=decode, visible=visible),
        capturable=False,
    )
