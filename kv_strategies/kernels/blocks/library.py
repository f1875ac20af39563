"""Attention of the long stretches of a prompt, by the library whose kernels are the fastest for them.

On a Hopper GPU cuDNN's attention is about twice as fast as FlashAttention 2 (on an H100 531 to 641 TFLOP/s against 269
to 345, causal, 4096 to 16384 tokens). It knows no block tables, so n queries behind a past of P are two attentions:

    [ past: gathered from its blocks, all of it visible ][ own: K and V as the projections left them, causal ]
      P tokens                                             n tokens

    out = past + w (own - past)    with    w = sigmoid(lse_own - lse_past)

which is one softmax over both. Costs: the past is read and written once more (2 x 16 KiB a token and layer of
Llama-2-7B, some percent of what is saved), and cuDNN builds a plan for each new shape, some 30 ms in which the GPU
waits for the host. So both lengths are made whole steps, of which there are few. The last part of a step of the past
counts as own, with queries that nobody asked for, and what follows the own tokens is padded: nobody who asks sees it.

    [ whole steps of the past ][ rest of it | own tokens | padding ]
                                 no queries   n queries    no queries

Codes are decoded as they are gathered: once for all queries of a chunk, where a kernel that reads codes decodes them
again for each tile of queries. The past comes SEGMENT tokens at a time, so that what is decoded takes bounded memory,
and the parts are merged likewise. The chunk's own K and V are gathered too: what a token reads is what is stored,
whether it is a token of a prompt or of a decode step, and however a prompt is cut.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...step.plan import LayerStore
from .triton_common import VARYING, load_tile

#: Tokens. Fewer queries gain less than their plan costs. (What a CUDA graph prefills is shorter: a bound of the past
#: would not do here.)
STEP = 1024
#: Tokens of a past that are decoded at a time: 2 x 16 MiB of Llama-3.1-8B's heads.
SEGMENT = 8 * STEP
#: Tokens a program gathers.
TILE = 64


def num_queries(query_len: int, past_len: int, query: Tensor) -> int:
    """How many of a row's queries, the first ones, go to the library."""
    if query.element_size() != 2 or query.shape[-1] % 8 or query.shape[-1] > 128:  # torch may lack a fused kernel
        return 0
    if prefers_cudnn(query.device):
        return query_len if query_len >= STEP else 0
    return 0 if past_len else query_len // STEP * STEP


def prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention is the fastest here, by the same rule as torch's own. Its user may forbid it."""
    return _suits_cudnn(device) and torch.backends.cuda.cudnn_sdp_enabled()


@cache
def _suits_cudnn(device: torch.device) -> bool:
    is_able = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return is_able and (torch.backends.cudnn.version() or 0) > 91500  # older ones were wrong at some lengths


def attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    layer: LayerStore,
    table: Tensor,
    past_len: int,
    scaling: float,
) -> Tensor:
    """Attention of n new tokens of a row, among themselves and to the `past_len` tokens before them.

    Args:
        query: [n, Hq, D].
        key, value: [n, Hkv, D], of the same tokens; None where they are to be read as they are stored.
        layer: holds the past, in the blocks that `table` [max_blocks] names.

    Returns:
        [n, Hq, D]
    """

    def read(begin: int, end: int, length: int) -> tuple[Tensor, Tensor]:
        stores = ((layer.k, layer.k_scale), (layer.v, layer.v_scale))
        return tuple(gather(*store, table, begin, end, length, query) for store in stores)

    num_queries, behind = len(query), past_len % STEP
    past_len -= behind
    end = behind + num_queries
    length = -(-end // STEP) * STEP
    if not behind and (length == num_queries or not prefers_cudnn(query.device)):
        own = (key, value) if key is not None else read(past_len, past_len + num_queries, num_queries)
    else:
        own = read(past_len, past_len + end, length)
        query = F.pad(query, (0, 0, 0, 0, behind, length - end))
    if not past_len and len(query) == num_queries:  # torch takes cuDNN where it is the fastest, and another elsewhere
        query, key, value = _heads_first(query, *own)
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out[0].transpose(0, 1)

    def part(key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = attend(query, key, value, scaling, is_causal)
        return out[behind:end], lse[:, behind:end]

    merged = part(*own, is_causal=True)
    step = past_len if layer.k_scale is None else SEGMENT
    for begin in range(0, past_len, max(1, step)):
        stop = min(begin + step, past_len)
        merged = merge(*merged, *part(*read(begin, stop, stop - begin), is_causal=False))
    return merged[0]


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """[n, Hq, D] over [m, Hkv, D] -> out [n, Hq, D], log-sum-exp of the scores (base e) [Hq, n] float32."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_heads_first(query, key, value), attn_bias=None, compute_log_sumexp=True, is_causal=is_causal, scale=scaling
    )
    return out[0].transpose(0, 1), lse.view(query.shape[1], len(query))


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(0, 1)[None] for tensor in tensors)  # [1, H, n, D]


def gather(
    store: Tensor, scales: Tensor | None, table: Tensor, begin: int, end: int, length: int, query: Tensor
) -> Tensor:
    """The tokens begin:end of a row, from [N, Hkv, block_size, D] and its table -> [length, Hkv, D], head by head,
    numbers of the query's type and size: codes times their scales; zeros behind them.
    """
    _, num_heads, block_size, _ = store.shape
    num_tokens, dim = end - begin, query.shape[-1]
    out = query.new_empty(num_heads, length, dim)
    quantised = scales is not None
    scales = scales if quantised else store  # not read unless quantised
    gather_kernel[(triton.cdiv(length, TILE), num_heads)](
        store, scales, table, out, begin, num_tokens, length, *store.stride()[:3], *scales.stride()[:2], out.stride(0),
        BLOCK_SIZE=block_size, DIM=dim, DIM_P2=triton.next_power_of_2(dim), QUANTISED=quantised, TILE=TILE,
    )  # fmt: skip
    return out.transpose(0, 1)


@triton.jit(
    do_not_specialize=[*VARYING["do_not_specialize"], "begin", "length"],
    do_not_specialize_on_alignment=VARYING["do_not_specialize_on_alignment"],
)
def gather_kernel(
    store, scales, table, out, begin, num_tokens, length, stride_block, stride_head, stride_token,
    scale_stride_block, scale_stride_head, out_stride_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr, QUANTISED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, DIM_P2)
    seen = index < num_tokens
    tile, scale = load_tile(
        store, scales, table, head, begin + index, seen, stride_block, stride_head, stride_token,
        scale_stride_block, scale_stride_head, BLOCK_SIZE, DIM, DIM_P2, QUANTISED,
    )  # fmt: skip
    if QUANTISED:
        tile = (tile.to(tl.float32) * scale[:, None]).to(out.dtype.element_ty)
    target = out + head.to(tl.int64) * out_stride_head + index[:, None].to(tl.int64) * DIM + dims[None, :]
    tl.store(target, tile, mask=(index < length)[:, None] & (dims < DIM)[None, :])


def merge(own: Tensor, own_lse: Tensor, past: Tensor, past_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over other tokens, [n, Hq, D] with [Hq, n], -> that over all of them."""
    num_tokens, num_heads, dim = own.shape
    out = torch.empty_like(own, memory_format=torch.contiguous_format)
    lse = torch.empty_like(own_lse, memory_format=torch.contiguous_format)
    merge_kernel[(num_tokens,)](
        own, own_lse, past, past_lse, out, lse,
        *own.stride()[:2], *past.stride()[:2], *own_lse.stride(), *past_lse.stride(), lse.stride(0),
        HEADS=num_heads, HEADS_P2=triton.next_power_of_2(num_heads), DIM=dim, DIM_P2=triton.next_power_of_2(dim),
        num_warps=8,
    )  # fmt: skip
    return out, lse


@triton.jit
def merge_kernel(
    own, own_lse, past, past_lse, out, lse,
    own_stride_token, own_stride_head, past_stride_token, past_stride_head,
    own_lse_stride_head, own_lse_stride_token, past_lse_stride_head, past_lse_stride_token, lse_stride_head,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads, dims = tl.arange(0, HEADS_P2), tl.arange(0, DIM_P2)
    mask = (heads < HEADS)[:, None] & (dims < DIM)[None, :]
    own_lse += heads * own_lse_stride_head + token * own_lse_stride_token
    past_lse += heads * past_lse_stride_head + token * past_lse_stride_token
    own_lse = tl.load(own_lse, mask=heads < HEADS, other=0.0)
    past_lse = tl.load(past_lse, mask=heads < HEADS, other=0.0)
    share = tl.sigmoid(own_lse - past_lse)[:, None]
    best = tl.maximum(own_lse, past_lse)
    both = best + tl.log(tl.exp(own_lse - best) + tl.exp(past_lse - best))
    tl.store(lse + heads * lse_stride_head + token, both, mask=heads < HEADS)
    head, dim = heads[:, None], dims[None, :]
    own = tl.load(own + token * own_stride_token + head * own_stride_head + dim, mask=mask, other=0.0).to(tl.float32)
    past = tl.load(past + token * past_stride_token + head * past_stride_head + dim, mask=mask, other=0.0)
    past = past.to(tl.float32)
    merged = past + share * (own - past)
    tl.store(out + token * HEADS * DIM + head * DIM + dim, merged.to(out.dtype.element_ty), mask=mask)
