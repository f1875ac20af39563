"""Strategies by name: `build("paged", model)`, `build("prefix+offload+int8", model, ...)`.

A name is a sum of parts. Each part answers one question (`base.py`) otherwise than a plain block pool does. A part from
outside is one class and one registration:

    register("every4", Preset("keeps every fourth old block", "retention", EveryFourth, lossy=True))

or, in a package of its own, an entry point of the group `kv_strategies` that names the preset. Either way it is in
`STRATEGIES`, and in whatever goes by it: `build`, both doors, the command line, the bench and the composition tests.
"""

from __future__ import annotations

import inspect
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
import transformers
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from . import contract
from .base import Layout, Policies, Policy, Retention, Site
from .baseline import Baseline
from .evict import Evict
from .generate import Generation
from .kernels import FAST, INVARIANT, Kernels, reference_kernels
from .models.room import free_bytes
from .offload import Offload
from .prefix import PrefixCache
from .quantized import Fp8, Int4, Int8, Key8Value4
from .step.checked import checked
from .step.context import longest_row
from .step.defaults import plain_defaults
from .step.forward import NEEDS_STACK
from .step.fused import supports
from .step.graphs import is_out_of_memory
from .step.ranks import ranks_of
from .step.shards import check_heads
from .step.store import KVShape
from .strategy import Strategy, planes_of
from .window import SlidingWindow

QUESTIONS = {
    "layout": "where is token t?",
    "sharing": "who already holds these tokens?",
    "retention": "which blocks may still be seen?",
    "placement": "which tier holds these bytes?",
    "codec": "what bytes encode K and V?",
    "selection": "which tokens are worth keeping?",
}
#: Questions that cannot both be answered, and why.
EXCLUSIVE = {
    ("retention", "selection"): "a mask names tokens by their index in the row, which no longer says how old they are "
    "once some have been evicted (evict with score='window' keeps the newest)"
}


#: Rotary embeddings whose frequencies are the same at every length. Others follow the longest row of a forward: keys
#: of one length would meet queries of another, and a row's answer would depend on its neighbours.
CONSTANT_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Preset:
    """One part of a name.

    Args:
        summary: a line for people.
        answers: the question it answers, of `QUESTIONS`. Two parts that answer the same one clash.
        make: the policy, or what makes it; its options are the keywords that this takes, checked by their annotations.
        lossy: whether answers may change; or the options that make it so.
        alone: cannot be part of a sum.
    """

    summary: str
    answers: str
    make: Callable[..., Policy]
    lossy: bool | tuple[str, ...] = False
    alone: bool = False

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}

    def is_lossy(self, options: dict[str, object]) -> bool:
        if isinstance(self.lossy, bool):
            return self.lossy
        return any(options.get(option) is not None for option in self.lossy)


class Contiguous(Layout):
    """One block a request, as long as the longest may be: what a cache without blocks reserves."""

    def __init__(self, *, max_length: int | None = None):
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {max_length}")
        self._max_length = max_length

    def block_size(self, asked: int | None, longest: int) -> int:
        if asked is not None:
            raise ValueError("contiguous has blocks of maximal length: give max_length instead of block_size")
        return self._max_length or longest


STRATEGIES: dict[str, Preset] = {
    "baseline": Preset("native DynamicCache, untouched: the oracle", "layout", Layout, alone=True),
    "contiguous": Preset("one block of maximal length a request", "layout", Contiguous, alone=True),
    "paged": Preset("blocks of 16 tokens behind a block table (PagedAttention)", "layout", Layout),
    "prefix": Preset(
        "requests that start alike share the blocks of their common start (RadixAttention)", "sharing", PrefixCache
    ),
    "window": Preset(
        "the last 2048 tokens and 4 sinks, dead blocks given back (StreamingLLM); lossy",
        "retention", SlidingWindow, lossy=True,
    ),
    "offload": Preset(
        "K on the GPU, V in host memory: streamed, or the heaviest tokens alone (KCache)",
        "placement", Offload, lossy=("top_n", "mass"),
    ),
    "evict": Preset(
        "of a prompt, what a score likes best: each head keeps its own tokens (SnapKV and others); lossy",
        "selection", Evict, lossy=True,
    ),
    "int8": Preset("one byte a number and a scale a token and head; lossy", "codec", Int8, lossy=True),
    "fp8": Preset("the same bytes as float8 e4m3, where the GPU has it; lossy", "codec", Fp8, lossy=True),
    "k8v4": Preset("K as int8, V as int4: what attention weighs stays precise; lossy", "codec", Key8Value4, lossy=True),
    "int4": Preset("half a byte a number, after a Hadamard transform, and a scale; lossy", "codec", Int4, lossy=True),
}  # fmt: skip


def register(name: str, preset: Preset) -> None:
    """Add a strategy from outside, for this process.

    Raises:
        ValueError: the name is taken or cannot be part of a sum, or the preset answers no question that there is.
    """
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"a name is letters, digits, '-' and '_', since '+' joins names; got {name!r}")
    if name in STRATEGIES:
        raise ValueError(f"the name {name!r} is taken: {STRATEGIES[name].summary}")
    if not isinstance(preset, Preset):
        raise ValueError(f"{name!r} needs a kv_strategies.Preset, got {type(preset).__name__}")
    if preset.answers not in QUESTIONS:
        raise ValueError(f"{name!r} answers {preset.answers!r}; the questions are {', '.join(QUESTIONS)}")
    for option in preset.options:
        if option in _COMMON:
            raise ValueError(f"{name!r} takes an option {option!r}, which every strategy has")
    STRATEGIES[name] = preset


def build(
    name: str,
    model: LlamaForCausalLM,
    *,
    num_blocks: int | None = None,
    memory_fraction: float | None = None,
    block_size: int | None = None,
    kernels: str | None = None,
    deterministic: bool | None = None,
    **options: object,
) -> Strategy | Baseline:
    """Build a strategy for `model` and set its memory aside.

    Args:
        name: names of `STRATEGIES` joined by "+".
        num_blocks: blocks in the pool.
        memory_fraction: instead of `num_blocks`, the share of the free memory of each device to fill with blocks.
            Without either: 0.8 of a GPU; on a CPU 0.25, and not more than 16 contexts of full length.
        block_size: tokens a block, 16 unless told.
        kernels: "fast", or "reference", the specification in plain torch: slow, and able to read whatever a codec or a
            mask from outside says. Unless told, fast where these can serve; `stats()` says which.
        deterministic: True for logits of the runner that do not depend, to the bit, on the requests beside it, on how
            a prompt is cut into chunks, on hits or on preemption, for one model, dtype and device. Not for what reads
            other bytes in a prompt than in a decode step or drops some (a window, top-N, mass). Costs time, see
            docs/reliability.md.
        options: those of the parts, see `STRATEGIES[...].options`.

    Raises:
        ValueError: an unknown name or option, one of the wrong type, parts that cannot work together or break their
            contract, a model this cannot serve, a pool that cannot hold a single block.
        RuntimeError: transformers is installed without the patches.
        torch.OutOfMemoryError: there is no memory for the pool.
    """
    parts = parts_of(name)
    name = "+".join(parts)
    common = _common_of(
        num_blocks=num_blocks,
        memory_fraction=memory_fraction,
        block_size=block_size,
        kernels=kernels,
        deterministic=deterministic,
    )
    num_blocks, memory_fraction, block_size, kernels, deterministic = common.values()
    given = _options_of(name, parts, options)
    check_model(model)
    if name == "baseline":
        if deterministic:
            raise ValueError("deterministic=True is for strategies: the baseline is upstream's own cache and kernels")
        return Baseline(model)
    check_rope(name, model)

    with plain_defaults():
        policies, site = _put_together(model, parts, given, block_size)
    chosen = (
        _invariant_kernels(model, policies, parts, given, kernels) if deterministic else _kernels_for(policies, kernels)
    )
    if num_blocks is None:
        num_blocks = _blocks_that_fit(model, policies, site, memory_fraction)
    ranks_of(model).same("what to build", f"{name}, {num_blocks} blocks of {site.block_size} tokens, {given}")
    try:
        return Strategy(name, model, policies, chosen, Generation(), num_blocks=num_blocks, block_size=site.block_size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
    # Raised when the other one is gone, and with it what there was room for.
    num_bytes = num_blocks * site.shape.block_bytes(planes_of(site.shape, policies, site.block_size))
    raise torch.OutOfMemoryError(
        f"there is no memory for a pool of {num_blocks} blocks of {site.block_size} tokens, "
        f"{num_bytes / 2**30:.2f} GiB: give a smaller num_blocks, memory_fraction or host_bytes ({reason})"
    )


def outline(
    name: str, model: LlamaForCausalLM, *, block_size: int | None = None, **options: object
) -> tuple[Policies, Site]:
    """The policies that `build` would give this model, without memory: the model may be on the meta device.

    Raises:
        ValueError: as `build`.
    """
    parts = parts_of(name)
    if name == "baseline":
        raise ValueError("baseline is the native cache: it has no policies")
    check_rope(name, model)
    with plain_defaults():
        (block_size,) = _common_of(block_size=block_size).values()
        return _put_together(model, parts, _options_of(name, parts, options), block_size)


def check(name: str, options: dict[str, object]) -> None:
    """What `build` says of a name and its options whatever the model, before one is loaded.

    Raises:
        ValueError: as `build`.
    """
    parts = parts_of(name)
    _common_of(**{option: value for option, value in options.items() if option in _COMMON})
    given = _options_of(name, parts, {option: value for option, value in options.items() if option not in _COMMON})
    with plain_defaults():
        for part in parts:
            _answer(Policies(), part, given[part])


def options_of_each(
    names: Sequence[str], given: dict[str, object], common: Iterable[str] | None = None
) -> list[dict[str, object]]:
    """For each name what it takes of options that were given for all. One that nobody takes goes to the first, which
    says what it takes.

    Args:
        common: what every one but the baseline takes; all that `build` has unless told.
    """
    common = set(_COMMON if common is None else common)
    takes = [
        {option for part in parts_of(name) for option in STRATEGIES[part].options}
        | (set() if name == "baseline" else common)
        for name in names
    ]
    takes[0] |= set(given) - set().union(*takes)
    return [{option: value for option, value in given.items() if option in own} for own in takes]


def bytes_per_block(policies: Policies, site: Site) -> dict[torch.device, int]:
    """What one block of the pool takes of the memory of each device."""
    planes = planes_of(site.shape, policies, site.block_size)
    return policies.placement.bytes_per_block(planes, site.shape.layer_devices)


def _put_together(
    model: LlamaForCausalLM, parts: list[str], given: dict[str, dict[str, object]], block_size: int | None
) -> tuple[Policies, Site]:
    """The policies that the parts stand for, bound to the model and checked."""
    policies = Policies()
    for part in parts:
        _answer(policies, part, given[part])
    block_size = policies.layout.block_size(block_size, longest_row(model.config))
    rotary_emb = model.model.rotary_emb
    if rotary_emb.inv_freq.is_meta:  # of a model without memory: its policies read these numbers all the same
        rotary_emb = type(rotary_emb)(model.config)
    site = Site(KVShape.of(model), block_size, rotary_emb, ranks_of(model).size)
    for policy in vars(policies).values():
        policy.bind(site)
    for part in parts:
        if STRATEGIES[part].answers == "codec":
            contract.check_codec(part, policies.codec, site)
        if STRATEGIES[part].answers == "retention":
            contract.check_retention(part, policies.retention, site)
        if STRATEGIES[part].answers == "selection":
            contract.check_selection(part, policies.selection, policies.placement, site)
    return policies, site


def parts_of(name: str) -> list[str]:
    """The names in a sum.

    Raises:
        ValueError: one is unknown or there twice, or two of them cannot work together.
    """
    if not isinstance(name, str):
        raise ValueError(f"a strategy is built by name, got {type(name).__name__}; known are {', '.join(STRATEGIES)}")
    parts = [part.strip() for part in name.split("+")]
    if not set(parts) <= set(STRATEGIES):
        _register_installed()  # of a package that is being imported while it imports this one
    for part in parts:
        if part not in STRATEGIES:
            raise ValueError(f"unknown strategy {part!r}; known are {', '.join(STRATEGIES)}, joined by '+'")
        if STRATEGIES[part].alone and len(parts) > 1:
            raise ValueError(f"{part!r} stands alone and cannot be combined, as {name!r} asks")
    if len(set(parts)) < len(parts):
        raise ValueError(f"{name!r} names a strategy twice")
    answered: dict[str, str] = {}
    for part in sorted(parts, key=list(STRATEGIES).index):
        question = STRATEGIES[part].answers
        if question in answered:
            raise ValueError(f"{answered[question]} and {part} both say {QUESTIONS[question][:-1]}: choose one")
        answered[question] = part
    for pair, reason in EXCLUSIVE.items():
        if set(pair) <= set(answered):
            raise ValueError(f"{' and '.join(answered[question] for question in pair)}: {reason}; choose one")
    return parts


def _options_of(name: str, parts: list[str], options: dict[str, object]) -> dict[str, dict[str, object]]:
    """Part -> its options of those given, checked."""
    known = {option for part in parts for option in STRATEGIES[part].options}
    if stray := set(options) - known:
        takes = f"takes {', '.join(sorted(known))}" if known else "takes no options of its own"
        raise ValueError(f"unknown option {', '.join(sorted(stray))}: {name!r} {takes}")
    given = {}
    for part in parts:
        make = getattr(STRATEGIES[part].make, "func", STRATEGIES[part].make)  # a partial's own
        hints = typing.get_type_hints(make.__init__ if inspect.isclass(make) else make)
        own = [option for option in STRATEGIES[part].options if option in options]
        given[part] = {option: _checked(option, options[option], hints.get(option, object)) for option in own}
    return given


def _common_of(**given: object) -> dict[str, object]:
    """Options of `_COMMON`, checked."""
    found = {option: _checked(option, value, _COMMON[option]) for option, value in given.items()}
    if found.get("num_blocks") is not None and found.get("memory_fraction") is not None:
        raise ValueError("give num_blocks or memory_fraction, not both")
    for option in ("num_blocks", "block_size"):
        if found.get(option) is not None and found[option] < 1:
            raise ValueError(f"{option} must be at least 1, got {found[option]}")
    return found


def _checked(option: str, value: object, hint: object) -> object:
    """See `checked`; all sizes are of 64 bits."""
    found = checked(option, value, hint)
    if isinstance(found, int) and not -(2**63) <= found < 2**63:
        raise ValueError(f"{option} is a number beyond 64 bits")
    return found


#: The options that every strategy has, and their types.
_COMMON = {
    "num_blocks": int | None,
    "memory_fraction": float | None,
    "block_size": int | None,
    "kernels": str | None,
    "deterministic": bool | None,
}


def _answer(policies: Policies, part: str, given: dict[str, object]) -> None:
    """Let a part answer its question."""
    preset = STRATEGIES[part]
    policy = preset.make(**given)
    contract.check_form(part, preset.answers, policy)
    defaults = {name: p.default for name, p in preset.options.items() if p.default is not p.empty}
    policy.options = defaults | given
    if preset.answers == "codec" and policy.lossless == preset.is_lossy(given):
        raise ValueError(
            f"{part!r}: the preset and {type(policy).__name__}.lossless disagree whether it loses anything"
        )
    setattr(policies, preset.answers, policy)


def _kernels_for(policies: Policies, asked: str | None) -> Kernels:
    codec, retention = policies.codec, policies.retention
    strange = [] if codec.in_kernels else [f"the bytes of {type(codec).__name__}"]
    if type(retention).visible is not Retention.visible:
        strange.append(f"the mask of {type(retention).__name__}")
    if asked not in (None, "fast", "reference"):
        raise ValueError(f"kernels must be 'fast' or 'reference', got {asked!r}")
    if asked == "fast" and strange:
        raise ValueError(f"the fast kernels do not know {' and '.join(strange)}: build with kernels='reference'")
    if asked == "reference" or strange:
        return reference_kernels((codec.encode, codec.encode_values), codec.decode, retention.visible)
    return FAST


def _invariant_kernels(
    model: LlamaForCausalLM,
    policies: Policies,
    parts: list[str],
    given: dict[str, dict[str, object]],
    asked: str | None,
) -> Kernels:
    """Those for `deterministic=True`.

    Raises:
        ValueError: they cannot keep its promise here.
    """
    if asked == "reference" or not policies.codec.in_kernels:
        raise ValueError("deterministic=True has kernels of its own, which know the codecs of this package alone")
    for part in parts:
        if STRATEGIES[part].answers != "codec" and STRATEGIES[part].is_lossy(given[part]):
            raise ValueError(
                f"{part!r} as asked for cannot be deterministic: what a token is computed from follows the steps in "
                "which its row happens to be computed"
            )
    if ranks_of(model).size > 1:
        raise ValueError(
            "deterministic=True serves a model that one process holds: in which order the parts of several ranks are "
            "added is for the communication library to say, and may differ with the size of a step"
        )
    if not supports(model):
        raise ValueError(NEEDS_STACK)
    return INVARIANT


def check_model(model: LlamaForCausalLM) -> None:
    """Raises where the model is not one whose attention the patches hand over."""
    if (inner := getattr(model, "_orig_mod", None)) is not None:
        raise ValueError(
            f"this is a compiled model ({type(inner).__name__} under torch.compile), whose compiled forward would not "
            "ask the strategy: pass model._orig_mod; the strategy brings fused kernels and CUDA graphs of its own"
        )
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        active = getattr(model, "active_peft_config", None)
        if active is not None and active.is_prompt_learning:
            raise ValueError(
                f"this is a {type(model).__name__} with {active.peft_type}: prompt learning puts virtual tokens, or K "
                "and V, of its own before every prompt, which no strategy knows of"
            )
        raise ValueError(
            f"this is a {type(model).__name__}: pass model.get_base_model(), which holds the adapters and is what "
            "a strategy and generate() then both take"
        )
    if not isinstance(model, LlamaForCausalLM):
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise ValueError(
            f"the model is of type {kind!r} ({type(model).__name__}), and only LlamaForCausalLM is patched; "
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
    mesh = getattr(model.model.layers[0].self_attn.k_proj.weight, "device_mesh", None)
    if mesh is not None:
        check_heads(config, mesh.size())
    for index, layer in enumerate(model.model.layers):
        if not isinstance(layer.self_attn, LlamaAttention):
            raise ValueError(
                f"model.layers.{index}.self_attn is a {type(layer.self_attn).__name__}, and only LlamaAttention is "
                "patched: adapters of its projections (LoRA, say) are served, those of the attention itself are not"
            )
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            weight = getattr(module, "weight", None)
            if not torch.is_tensor(weight) or not weight.is_floating_point():
                raise ValueError(
                    f"{name} is a {type(module).__module__}.{type(module).__name__}, a quantised layer: strategies "
                    "read the number of heads and their dtype from plain weights. Load the model in bfloat16, float16 "
                    "or float32; 'int8' and 'fp8' here quantise K and V, not weights"
                )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device ({_why_meta(model, name)}): load the model onto real devices, e.g. with "
                "device_map='auto' and enough memory for it, or in a smaller dtype"
            )
    for index, layer in enumerate(model.model.layers):
        if len(devices := {str(parameter.device) for parameter in layer.parameters()}) > 1:
            raise ValueError(
                f"model.layers.{index} is on several devices ({', '.join(sorted(devices))}): K and V of a layer are "
                "where it is, so keep each layer whole, as device_map='auto' does"
            )


def _why_meta(model: LlamaForCausalLM, name: str) -> str:
    for part, place in getattr(model, "hf_device_map", {}).items():
        if place in ("cpu", "disk") and f"{name}.".startswith(f"{part}." if part else ""):
            return f"device_map has put it on {place!r}, from where accelerate brings it for each forward"
    return "weights that accelerate keeps elsewhere, or a model that was never filled"


def check_rope(name: str, model: LlamaForCausalLM) -> None:
    """Raises where what is cached at one length would be wrong at another."""
    rotary_emb = model.model.rotary_emb
    kind = getattr(rotary_emb, "rope_type", type(rotary_emb).__name__)
    if kind not in CONSTANT_ROPE:
        raise ValueError(
            f"rotary embeddings of type {kind!r} change their frequencies with the longest row of a forward, so the "
            f"keys that {name!r} keeps of one length would be wrong at another, and a row beside a longer one as well: "
            f"supported are {', '.join(CONSTANT_ROPE)}, and 'baseline' serves all"
        )


def _blocks_that_fit(model: LlamaForCausalLM, policies: Policies, site: Site, memory_fraction: float | None) -> int:
    if memory_fraction is not None and not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_fraction must be in (0, 1], got {memory_fraction}")
    shape, block_size, needed = site.shape, site.block_size, bytes_per_block(policies, site)
    on_gpu = shape.layer_devices[0].type == "cuda"
    share = memory_fraction or (0.8 if on_gpu else 0.25)
    ranks = ranks_of(model)

    def usable_bytes(device: torch.device) -> int:
        free = free_bytes(device)
        if free is None:
            raise ValueError(f"nothing here says how much {device} memory is free: give num_blocks")
        beside = on_gpu and device.type == "cpu"
        return int(free // (ranks.num_beside if device.type == "cpu" else 1) * (0.5 if beside else share))

    # Host memory beside a GPU: half of what is free, whatever share of the GPU is asked for.
    usable = {device: usable_bytes(device) for device in needed}
    scarce = min(needed, key=lambda device: usable[device] // needed[device])
    num_blocks = usable[scarce] // needed[scarce]
    if not on_gpu and memory_fraction is None:
        num_blocks = min(num_blocks, -(-16 * longest_row(model.config) // block_size))
    num_blocks = min(ranks.all(num_blocks))
    if num_blocks < 1:
        raise ValueError(
            f"one block of {block_size} tokens takes {needed[scarce]:,} bytes of {scarce} memory, and the pool may "
            f"take {usable[scarce]:,}, its share of what is free: give a larger memory_fraction, or num_blocks"
        )
    return num_blocks


def _register_installed() -> None:
    """What other installed packages offer. One that fails is told, and keeps nobody from the rest."""
    for entry in metadata.entry_points(group="kv_strategies"):
        spec = getattr(sys.modules.get(entry.module), "__spec__", None)
        if entry.name in STRATEGIES or getattr(spec, "_initializing", False):
            continue
        try:
            register(entry.name, entry.load())
        except Exception as error:
            where = entry.dist.name if entry.dist else entry.value
            warnings.warn(f"the strategy {entry.name!r} of {where} cannot be used: {error}", stacklevel=2)


_register_installed()
