"""Linear layers on a CPU: the library's products, asked for in the form in which they are fast.

All products of a decode step of SmolLM2-135M in milliseconds (64 rows: without the head), on two cores with AVX2 and
torch 2.13, whose float32 products are MKL's:

    rows                     1     2     4     8    64
    F.linear, float32       44    78    82    73   286    few rows are far from the bandwidth, 12 GB/s or more,
    W x^T,    float32       39    36    41    54   198    to which the same product, transposed, comes near
    F.linear, bfloat16      18    31    62   125  1050    a plain loop, where the CPU has no instructions for it
    widened,  bfloat16      81    70    60    95   192

So few rows are computed as the transpose of W x^T, a single one among two. And where oneDNN has nothing for 16 bits,
W is widened to float32 a tile at a time, which stays in the cache until it is multiplied.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain import Norm, Rotary, rms_norm, rotate

#: Rows up to which W x^T is the faster form.
FEW_ROWS = 64
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
        return multiply(x, weight, x.new_empty(len(x), len(weight)))
    if len(x) < MIN_WIDENED_ROWS or is_native(weight.dtype):
        return F.linear(x, weight)
    x = x.float()
    y = x.new_empty(len(x), len(weight))
    step = max(1, TILE // weight.shape[1])
    for tile, out in zip(weight.split(step), y.split(step, dim=1), strict=True):
        multiply(x, tile.float(), out)
    return y


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """The same in float32, into `out` [T, N], any stride between its rows."""
    num_rows = len(x)
    if num_rows > FEW_ROWS:
        return torch.mm(x, weight.mT, out=out)
    if num_rows == 1:  # else it would be the library's product with a vector
        x = x.expand(2, -1).contiguous()
    return out.copy_(torch.mm(weight, x.mT).mT[:num_rows])


@cache
def is_native(dtype: torch.dtype) -> bool:
    """Whether products in this type have instructions of their own here, or nothing to gain from float32."""
    if dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return True
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return getattr(torch.ops.mkldnn, names[dtype])()
