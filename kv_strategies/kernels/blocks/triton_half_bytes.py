"""4-bit codes in registers for `triton_decode_groups.py`: an instruction or two for two codes.

A half byte n in the low bits of a float16 is the number n 2^-24, which tensor cores multiply as any other: nothing
has to be converted. A word of eight codes gives four pairs by a mask each, the high halves of its bytes 16 times as
large:

    word & 0x000f000f    low halves of bytes 0, 2          word >> 8 & 0x000f000f    those of bytes 1, 3
    word & 0x00f000f0    their high halves                 word >> 8 & 0x00f000f0    their high halves

What n stands for is scale (2 n - 15). Factors and offsets wait until after the products, or are in them already:

    q . k = scale_k (2 q . n - 15 sum(q))       the sum is where the product starts
    sum w v = 2 (w scale_v) . n - 15 sum(w scale_v)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import opaque

#: Twice 2^24: what a sum of n, as they lie in float16, is multiplied by.
UNITS = tl.constexpr(2.0**25)
#: q is that many times as large, so that a sixteenth of it loses nothing; and what is left of UNITS then.
Q_UNIT = tl.constexpr(2.0**14)
LEFT = tl.constexpr(2.0**11)


@triton.jit
def place_of(place, DIM: tl.constexpr):
    """Where in a piece [DIM / 8] of a token the numbers lie that `unpack` gives: byte, and whether its high half."""
    byte = place // 8 * 4 + place % 8 // 4 + place % 2 * 2
    return byte, place % 4 // 2


@triton.jit
def load_q(query, stride_head, scaling, GROUP: tl.constexpr, DIM: tl.constexpr):
    """As `triton_decode_groups.load_q`, and where products of q start [(half, 8 heads), 1]."""
    halves, heads, place = tl.arange(0, 2), tl.arange(0, 8), tl.arange(0, DIM // 2)  # (pair of numbers, lane, number)
    byte, is_high = place_of(place // 8 * 2 + place % 2, DIM)
    dims = place // 2 % 4 * (DIM // 16) + byte + is_high * (DIM // 2)
    address = query + (halves * (DIM // 4))[:, None, None] + (heads * stride_head)[None, :, None] + dims[None, None, :]
    q = tl.load(address, mask=(heads < GROUP)[None, :, None], other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.max(tl.abs(q), 2), 0), 1e-30)
    size = tl.where(is_high == 1, 16.0, 1.0)[None, None, :]
    q = (q / largest[None, :, None] * (Q_UNIT / size)).to(tl.float16)
    start = tl.sum(q.to(tl.float32) * size, 2) * (-15 / UNITS)
    return tl.reshape(q, [16, DIM // 2]), largest * scaling * LEFT, tl.reshape(start, [16, 1])


@triton.jit
def unpack(words, FAST: tl.constexpr):
    """Words [A, W] -> the eight codes of each, as they lie in float16 [A, W, 8], in the order of `place_of`."""
    a, b, c, d, e, f, g, h = pairs_of(words, FAST)
    low, high = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    return opaque(tl.reshape(tl.join(low, high), [words.shape[0], words.shape[1], 8]), FAST)


@triton.jit
def unpack_pairs(even, odd, FAST: tl.constexpr):
    """Words [A, W] of two tokens -> [A, W, 8, 2], each code of one beside that of the other; of the bytes in their
    order the low half, then the high one."""
    if FAST:
        first, second = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;", "=&r,=r,r,r", [even, odd],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        first = (even & 0xFFFF) | (odd << 16)
        second = ((even >> 16) & 0xFFFF) | (odd & -65536)
    words = tl.reshape(tl.join(first, second), [even.shape[0], 2 * even.shape[1]])
    a, b, c, d, e, f, g, h = pairs_of(words, FAST)  # of even and odd: byte 0 low, byte 0 high, byte 1 low, byte 1 high
    low, high = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    return opaque(tl.reshape(tl.join(low, high), [even.shape[0], even.shape[1], 8, 2]), FAST)


@triton.jit
def pairs_of(words, FAST: tl.constexpr):
    """The four pairs that masks give of each word, one number after the other."""
    if FAST:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, next;
            shr.b32 next, $8, 8;
            and.b32 low, $8, 0x000f000f;
            and.b32 high, $8, 0x00f000f0;
            mov.b32 {$0, $1}, low;
            mov.b32 {$2, $3}, high;
            and.b32 low, next, 0x000f000f;
            and.b32 high, next, 0x00f000f0;
            mov.b32 {$4, $5}, low;
            mov.b32 {$6, $7}, high;
            }
            """,
            "=h,=h,=h,=h,=h,=h,=h,=h,r", [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a, b = as_half(words & 0x000F), as_half(words >> 16 & 0x000F)
        c, d = as_half(words & 0x00F0), as_half(words >> 16 & 0x00F0)
        e, f = as_half(words >> 8 & 0x000F), as_half(words >> 24 & 0x000F)
        g, h = as_half(words >> 8 & 0x00F0), as_half(words >> 24 & 0x00F0)
    return a, b, c, d, e, f, g, h


@triton.jit
def as_half(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def in_dims(acc, sum_weights, DIM: tl.constexpr):
    """Sums of V [(number, 8 pieces of a token), 8 heads] and of its weights [8] -> numbers [8, DIM]."""
    W: tl.constexpr = DIM // 64
    acc = tl.permute(tl.reshape(acc, [W * 4, 2, 8, 8]), [3, 1, 2, 0])  # head, high or low half, piece, byte
    size = tl.where(tl.arange(0, 2) == 1, UNITS / 16, UNITS)[None, :, None, None]
    return tl.reshape(acc * size, [8, DIM]) - 15 * sum_weights[:, None]
