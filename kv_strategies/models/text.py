"""Natural English for prompts and perplexity: the King James text, about a million tokens.

Random token ids make attention unlike that of real text (and greedy output degenerate), so every workload on a model
with a tokenizer is cut from one real text. `make model` brings it (`fetch.py`).

    corpus(tokenizer)                all of it as token ids
    prompts(tokenizer, [17, 2048])   natural prompts of exactly these lengths
    passage(tokenizer, 2048, rng)    one of them, and where in it sentences begin
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .load import TEXT


def corpus(tokenizer: PreTrainedTokenizerBase, path: Path = TEXT) -> Tensor:
    """The whole text as token ids, [N] int64, without special tokens. Kept on disk beside the text, a file a tokenizer.

    Raises:
        FileNotFoundError: the text is not there (run `make model`).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the text for prompts is not in {path}: run `make model`")
    text = path.read_text(encoding="utf-8")
    cached = path.with_name(f"{path.stem}-{_fingerprint(tokenizer, text)}.npy")
    if not cached.exists():
        # A chapter at a time: some tokenizers take a text without a break as one word, in quadratic time.
        chapters = [chapter + "\n\n" for chapter in text.strip().split("\n\n")]
        ids = tokenizer(chapters, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        _save(cached, np.concatenate([np.asarray(chapter, dtype=np.int32) for chapter in ids]))
    return torch.from_numpy(np.load(cached)).long()


def prompts(
    tokenizer: PreTrainedTokenizerBase | None,
    lengths: Sequence[int],
    *,
    seed: int = 0,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """A prompt of exactly that many tokens for each of `lengths`. Each begins with a sentence, at a random place.

    Without a tokenizer (a model with random weights) the ids are uniform below `vocab_size`.

    Raises:
        ValueError: a length is not positive or beyond the text, or there is neither tokenizer nor vocab_size.
    """
    if any(length < 1 for length in lengths):
        raise ValueError(f"a prompt has at least one token; asked for lengths {list(lengths)}")
    rng = random.Random(seed)
    if tokenizer is None:
        if vocab_size is None:
            raise ValueError("random prompts need a vocab_size where there is no tokenizer")
        return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    return [passage(tokenizer, length, rng)[0] for length in lengths]


def passage(tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Exactly `length` tokens from the beginning of a sentence, and the ascending indices at which one begins, 0 first.

    Raises:
        ValueError: the text is shorter.
    """
    ids, starts = _sentences(tokenizer)
    if length > len(ids):
        raise ValueError(f"the text has {len(ids)} tokens; asked for a prompt of {length}")
    num_fitting = bisect_left(starts, len(ids) - length + 1)  # a start is 0 at least, so that one always fits
    first = rng.randrange(num_fitting)
    start = starts[first]
    borders = [border - start for border in starts[first : bisect_left(starts, start + length)]]
    return ids[start : start + length], borders


@lru_cache(maxsize=4)
def _sentences(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The corpus and the ascending indices at which a sentence begins (0 first)."""
    ids = corpus(tokenizer).tolist()
    stop = tokenizer("Amen.", add_special_tokens=False)["input_ids"][-1]
    return ids, [0, *(i + 1 for i, token_id in enumerate(ids[:-1]) if token_id == stop)]


def _fingerprint(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{described}\n{text}".encode()).hexdigest()[:16]


def _save(path: Path, ids: np.ndarray) -> None:
    """Whole or not at all: benches that start together may write the same file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".partial-", suffix=".npy", delete=False) as file:
        try:
            np.save(file, ids)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
