"""Stop strings: whether the text of a row has just come to one of them.

Tokens are not characters: a stop string may begin or end inside a token, and a character may take several tokens. So
the newest tokens are decoded together, with and without the last one, and a string that ends in what it has changed has
been completed by it. As in `generate()`, one may begin in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

_BYTES_A_CHARACTER = 4  # at most, in UTF-8; a token stands for a byte at least
_MARGIN = 8  # tokens: the first of a text may lose the space before it


def completes(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt: Sequence[int], token_ids: Sequence[int]
) -> bool:
    """Whether the last of `token_ids`, which follow the prompt, completes one of the strings."""
    size = _BYTES_A_CHARACTER * max(map(len, stop)) + _MARGIN
    newest = [*prompt[max(0, len(prompt) + len(token_ids) - size) :], *token_ids[-size:]]
    before, text = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (newest[:-1], newest))
    num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False)))
    return any(text.find(string, max(0, num_same + 1 - len(string))) >= 0 for string in stop)
