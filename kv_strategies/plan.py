"""The plan: what one forward pass needs to know about where its tokens live.

The control plane (Python integers, once a step) writes it; the data plane (kernels, once a layer) reads it. All
tensors are packed: T query tokens of B rows, one row after the other, without padding. Row `b` owns the queries
`cu_seqlens_q[b]:cu_seqlens_q[b + 1]`, and they are the *last* tokens of its context: query `i` of a row of `n` queries
stands at token index `context_lens[b] - n + i` of that row and sees all tokens up to and including itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Stands in a block table where a block was freed (out of the window). Never read: the kernels mask by token index.
NULL_BLOCK = -1
#: Stands in a slot mapping where a token must not be stored (the padding rows of a CUDA graph).
NULL_SLOT = -1


class LayerStore(NamedTuple):
    """The K and V of one layer as the kernels see them: N blocks of `block_size` tokens, any strides but the last.

    `k_scale` and `v_scale` are there only where a codec stores K and V in 8 bits (one scale a token and head).
    """

    k: Tensor  # [N, Hkv, block_size, D]
    v: Tensor  # [N, Hkv, block_size, D]
    k_scale: Tensor | None = None  # [N, Hkv, block_size]
    v_scale: Tensor | None = None  # [N, Hkv, block_size]

    @property
    def block_size(self) -> int:
        return self.k.shape[2]


@dataclass
class Plan:
    """One forward pass. Device tensors for the kernels, host integers for decisions about shapes (no sync needed)."""

    cu_seqlens_q: Tensor  # [B + 1] int32
    context_lens: Tensor  # [B] int32, tokens including those of this step; 0 for a padding row of a CUDA graph
    positions: Tensor  # [T] int64, index of each query token in its row
    slot_mapping: Tensor  # [T] int64, block * block_size + offset, NULL_SLOT writes nowhere
    block_tables: Tensor  # [B, max_blocks] int32, NULL_BLOCK where freed or beyond the context

    query_lens: list[int]  # [B] on the host
    row_lens: list[int]  # [B] on the host: upper bounds of context_lens (equal to them outside a CUDA graph)
    num_decodes: int  # the first num_decodes rows have exactly one query each; the rest have any number

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.positions.shape[0]

    @property
    def device(self) -> torch.device:
        return self.positions.device
