"""Identity: everything that stored K and V depend on, beside the tokens and their order.

Two strategies may exchange blocks (a saved prefix cache, say) only where all of it is the same. It is a plain dict, so
that an error can say what differs; its fingerprint goes into every hash of a block.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..step.store import Planes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

#: What of a Llama configuration changes K and V. The rest (paths, versions, special tokens) may differ.
_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "rope_parameters",
    "max_position_embeddings",  # some rotary embeddings scale with it
)
_SAMPLES = 64  # numbers read of each weight


def identity(
    model: LlamaForCausalLM, planes: Planes, block_size: int, policies: dict[str, dict[str, object]]
) -> dict[str, object]:
    """What the K and V of a strategy's blocks depend on: JSON values, comparable between processes.

    Args:
        policies: question -> what the policy that answers it says of itself (`Policy.identity`).

    The weights go in as a hash of numbers sampled from each of them, which tells models, fine-tunes and merged
    adapters apart and takes milliseconds.
    """
    config = model.config.to_dict()
    return {
        "architecture": type(model).__name__,
        "config": json.loads(json.dumps({key: config.get(key) for key in _CONFIG_KEYS}, default=str)),
        "weights": _sample_of_weights(model),
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


@torch.no_grad()
def _sample_of_weights(model: LlamaForCausalLM) -> str:
    total = hashlib.blake2b(digest_size=32)
    samples: dict[torch.device, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        local = weight.to_local() if hasattr(weight, "to_local") else weight  # tensor parallelism: this rank's part
        total.update(f"{name} {tuple(local.shape)} {local.dtype}".encode())
        flat = local.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].float()
        samples.setdefault(local.device, []).append(sample)
    for per_device in samples.values():
        total.update(torch.cat(per_device).cpu().numpy().tobytes())  # one wait a device
    return total.hexdigest()
