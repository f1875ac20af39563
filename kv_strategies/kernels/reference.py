"""The specification: what storing K and V and attending over a block table mean, in plain torch.

Slow on purpose, and short. Every other implementation in this folder has these two signatures and is tested against
them; a caller can be handed any. All arithmetic is float32, whatever the store holds.

    store_kv:   token t of the step  ->  slot_mapping[t] = block * block_size + offset
    attention:  token j of row b     ->  block_tables[b, j // block_size], offset j % block_size

The softmax is spelt out, one row of the batch after the other:

    out[i] = sum_j p[i, j] v[j]    with    p[i, :] = softmax over the visible j of (scaling * q[i] . k[j])

Shapes: T packed query tokens of B rows, Hq query heads in groups over Hkv heads of K and V, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..step.plan import LayerStore, Plan
from .linear import Rotary, rotate_heads

#: What holds codes of 4 bits, two a byte: of D numbers, byte i has number i in its low half and number D / 2 + i in its
#: high one. A half byte n stands for the code 2 n - 15: sixteen codes, evenly spaced, none of them 0.
HALF_BYTES = torch.uint8
#: Largest magnitude of a code: a scale is absmax / CODE_MAX, so that the largest number maps to the last code.
CODE_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, HALF_BYTES: 15.0}

#: Numbers [.., D] of any float dtype -> what is stored of them and a scale, or None; and back, to float32 [.., D]. See
#: `base.Codec`.
Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]
Decode = Callable[[Tensor, Tensor | None], Tensor]
#: Index of a query [n, 1], indices of tokens [s] -> bool [n, s]. See `base.Retention`.
Visible = Callable[[Tensor, Tensor], Tensor]


def store_kv(
    key: Tensor,
    value: Tensor,
    layer: LayerStore,
    slot_mapping: Tensor,
    query: Tensor | None = None,
    rotary: Rotary | None = None,
    plan: Plan | None = None,
    *,
    encode: tuple[Encode, Encode] | None = None,
) -> None:
    """Write the K and V of this step's tokens into their slots.

    Args:
        key, value: [T, Hkv, D], any strides but the last.
        layer: the store of one layer; stores of codes get a scale for each token and head as well.
        slot_mapping: [T] int64, block * block_size + offset; -1 (NULL_SLOT) writes nothing.
        query, rotary: given together where the product before has left rotary embedding to this: queries [T, Hq, D]
            and keys are rotated first, in place, whether or not they have a slot.
        plan: of the step, which keeps what its layers have in common (`triton_launch.py`); needed for nothing else.
        encode: what is stored of K, and of V; unless told, what the store's dtypes say.
    """
    if rotary is not None:
        rotate_heads(query, rotary)
        rotate_heads(key, rotary)
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    block, offset = slots // layer.block_size, slots % layer.block_size
    planes = (key, layer.k, layer.k_scale), (value, layer.v, layer.v_scale)
    for (tensor, store, scales), own_encode in zip(planes, encode or (None, None), strict=True):
        data, scale = tensor[written], None
        if own_encode is not None:
            data, scale = own_encode(data)
        elif scales is not None:
            data, scale = quantise(data, store.dtype, scales.dtype)
        if scale is not None:
            scales[block, :, offset] = scale
        store[block, :, offset] = data.to(store.dtype)


def quantise(tensor: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """[.., D] -> (codes [.., D] in `dtype`, scale [..]) with tensor ~ codes * scale, rounded to nearest, ties to even.

    A vector of zeros gets scale 0. The scale is rounded to its stored type first, so that both sides use the same one.
    Codes of 4 bits [.., D / 2] are those of the tensor turned (see `turn`).
    """
    code_max = CODE_MAX[dtype]
    tensor = turn(tensor) if dtype == HALF_BYTES else tensor.float()
    largest = tensor.abs().amax(-1)
    # By a tensor: by a number torch multiplies by what 1 / it is rounded to on a GPU, and a bit more or less of the
    # quotient may round to another scale.
    scale = (largest / torch.full_like(largest, code_max)).to(scale_dtype)
    codes = tensor / torch.where(scale == 0, 1.0, scale.float())[..., None]
    codes = codes.clamp(-code_max, code_max)
    if dtype == HALF_BYTES:
        low, high = ((codes + code_max) * 0.5).round().to(dtype).chunk(2, dim=-1)
        return low | high << 4, scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def dequantise(codes: Tensor, scale: Tensor | None) -> Tensor:
    """Numbers [.., D] as they are, or codes with a scale [..] each -> float32 [.., D]: what `quantise` was given."""
    if scale is None:
        return codes.float()
    numbers = scaled(codes, scale)
    return turn(numbers) if codes.dtype == HALF_BYTES else numbers


def scaled(codes: Tensor, scale: Tensor | None) -> Tensor:
    """As `dequantise`, but 4-bit codes give what was turned."""
    return codes.float() if scale is None else unpack(codes) * scale.float()[..., None]


def unpack(codes: Tensor) -> Tensor:
    """Codes as float32 [.., D], exactly."""
    if codes.dtype != HALF_BYTES:
        return codes.float()
    return torch.cat((codes & 15, codes >> 4), dim=-1).float().mul_(2).sub_(CODE_MAX[HALF_BYTES])


def turn(tensor: Tensor) -> Tensor:
    """[.., D] -> its Hadamard transform, float32: orthonormal, and its own inverse.

    Each number becomes a sum of many with alternating signs, so that an outlier is spread over all of them, and the
    largest of them is hardly larger than the others. Where q and k are turned alike, q . k stays what it was; where V
    is, so is the sum that is read of it, to be turned back (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).

    Of D = 2^m r numbers, those that are r apart are transformed together: for r = 1, all of them. By sums of two each
    time, so that what becomes of a vector does not depend on others beside it, to the bit.
    """
    size = tensor.shape[-1] & -tensor.shape[-1]
    turned = tensor.float().unflatten(-1, (size, -1))
    for _ in range(size.bit_length() - 1):
        first, second = turned.chunk(2, dim=-2)
        turned = torch.stack((first + second, first - second), dim=-2).flatten(-3, -2)
    return turned.flatten(-2) * size**-0.5


def attention(
    query: Tensor,
    layer: LayerStore,
    plan: Plan,
    *,
    scaling: float,
    window: int = 0,
    sinks: int = 0,
    sink_query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    decode: Decode = dequantise,
    visible: Visible | None = None,
) -> Tensor:
    """Causal attention of each row's queries over the tokens its block table holds.

    The token at index p of its row sees the indices j <= p; with a window only those with j > p - window or j < sinks.

    Args:
        query: [T, Hq, D], Hq a multiple of Hkv; the query heads of one K/V head lie next to each other.
        layer: the store of one layer. Slots that no visible token owns may hold anything, NaN included.
        plan: where the tokens are. Its row b owns the queries cu_seqlens_q[b]:cu_seqlens_q[b + 1], its last tokens.
        scaling: factor on q . k.
        window: tokens seen back from p, itself included; 0 sees everything.
        sinks: tokens at the start of a row that stay visible however far the window has moved (StreamingLLM).
        sink_query: [T, Hq, D], the query to use against the tokens j < sinks instead: rotated to where those keys
            would stand if they came right before the window. One softmax runs over both parts.
        key, value: [T, Hkv, D], this step's own, which are in the store already: a shortcut for who wants one, and
            ignored here.
        decode: what the stored bytes mean.
        visible: another mask than that of `window` and `sinks`.

    Returns:
        [T, Hq, D] in the query's type; zeros for rows of context 0.
    """
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    starts, context_lens = plan.cu_seqlens_q.tolist(), plan.context_lens.tolist()
    for row, context_len in enumerate(context_lens):
        begin, end = starts[row], starts[row + 1]
        if context_len == 0 or begin == end:
            continue
        position = torch.arange(context_len - (end - begin), context_len, device=query.device)[:, None]  # [n, 1]
        index = torch.arange(context_len, device=query.device)  # [context]
        mask = sees(position, index, window, sinks, visible)  # [n, context]
        seen = mask.any(0)  # tokens out of every window may be gone: their blocks are never read

        table, num_heads = plan.block_tables[row], query.shape[1]
        k = gather_heads(layer.k, layer.k_scale, table, index[seen], num_heads, decode)  # [Hq, seen, D]
        v = gather_heads(layer.v, layer.v_scale, table, index[seen], num_heads, decode)

        scores = query[begin:end].transpose(0, 1).float() @ k.mT  # [Hq, n, seen]
        if sink_query is not None:
            sink_scores = sink_query[begin:end].transpose(0, 1).float() @ k.mT
            scores = torch.where(index[seen] < sinks, sink_scores, scores)
        scores = (scores * scaling).masked_fill(~mask[:, seen], float("-inf"))
        out[begin:end] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)  # [n, Hq, D]
    return out


def compact(plane: Tensor, sources: Tensor, targets: Tensor, kept: Tensor) -> None:
    """Move the tokens of a row that each head keeps into its first blocks, in place: one read and one write of each.

        head h   sources  [ 0 1 2 3 | 4 5 6 7 | 8 9 .. ]    kept[l, h] = 1 4 6 9
                 targets  [ 1 4 6 9 ]                       token j of them to index j

    Args:
        plane: [N, L, Hkv, block_size, ..], codes or scales alike: bytes move as they are.
        sources: [n] int64, the blocks of the row; targets: [ceil(m / block_size)], each the same as in `sources` at its
            place, or none of those.
        kept: [L, Hkv, m] int64 indices of the row, ascending along m, so that nothing is written over before it is
            read.
    """
    if plane.dtype.itemsize == 1:
        plane = plane.view(torch.uint8)  # no index serves float8
    size, device = plane.shape[3], plane.device
    head, place = torch.arange(plane.shape[2], device=device)[:, None], torch.arange(kept.shape[2], device=device)
    for layer, index in enumerate(kept):
        data = plane[:, layer]
        data[targets[place // size], head, place % size] = data[sources[index // size], head, index % size]


def sees(position: Tensor, index: Tensor, window: int, sinks: int, visible: Visible | None = None) -> Tensor:
    """Whether queries at `position` [n, 1] see the tokens at `index` [s] -> [n, s]."""
    mask = index <= position
    if visible is not None:
        mask &= visible(position, index)
    elif window:
        mask &= (index > position - window) | (index < sinks)
    return mask


def gather_heads(
    store: Tensor, scales: Tensor | None, table: Tensor, index: Tensor, num_heads: int, decode: Decode = dequantise
) -> Tensor:
    """As `gather`, for each of the query heads [Hq, n, D]: those of a group have the same K and V."""
    data = gather(store, scales, table, index, decode)
    return data.repeat_interleave(num_heads // len(data), 0)


def gather(store: Tensor, scales: Tensor | None, table: Tensor, index: Tensor, decode: Decode = dequantise) -> Tensor:
    """Tokens `index` [n] of one row from [N, Hkv, block_size, ..], as float32 [Hkv, n, D], decoded."""
    block_size = store.shape[2]
    block, offset = table[index // block_size].long(), index % block_size
    block, offset = block.to(store.device), offset.to(store.device)  # V may lie in host memory
    scale = None if scales is None else scales[block, :, offset]
    return decode(store[block, :, offset], scale).transpose(0, 1).to(index.device)
