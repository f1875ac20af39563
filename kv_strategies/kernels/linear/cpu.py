"""Linear layers on a CPU: the library's products, asked for in the form in which they are fast.

The products of all layers of SmolLM2-135M in float32, in milliseconds, on two cores (Zen, AVX-512) whose memory gives
50 GB/s, by torch 2.13 with MKL. Reading the weights takes 8.5 ms:

    rows                    1     2     4     8    16    64   512
    F.linear, MKL          25    43    38    39    48   108   550    far from the bandwidth, and from the cores' rate
    W x^T, MKL             25    11    13    27    37    87   572    the same product, transposed
    pieces of W, MKL      8.5                                        one batched product of a vector and 32 pieces
    W x^T, oneDNN          17    17    18    18    19    39   272    in tiles of 16 rows, so 16 cost what 1 does
    x W^T, oneDNN                16    17    19    22    45   249    the same without turning the result

The same on two cores of Zen that have AVX2 and 40 GB/s, where oneDNN's tiles gain nothing:

    rows                    1     2     4     8    16    64   512
    F.linear, MKL          31    49    53    49    60   139   668
    W x^T, MKL             31    21    22    38    51   131   799
    pieces of W, MKL       20
    W x^T, oneDNN          23    35    34    38    47   158   986
    x W^T, oneDNN          23    34    35    44    55   145   800

And on two cores of an Intel Xeon with AVX-512 and 28 GB/s, whose processors MKL is made for:

    rows                    1     2     4     8    16    64   512
    F.linear, MKL          20    21    35    46    46    89   368
    W x^T, MKL             19    47    47    49    50   112   498
    pieces of W, MKL       47
    W x^T, oneDNN          40    39    39    39    43    99   541
    x W^T, oneDNN          52    52    51    51    51   106   491

Pages of 2 MiB, which torch takes with `THP_MEM_ALLOC_ENABLE=1` in the environment, spare one row 2 to 5 % of that.

torch asks oneDNN for 16 bits alone, so float32 has to ask for itself. Where oneDNN has nothing for 16 bits either (two
cores with AVX2: 64 rows in bfloat16 take 1050 ms, in float32 198 by MKL), W is widened to float32 a tile at a time,
which stays in the cache until it is multiplied.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain import Norm, Rotary, rms_norm, rotate

#: Pieces of W that one row is multiplied with: enough for any number of threads to have equally many.
PIECES = 32
#: Rows for which the library's own W x^T is faster than oneDNN's, whose tiles are for 16 of them.
FEW_ROWS = range(2, 5)
#: Rows of oneDNN's products, in multiples of its tile and at most so many at once. It makes code for each shape that it
#: meets, in 1 to 3 ms, and keeps it: 0.4 to 0.7 MB.
TILE_ROWS, MOST_ROWS = 16, 128
#: Rows up to which W x^T, with what it takes to turn it, is faster than x W^T.
MAX_TURNED_ROWS = 64
#: Fewer rows of 16 bits are faster in the library's loop than widened.
MIN_WIDENED_ROWS = 6
#: Numbers of a weight widened at a time: 4 MiB.
TILE = 1 << 20


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    rotary: Rotary | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """See `linear.linear`. What a product has widened stays so to the end; else the gate rounds as its module does."""
    dtype = x.dtype
    if norm is not None:
        x = rms_norm(x, norm)
    y = product(x, weight)
    if bias is not None:
        y += bias
    if rotary is not None:
        rotate(y, rotary)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate).mul_(up)
    return y.to(dtype) if residual is None else residual.add_(y)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N], float32 where it was computed in that."""
    if weight.dtype == torch.float32:
        return multiply(x, weight)
    if len(x) < MIN_WIDENED_ROWS or is_native(weight.dtype):
        return F.linear(x, weight)
    x = x.float()
    tiles = weight.split(max(1, TILE // weight.shape[1]))
    return torch.cat([multiply(x, tile.float()) for tile in tiles], dim=1)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """The same in float32."""
    num_rows = len(x)
    if suits_mkl():
        return F.linear(x, weight)
    if num_rows == 1 and len(weight) % PIECES == 0:
        pieces = weight.unflatten(0, (PIECES, -1))
        return torch.bmm(pieces, x.mT.expand(PIECES, -1, -1)).view(1, -1)
    if num_rows in FEW_ROWS or not has_tiles():
        return F.linear(x, weight) if num_rows > MAX_TURNED_ROWS else F.linear(weight, x).mT.contiguous()
    x = F.pad(x, (0, 0, 0, -num_rows % TILE_ROWS))
    if num_rows <= MAX_TURNED_ROWS:
        return onednn_linear(weight, x).mT[:num_rows].contiguous()
    return torch.cat([onednn_linear(rows, weight) for rows in x.split(MOST_ROWS)])[:num_rows]


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` by oneDNN, whatever this build of torch would take."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@cache
def suits_mkl() -> bool:
    """Whether the library's products are as fast as they can be: MKL on a processor of its own maker."""
    try:
        return torch.backends.mkl.is_available() and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@cache
def has_tiles() -> bool:
    """Whether oneDNN is here, and faster than the library's own products."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@cache
def is_native(dtype: torch.dtype) -> bool:
    """Whether products in this type have instructions of their own here, or nothing to gain from float32."""
    if dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return True
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return getattr(torch.ops.mkldnn, names[dtype])()
