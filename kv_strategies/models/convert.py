"""`kv-strategies convert`: a model that `load_model` takes, written as a Llama folder for any reader."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from .fetch import arriving
from .load import load_model, means_random, read_config

#: What a folder says its weights are, or a gguf file unpacks to.
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def convert(source: str, folder: Path, dtype: str | None = None) -> Path:
    """Write config, weights and tokenizer to `folder`, whole or not at all.

    Args:
        source: a folder, a hub id or a gguf file, see `load_model`.
        dtype: of the weights; unless told as the source has them, float32 for a gguf file.

    Raises:
        ValueError: the folder exists, or the model is not one that can be converted exactly.
        OSError: the folder cannot be written.
    """
    if means_random(source):
        raise ValueError(f"{source} is a shape with random weights: there is nothing to convert")
    folder = Path(folder).absolute()
    if folder.exists():
        raise ValueError(f"{folder} exists already: give the name of a new folder, or move it away")
    if dtype is None and not source.endswith(".gguf"):
        config = read_config(source)
        dtype = config.get("dtype") or config.get("torch_dtype")
    model, tokenizer = load_model(source, dtype=_DTYPES.get(dtype, torch.float32), device="cpu")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with arriving(folder) as partial:
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            for file in partial.iterdir():  # safetensors writes for the owner only
                file.chmod(0o644)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    return folder
