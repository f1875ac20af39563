"""What a model folder holds, looked at before anything reads it: what cannot be right is named, with the remedy.

The readers of Transformers, safetensors and PyTorch each fail in their own words, most of them without the file's name.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

#: What decides how a model is built, when it stops, and how text becomes tokens.
_CONFIGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_POINTER = b"version https://git-lfs"
_AGAIN = "bring it again from where the model came from"


def check_folder(folder: Path) -> None:
    """Every file that a loader would read is whole. Weights are not read for that, only their headers.

    Raises:
        ValueError: names the file, what is wrong with it, and what to do.
    """
    for path in [folder / name for name in _CONFIGS if (folder / name).exists()]:
        read_json(path)
    for pattern in ("*.safetensors", "*.bin", "*.model"):
        for path in sorted(folder.glob(pattern)):
            check_whole(path)
    for index in sorted(folder.glob("*.index.json")):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} names no weights (its weight_map); {_AGAIN}")
        if lacking := sorted({str(name) for name in shards.values() if not (folder / str(name)).is_file()}):
            raise ValueError(f"{index} names {lacking[0]}, which is not in the folder; {_AGAIN}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file holds anything else.
    """
    _check_head(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a JSON object; {_AGAIN}")
    return found


def check_whole(path: Path) -> None:
    """A file of weights, or of a tokenizer, ends where its header says.

    Raises:
        ValueError: it is empty, cut short, or a pointer of Git LFS.
    """
    head = _check_head(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return
        except SafetensorError as error:
            raise ValueError(f"{path} is cut short or damaged ({error}); {_AGAIN}") from error
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):  # the directory of a zip file is its end
        raise ValueError(f"{path} is cut short; {_AGAIN}")


def check_token_ids(source: str, config: dict[str, Any], vocab_size: int) -> None:
    """The special tokens that a config names are in the vocabulary.

    Raises:
        ValueError: says which is not.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = config.get(name)
        for token_id in given if isinstance(given, list) else [given]:
            if token_id is not None and (not isinstance(token_id, int) or token_id >= vocab_size):
                raise ValueError(
                    f"{source}: {name} is {token_id!r}, and the vocabulary ends at {vocab_size - 1} (vocab_size); "
                    "give it a token of the vocabulary, or null for none"
                )


def check_gguf(path: Path) -> None:
    """A gguf file begins as one.

    Raises:
        ValueError: it is empty, a pointer of Git LFS, or something else.
    """
    if _check_head(path)[:4] != b"GGUF":
        raise ValueError(f"{path} does not begin as a gguf file; {_AGAIN}")


def _check_head(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
    if not head:
        raise ValueError(f"{path} is empty; {_AGAIN}")
    if head == _POINTER:
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository")
    return head
