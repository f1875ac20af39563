"""Mistral weights as Llama weights: the same computation under the same names, where there is no sliding window."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MistralConfig


def llama_config(config: dict[str, Any]) -> LlamaConfig:
    """The LlamaConfig that computes what this `config.json` says.

    Raises:
        ValueError: it has a sliding window, which Llama has not.
    """
    source = MistralConfig(**config)
    if source.sliding_window is not None and source.sliding_window < source.max_position_embeddings:
        raise ValueError(
            f"this Mistral model has a sliding window of {source.sliding_window} tokens, which Llama has not: it "
            "cannot be converted exactly. If your prompts stay below the window, set sliding_window to null in a copy "
            "of its config.json."
        )
    return LlamaConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.head_dim,
        hidden_act=source.hidden_act,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        tie_word_embeddings=source.tie_word_embeddings,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
    )
