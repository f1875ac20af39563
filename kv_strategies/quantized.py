"""Quantized: what bytes encode K and V?

One byte a number or half a byte, and one scale a token and head, beside the block:

    code = round(x / scale)   scale = absmax(x) / 127 (int8), / 448 (fp8 e4m3), / 15 (int4)   x [D]: a token, a head

A scale a token needs no calibration and no second pass: a token is encoded when it is stored and never again, and an
outlier costs precision in its own head of its own token alone (per-token scales: KVQuant, Hooper et al. 2024, arXiv
2401.18079; KIVI, Liu et al. 2024, arXiv 2402.02750). The kernels read the codes and multiply by the scale as they go,
with float32 accumulation, so no decoded copy of a context ever exists; but long chunks of a prompt are for the library,
which wants numbers, and get a bounded stretch of their past decoded at a time.

What a token reads is what is stored, its own K and V included, in a prompt as in a decode step. So tokens do not depend
on how a prompt was cut, or on what of it was found.

Scales are bfloat16. They are rounded first and the codes computed from what was kept, so the coarse scale costs no
accuracy: at worst the largest number is cut by 127 * 2^-8 = 0.496 of a step, and rounding may take 0.5 of one anyhow.
The range is that of float32; float16 would lose precision in heads of small numbers.

**4 bits** are sixteen codes -15, -13, .. 15, evenly spaced: an outlier that takes a scale for itself leaves the other
numbers of its head two or three of them. So what is encoded is a Hadamard transform of the vector, which is
orthonormal and spreads an outlier over all numbers (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). It costs nothing a
token that is read: queries are turned like keys, and what is read of V is turned back (`kernels/blocks/turned.py`).
Numbers of a turned head are of one size, so one scale serves them all. `k8v4` keeps K in 8 bits: an error in a key
moves the weight of its token, one in a value averages out.

Bytes a token and head, of K and V:

    D       bf16     int8, fp8          k8v4               int4
    64      256      132   1.94 x       100   2.56 x       68    3.76 x the tokens in the same memory
    128     512      260   1.97 x       196   2.61 x       132   3.88 x

Saves: memory, and as much of the bytes that a decode step reads. Costs: with int8 an error of at most half a scale,
absmax / 253, the same for all numbers of a head; fp8 keeps three bits of mantissa, an error of 2^-4 relative, which is
better for small numbers and worse for large ones; int4 a fifteenth of the largest turned number. fp8 needs a GPU of
compute capability 8.9 or higher; on a CPU torch converts it in software.

    python -m kv_strategies.quantized      shows error and bytes on a small example
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Codec, Plain, Site
from .kernels.reference import HALF_BYTES, dequantise, quantise

SCALE_DTYPE = torch.bfloat16


class Quantized(Codec):
    """Codes, and a scale a token and head. Fewer than 8 bits come two codes a byte."""

    in_kernels = True
    dtypes: tuple[torch.dtype, torch.dtype]  # of K and V, as `quantise` knows them

    def planes(self, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> dict:
        k, v = (
            ((num_kv_heads, block_size, head_dim // 2 if own == HALF_BYTES else head_dim), own) for own in self.dtypes
        )
        scales = ((num_kv_heads, block_size), SCALE_DTYPE)
        return {"k": k, "v": v, "k_scale": scales, "v_scale": scales}

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return quantise(states, self.dtypes[0], SCALE_DTYPE)

    def encode_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return quantise(states, self.dtypes[1], SCALE_DTYPE)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return dequantise(codes, scale)


class Int8(Quantized):
    dtypes = torch.int8, torch.int8


class Fp8(Quantized):
    """Raises ValueError where one of the devices of the model's layers has no fp8."""

    dtypes = torch.float8_e4m3fn, torch.float8_e4m3fn

    def bind(self, site: Site) -> None:
        for device in dict.fromkeys(site.shape.layer_devices):
            if device.type != "cuda":
                continue
            capability = torch.cuda.get_device_capability(device)
            if capability < (8, 9):
                raise ValueError(
                    f"fp8 needs a GPU of compute capability 8.9 or higher, and {torch.cuda.get_device_name(device)} "
                    f"({device}) has {capability[0]}.{capability[1]}: use int8, which takes as many bytes"
                )


class Int4(Quantized):
    dtypes = HALF_BYTES, HALF_BYTES


class Key8Value4(Quantized):
    dtypes = torch.int8, HALF_BYTES


def bytes_per_token(codec: Codec, num_heads: int, head_dim: int) -> int:
    """Of K and V in one layer of a bfloat16 model."""
    planes = codec.planes(num_heads, 1, head_dim, torch.bfloat16)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in planes.values())


def main() -> None:
    torch.manual_seed(0)
    num_tokens, num_heads = 1000, 8
    print(f"{num_tokens} random tokens of {num_heads} heads; one number in a hundred is an outlier (20 times).\n")
    print(f"{'D':>3} {'codec':<5} {'bytes':>5} {'of bf16':>8} {'in the same memory':>19}   error / absmax: mean, worst")
    for head_dim in (64, 128):
        states = torch.randn(num_tokens, num_heads, head_dim)
        states[torch.rand(states.shape) < 0.01] *= 20
        plain = bytes_per_token(Plain(), num_heads, head_dim)
        for name, codec in (("int8", Int8()), ("fp8", Fp8()), ("k8v4", Key8Value4()), ("int4", Int4())):
            size = bytes_per_token(codec, num_heads, head_dim)
            decoded = torch.stack([codec.decode(*encode(states)) for encode in (codec.encode, codec.encode_values)])
            error = (decoded - states).abs() / states.abs().amax(-1, keepdim=True)
            print(
                f"{head_dim:>3} {name:<5} {size:>5} {size / plain:>8.3f} "
                f"{plain / size:>12.2f} x tokens   {error.mean():>20.5f} {error.max():.5f}"
            )


if __name__ == "__main__":
    main()
