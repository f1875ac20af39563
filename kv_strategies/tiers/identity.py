"""Identity: everything that stored K and V depend on, beside the tokens and their order.

Two strategies may exchange blocks (a saved prefix cache, say) only where all of it is the same. It is a plain dict, so
that an error can say what differs. In the process, the state of the weights is a number (`step/version.py`); in a file
it is a hash of all their bytes, computed when a file is first written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..step.ranks import ranks_of
from ..step.store import Planes
from ..step.version import CONFIG_KEYS, OWN, autocast_dtype, has_upstream_functions, is_patched, tensors_of, watch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_CHUNK_BYTES = 16 << 20  # read at a time; on a GPU, copied to the host
_NUM_REMEMBERED = 8  # hashes, of as many states of a model
_UPSTREAM = ("torch.", "transformers.")  # packages whose modules keep what is no matter to others under "_names"


def identity(
    model: LlamaForCausalLM, planes: Planes, block_size: int, policies: dict[str, dict[str, object]]
) -> dict[str, object]:
    """What the K and V of a strategy's blocks depend on beside the weights: JSON values, comparable between processes.

    Args:
        policies: question -> what the policy that answers it says of itself (`Policy.identity`).
    """
    ranks = ranks_of(model)
    return {
        **({} if ranks.size == 1 else {"rank": f"{ranks.rank} of {ranks.size}"}),
        "architecture": type(model).__name__,
        "config": _config_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "planes": {name: [*shape, str(dtype).removeprefix("torch.")] for name, (shape, dtype) in planes.items()},
        "block_size": block_size,
        **json.loads(json.dumps(policies, default=str)),
    }


def fingerprint(identity: dict[str, object]) -> bytes:
    """256 bits that differ where the identities do."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=32).digest()


def differences(theirs: dict[str, object], ours: dict[str, object]) -> str:
    """What differs, in words: 'block_size is 16 there and 32 here'."""
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in keys)


def weights_hash(model: LlamaForCausalLM) -> str:
    """A hash of all bytes of all parameters and buffers, with their names, shapes and dtypes, and of the configuration,
    classes and settings of the modules that read them (which adapters are active, say).

    Read once a state of the model, in chunks, by several threads, which hash 0.9 GB/s each.
    """
    watched = watch(model)
    known = watched.made.setdefault("weights", {})
    watched.look_closely()
    content = watched.last.content
    if content not in known:
        total = hashlib.blake2b(digest_size=32)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashlib works outside the interpreter's lock
            named = list(tensors_of(model))
            digests = threads.map(_digest, [weight for _, weight in named])
            for (name, weight), digest in zip(named, digests, strict=True):
                total.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode() + digest)
        for name, module in model.named_modules():
            total.update(json.dumps([name, type(module).__qualname__, _settings_of(module)]).encode())
        total.update(json.dumps(_config_of(model)).encode())  # as it is by now
        known[content] = total.hexdigest()
        while len(known) > _NUM_REMEMBERED:
            del known[next(iter(known))]
    return known[content]


def is_steered(model: LlamaForCausalLM) -> bool:
    """Whether K and V depend on what no hash of weights tells another process: hooks, methods that are replaced, or
    products in another dtype (autocast).
    """
    watched = watch(model)
    watched.numbers  # noqa: B018  looks whether it is opaque
    kinds = set(map(type, model.modules()))
    is_cast = any(map(autocast_dtype, {parameter.device.type for parameter in model.parameters()}))
    return watched.is_opaque or is_cast or not has_upstream_functions() or any(map(is_patched, kinds))


def told_weights(model: LlamaForCausalLM) -> str | None:
    """The `weights_hash`, where it and `identity` tell another process all that K and V depend on; else None.

    Raises:
        ValueError: the model is one rank's part of a tensor parallel one.
    """
    if any(hasattr(parameter, "_local_tensor") for parameter in model.parameters()):
        raise ValueError(
            "ranks of a tensor parallel model must find the same blocks, and a folder gives each of them what is there "
            "when it looks: build without shared_path"
        )
    return None if is_steered(model) else weights_hash(model)


def _config_of(model: LlamaForCausalLM) -> dict[str, object]:
    config = model.config.to_dict()
    return json.loads(json.dumps({key: config.get(key) for key in CONFIG_KEYS}, default=str))


def _settings_of(module: nn.Module) -> object:
    if isinstance(module, PreTrainedModel):  # on which anybody may leave notes
        return None
    hides = type(module).__module__.startswith(_UPSTREAM)
    own = vars(module).items()
    return _plain({key: value for key, value in own if key not in OWN and not (hides and key.startswith("_"))})


def _plain(value: object) -> object:
    """Numbers, words, and what is made of them; of all else nothing."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return [[key, _plain(value[key])] for key in sorted(key for key in value if isinstance(key, str))]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else None


def _digest(weight: Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for chunk in _chunks(weight):
        digest.update(memoryview(chunk.view(torch.uint8).numpy()))
    return digest.digest()


@torch.no_grad()
def _chunks(weight: Tensor) -> Iterator[Tensor]:
    """Contiguous pieces on the host, in order: [n] each, n > 0."""
    weight = weight.detach()
    size = max(1, _CHUNK_BYTES // weight.element_size())
    if weight.is_contiguous():
        pieces = weight.view(-1).split(size)
    else:
        pieces = (piece.reshape(-1) for row in weight for piece in row.reshape(-1).split(size))
    for piece in pieces:
        if piece.numel():
            yield piece.cpu().contiguous()
