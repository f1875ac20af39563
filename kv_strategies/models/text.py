"""Natural English for prompts, perplexity and retrieval: the King James text, about a million tokens.

Random token ids make attention unlike that of real text (and greedy output degenerate), so every workload on a model
with a tokenizer is cut from one real text. `make model` brings it (`fetch.py`).

    corpus(tokenizer)                    all of it as token ids
    prompts(tokenizer, [17, 2048])       natural prompts of exactly these lengths
    passage(tokenizer, 2048, rng)        one of them, and where in it sentences begin
    needle(tokenizer, 2048, depth=0.5)   a fact hidden in a long text, and the question for it (needle in a haystack,
                                         G. Kamradt 2023; in the short form of Mohtashami and Jaggi's passkey, 2023)
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .load import TEXT


@dataclass(frozen=True)
class Needle:
    """A prompt that ends where the model is to say `answer`. It was found where the output begins with `answer`."""

    token_ids: list[int]
    answer: str
    position: int  # token index at which the hidden fact begins

    def is_found(self, output: str) -> bool:
        return output.strip().startswith(self.answer)


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


def needle(tokenizer: PreTrainedTokenizerBase, length: int, *, depth: float = 0.5, seed: int = 0) -> Needle:
    """A chat prompt of exactly `length` tokens: text, a number hidden at `depth` (0 start, 1 end) of it, the question.

    The assistant's turn is begun for it, up to the number. The digits are tokens of their own in most tokenizers, so
    that nothing but attention to the hidden sentence gives all of them.

    Raises:
        ValueError: `length` leaves no room for any text, or `depth` is not in [0, 1].
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is a share of the text, 0 to 1; asked for {depth}")
    rng = random.Random(seed)
    answer = str(rng.randrange(10_000, 100_000))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    head, tail = _needle_form(tokenizer)
    fact = encode(f" The pass key is {answer}. Remember it: {answer} is the pass key.")
    head, tail = encode(head), encode(tail)
    room = length - len(head) - len(fact) - len(tail)
    if room < 1:
        raise ValueError(f"a needle needs {length - room + 1} tokens with this tokenizer; asked for {length}")
    hay, borders = passage(tokenizer, room, rng)
    # At the sentence border next to the depth; at the very end of the text where that is nearer.
    at = min([*borders, room], key=lambda border: abs(border - depth * room))
    return Needle([*head, *hay[:at], *fact, *hay[at:], *tail], answer, len(head) + at)


def _needle_form(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    mark = "<<text>>"
    ask = (
        "There is a pass key hidden in the text below. Find it and remember it.\n\n"
        f"{mark}\n\nWhat is the pass key? Answer with the pass key."
    )
    if tokenizer.chat_template:
        ask = tokenizer.apply_chat_template(
            [{"role": "user", "content": ask}], add_generation_prompt=True, tokenize=False
        )
    else:
        ask += "\n"
    head, tail = (ask + "The pass key is").split(mark)
    return head, tail


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
