"""Qwen weights as Llama weights: the same computation under other names.

Qwen2 and Qwen2.5 are Llama with a bias on q, k and v. Llama's `attention_bias` puts one on o as well, so that o gets a
bias of zeros. Names are the same; layers with a sliding window have no counterpart and are refused.

Qwen-7B (the first Qwen, whose own code lives on the hub and is not run here) packs q, k and v into `c_attn` and calls
the rest by GPT-2's names. Its MLP is `c_proj(w1(x) * silu(w2(x)))`: w2 is Llama's gate, w1 its up projection. Beyond
`seq_length` tokens it changes its rotary base and scales its queries (dynamic NTK, log-n attention), which Llama does
not: the converted model ends there, and is exact up to there.
"""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Qwen2Config

# llama name <- first Qwen's name
_V1_LAYER = {
    "input_layernorm.weight": "ln_1.weight",
    "post_attention_layernorm.weight": "ln_2.weight",
    "self_attn.o_proj.weight": "attn.c_proj.weight",
    "mlp.gate_proj.weight": "mlp.w2.weight",
    "mlp.up_proj.weight": "mlp.w1.weight",
    "mlp.down_proj.weight": "mlp.c_proj.weight",
}
_V1_MODEL = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
_V1_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llama_config(config: dict[str, Any]) -> LlamaConfig:
    """The LlamaConfig that computes what this `config.json` of a Qwen model says.

    Raises:
        ValueError: it asks for something Llama does not compute.
    """
    return _v1_config(config) if config["model_type"] == "qwen" else _v2_config(config)


def llama_weights(config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The first Qwen's weights in `folder` under Llama's names."""
    return with_o_bias(_v1_weights(config, read_weights(folder)))


def with_o_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """These weights, under Llama's names, and the biases that Llama has and Qwen has not: zeros."""
    o_projs = {name: weight for name, weight in weights.items() if name.endswith("self_attn.o_proj.weight")}
    return weights | {name.replace("weight", "bias"): weight.new_zeros(len(weight)) for name, weight in o_projs.items()}


def _v2_config(config: dict[str, Any]) -> LlamaConfig:
    source = Qwen2Config(**config)
    sliding = [i for i, kind in enumerate(source.layer_types) if kind == "sliding_attention"]
    if sliding:
        raise ValueError(
            f"this Qwen2 model has a sliding window of {source.sliding_window} tokens in layers {sliding[0]} to "
            f"{sliding[-1]} (use_sliding_window), which Llama has not: it cannot be converted exactly. If your prompts "
            "stay below the window, set use_sliding_window to false in a copy of its config.json."
        )
    return LlamaConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=getattr(source, "head_dim", None),
        hidden_act=source.hidden_act,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        tie_word_embeddings=source.tie_word_embeddings,
        attention_bias=True,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
    )


def _v1_config(config: dict[str, Any]) -> LlamaConfig:
    head_dim = config.get("kv_channels", 128)
    for key, needed in {"rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True}.items():
        if config.get(key, needed) != needed:
            raise ValueError(f"this Qwen model has {key}={config[key]}; Llama computes {key}={needed}")
    if head_dim * config["num_attention_heads"] != config["hidden_size"]:
        raise ValueError(f"this Qwen model has heads of {head_dim}, which do not add up to its hidden size")
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"] // 2,  # it counts w1 and w2 together
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        head_dim=head_dim,
        max_position_embeddings=config["seq_length"],
        rms_norm_eps=config["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(config.get("rotary_emb_base", 10000))},
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def _v1_weights(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    source = {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    names = dict(_V1_MODEL)
    if config.get("tie_word_embeddings", False):
        source.pop(names.pop("lm_head.weight"), None)
    for i in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{llama}": f"transformer.h.{i}.{v1}" for llama, v1 in _V1_LAYER.items()}
    result = {llama: source.pop(v1) for llama, v1 in names.items() if v1 in source}
    for i in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            packed = source.pop(f"transformer.h.{i}.attn.c_attn.{kind}", None)  # [3 * hidden, ...]: q, k, v
            if packed is not None:
                for projection, part in zip("qkv", packed.chunk(3), strict=True):
                    result[f"model.layers.{i}.self_attn.{projection}_proj.{kind}"] = part
    return result | source  # what is left has no counterpart: the loader names it


def local_folder(spec: str) -> Path:
    """`spec` itself, or the folder the hub's files are kept in. Weights, configs and vocabularies, never code."""
    if Path(spec).is_dir():
        return Path(spec)
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(spec, allow_patterns=["*.json", "*.txt", "*.tiktoken", "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        snapshot_download(spec, allow_patterns=["*.bin"])
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, sharded or not, from safetensors or else PyTorch files (read as data only)."""
    from safetensors.torch import load_file

    if files := sorted(folder.glob("*.safetensors")):
        shards = (load_file(file) for file in files)
    elif files := sorted(folder.glob("*.bin")):
        shards = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
    else:
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors or *.bin)")
    return {name: weight for shard in shards for name, weight in shard.items()}


def set_generation_config(model: LlamaForCausalLM, folder: Path) -> None:
    """When to stop, as the first Qwen's folder says it, in words of its own."""
    path = folder / "generation_config.json"
    if path.exists() and (folder / "qwen.tiktoken").exists():
        end_of_text = len(_read_ranks(folder))  # the special tokens follow, in the order of _V1_SPECIAL
        is_chat = json.loads(path.read_text(encoding="utf-8")).get("chat_format") == "chatml"
        model.generation_config.eos_token_id = [end_of_text + 2, end_of_text] if is_chat else end_of_text
        model.generation_config.pad_token_id = end_of_text


def _read_ranks(folder: Path) -> list[bytes]:
    """qwen.tiktoken: a line a token, its bytes in base64 and its rank, in order."""
    lines = (folder / "qwen.tiktoken").read_bytes().splitlines()
    return [base64.b64decode(line.split()[0]) for line in lines if line]


def v1_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The first Qwen's tokenizer from `qwen.tiktoken`, as byte-level BPE. It splits text as Qwen2 does.

    tiktoken merges the pair with the lowest rank; BPE wants the list of merges. The merge that made a token is the
    last pair left when its own bytes are merged by the tokens ranked below it.
    """
    if not (folder / "qwen.tiktoken").exists():
        return None
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = _read_ranks(folder)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [tuple(map(spell, _last_pair(token, ranks))) for token in tokens if len(token) > 1]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": _V1_SPECIAL})
    tokenizer.chat_template = _CHATML
    return tokenizer


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
