"""Strategies by name: `build("paged", model)`, `build("prefix+offload+int8", model, ...)`.

A name is a sum of parts. Each part changes one answer of a plain block pool (`base.Spec`); a new strategy is one
function here and one entry in `STRATEGIES`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .base import Codec, Spec
from .baseline import Baseline
from .offload import Offload
from .prefix import PrefixCache
from .quantized import Fp8, Int8
from .strategy import KVShape, Strategy
from .window import SlidingWindow

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Preset:
    """One name: what it is, and what it changes. `apply(spec, model, **options)` takes its options as keywords."""

    summary: str
    apply: Callable[..., None]
    alone: bool = False  # cannot be part of a sum

    @property
    def options(self) -> list[str]:
        return list(inspect.signature(self.apply).parameters)[2:]


def _paged(spec: Spec, model: LlamaForCausalLM) -> None:
    """Nothing to change: every strategy stands on the block pool."""


def _contiguous(spec: Spec, model: LlamaForCausalLM, max_length: int | None = None) -> None:
    spec.block_size = max_length or model.config.max_position_embeddings


def _prefix(spec: Spec, model: LlamaForCausalLM) -> None:
    spec.sharing = PrefixCache()


def _window(
    spec: Spec, model: LlamaForCausalLM, window: int = 2048, sinks: int = 4, rebase_at: int | None = None
) -> None:
    rotary_emb = model.model.rotary_emb
    spec.retention = SlidingWindow(
        rotary_emb, window=window, sinks=sinks, block_size=spec.block_size, rebase_at=rebase_at
    )


def _offload(
    spec: Spec,
    model: LlamaForCausalLM,
    top_n: int | None = None,
    mass: float | None = None,
    renormalise: bool = False,
    resident: str = "k",
    host_bytes: int | None = None,
    disk_path: str | os.PathLike | None = None,
    disk_bytes: int | None = None,
) -> None:
    spec.placement = Offload(
        top_n=top_n,
        mass=mass,
        renormalise=renormalise,
        resident=resident,
        host_bytes=host_bytes,
        disk_path=disk_path,
        disk_bytes=disk_bytes,
    )


def _int8(spec: Spec, model: LlamaForCausalLM) -> None:
    _set_codec(spec, Int8())


def _fp8(spec: Spec, model: LlamaForCausalLM) -> None:
    _set_codec(spec, Fp8(KVShape.of(model).layer_devices))


def _set_codec(spec: Spec, codec: Codec) -> None:
    if not spec.codec.lossless:
        raise ValueError("int8 and fp8 both say what bytes encode K and V: choose one")
    spec.codec = codec


STRATEGIES: dict[str, Preset] = {
    "baseline": Preset("native DynamicCache, untouched: the oracle", _paged, alone=True),
    "contiguous": Preset("one block of maximal length a request", _contiguous, alone=True),
    "paged": Preset("blocks of 16 tokens behind a block table (PagedAttention)", _paged),
    "prefix": Preset("requests that start alike share the blocks of their common start (RadixAttention)", _prefix),
    "window": Preset("the last 2048 tokens and 4 sinks, dead blocks given back (StreamingLLM); lossy", _window),
    "offload": Preset("K on the GPU, V in host memory: streamed, or the heaviest tokens alone (KCache)", _offload),
    "int8": Preset("one byte a number and a scale a token and head; lossy", _int8),
    "fp8": Preset("the same bytes as float8 e4m3, where the GPU has it; lossy", _fp8),
}


def build(
    name: str,
    model: LlamaForCausalLM,
    *,
    num_blocks: int | None = None,
    memory_fraction: float | None = None,
    block_size: int | None = None,
    **options: object,
) -> Strategy | Baseline:
    """Build a strategy for `model` and set its memory aside.

    Args:
        name: names of `STRATEGIES` joined by "+".
        num_blocks: blocks in the pool.
        memory_fraction: instead of `num_blocks`, the share of the free memory of each device to fill with blocks.
            Without either: 0.8 of a GPU; on a CPU 0.25, and not more than 16 contexts of full length.
        block_size: tokens a block, 16 unless told.
        options: those of the parts, see `STRATEGIES[...].options`.

    Raises:
        ValueError: an unknown name or option, parts that cannot work together, a model this cannot serve, a pool
            that cannot hold a single block.
        RuntimeError: transformers is installed without the patches.
    """
    parts = name.split("+")
    unknown = [part for part in parts if part not in STRATEGIES]
    if unknown:
        raise ValueError(f"unknown strategy {unknown[0]!r}; known are {', '.join(STRATEGIES)}, joined by '+'")
    if len(set(parts)) < len(parts):
        raise ValueError(f"{name!r} names a strategy twice")
    for part in parts:
        if STRATEGIES[part].alone and len(parts) > 1:
            raise ValueError(f"{part!r} stands alone and cannot be combined, as {name!r} asks")
    known = {option for part in parts for option in STRATEGIES[part].options}
    if stray := set(options) - known:
        takes = f"takes {', '.join(sorted(known))}" if known else "takes no options of its own"
        raise ValueError(f"unknown option {', '.join(sorted(stray))}: {name!r} {takes}")
    _check_model(model)
    if name == "baseline":
        return Baseline(model)

    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if block_size is not None and name == "contiguous":
        raise ValueError("contiguous has blocks of maximal length: give max_length instead of block_size")
    spec = Spec() if block_size is None else Spec(block_size=block_size)
    for part in parts:
        preset = STRATEGIES[part]
        preset.apply(spec, model, **{option: options[option] for option in preset.options if option in options})
    if num_blocks is None:
        num_blocks = _blocks_that_fit(model, spec, memory_fraction)
    elif memory_fraction is not None:
        raise ValueError("give num_blocks or memory_fraction, not both")
    elif num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
    return Strategy(name, model, spec, num_blocks)


def _check_model(model: LlamaForCausalLM) -> None:
    """Raises where the model is not one whose attention the patches hand over."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

    if not isinstance(model, LlamaForCausalLM):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"the model is of type {kind!r}, and only LlamaForCausalLM is patched; "
            "kv_strategies.models.load_model converts Qwen and Qwen2 weights"
        )
    if "attend" not in inspect.unwrap(LlamaAttention.forward).__code__.co_names:  # behind upstream's decorators
        raise RuntimeError(
            f"transformers {transformers.__version__} is installed without the patches; "
            "run `make patch`, or `pip install -e transformers-dev`"
        )
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) is not None:
        kinds.add("sliding_attention")
    if kinds != {"full_attention"}:
        raise ValueError(
            f"unsupported layer type {', '.join(sorted(kinds - {'full_attention'}))}: Llama layers attend to all "
            "tokens, and how many a query sees is the strategy's to say"
        )


def _blocks_that_fit(model: LlamaForCausalLM, spec: Spec, memory_fraction: float | None) -> int:
    if memory_fraction is not None and not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_fraction must be in (0, 1], got {memory_fraction}")
    shape = KVShape.of(model)
    needed = spec.placement.bytes_per_block(shape.planes(spec.codec, spec.block_size), shape.layer_devices)
    on_gpu = shape.layer_devices[0].type == "cuda"
    share = memory_fraction or (0.8 if on_gpu else 0.25)
    # Host memory beside a GPU: half of what is free, whatever share of the GPU is asked for.
    fits = {
        device: int(_free_bytes(device) * (0.5 if on_gpu and device.type == "cpu" else share)) // size
        for device, size in needed.items()
    }
    scarce = min(fits, key=fits.__getitem__)
    num_blocks, bytes_per_block, free = fits[scarce], needed[scarce], _free_bytes(scarce)
    if not on_gpu and memory_fraction is None:
        num_blocks = min(num_blocks, -(-16 * model.config.max_position_embeddings // spec.block_size))
    if num_blocks < 1:
        raise ValueError(
            f"one block of {spec.block_size} tokens takes {bytes_per_block / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        )
    return num_blocks


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
