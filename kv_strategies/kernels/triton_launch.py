"""A launch that the layers of a step repeat, each with tensors of its own.

`kernel[grid](...)` looks at each of some forty arguments for what the kernel has to be compiled for (dtypes, addresses
and numbers that 16 divides, numbers that are 1), which takes a host several times as long as the launch itself. Layers
are alike, so what is launched is decided once a step, and later layers only fill in their tensors:

    first layer    prepare(plan, tensors) -> Launch    kernel[grid](*tensors, *numbers, **constants) -> compiled
    the others                                         compiled[grid](*tensors, *numbers, *constants)

What was decided for some tensors serves others of the same shapes, strides, dtypes, device and alignment: all that
Triton looks at, and all that `prepare` may look at. It lasts no longer than the plan, so that whatever else decides how
a kernel is compiled (Triton's settings, say) is asked again every step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import jit

from ..step.plan import Plan

#: Addresses that differ by a multiple of so many bytes are alike: Triton asks for 16, `triton_decode_groups.py` for
#: half as many as a tile has tokens.
ALIGNMENT = 128


class Launch:
    """A kernel, and what it takes beside the tensors of a layer."""

    def __init__(self, kernel: jit.JITFunction, grid: tuple[int, ...], *numbers: object, **constants: object):
        """
        Args:
            kernel: its parameters are the tensors of a layer, then `numbers`, then those that are `tl.constexpr`.
            numbers: in the order of the parameters; tensors that all layers share are among them.
            constants: parameters that are `tl.constexpr`, and options of the compiler.
        """
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        self.compiled: Callable[..., None] | None = None  # where Triton need not be asked again

    def __call__(self, *tensors: Tensor) -> None:
        if self.compiled is not None:
            self.compiled(*tensors, *self._numbers)
            return
        kernel, numbers, constants = self._kernel, self._numbers, self._constants
        compiled = kernel[self._grid](*tensors, *numbers, **constants)
        if _can_keep(kernel, compiled):
            self._numbers += tuple(constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
            self.compiled = compiled[(*self._grid, 1, 1)[:3]]


def _can_keep(kernel: jit.JITFunction, compiled: object) -> bool:
    """Not what the interpreter ran, nor where somebody takes part in launches, by a hook or by another `run` than
    Triton's, nor for AMD's GPUs, whose compiler looks at how large the memory of a tensor is as well.
    """
    if not isinstance(compiled, CompiledKernel) or torch.version.hip is not None or kernel.pre_run_hooks:
        return False
    return getattr(kernel.run, "__globals__", None) is vars(jit)  # a name could be copied, see `functools.wraps`


def launch(plan: Plan | None, prepare: Callable[..., Launch], tensors: tuple[Tensor, ...], **options: Hashable) -> None:
    """Launch what `prepare(plan, *tensors, **options)` gives, on these tensors.

    Args:
        plan: of the step, which keeps it for the next layer; None where nothing is to be kept.
        prepare: a function of a module; it may look at all of a tensor but its contents and what its address is beyond
            ALIGNMENT.
    """
    if plan is None:
        prepare(plan, *tensors, **options)(*tensors)
        return
    alike = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % ALIGNMENT) for tensor in tensors]
    name = (prepare, tensors[0].device, *options.items(), *alike)
    plan.once(name, lambda: prepare(plan, *tensors, **options))(*tensors)
