"""The longest row that a model is made for."""

from __future__ import annotations

from transformers import LlamaConfig


def longest_row(config: LlamaConfig) -> int:
    """Tokens. A rope scaling of type linear or yarn stretches what `max_position_embeddings` says by its factor, unless
    that says so itself; of the others (llama3) it counts what is stretched already. As vLLM reads such a config.
    """
    longest, rope = config.max_position_embeddings, config.rope_parameters or {}
    if rope.get("rope_type") not in ("linear", "yarn"):
        return longest
    return max(longest, int((rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or longest)))
