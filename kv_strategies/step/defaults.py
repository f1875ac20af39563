"""torch's own default dtype and device, for code that must not depend on those that a user has set; and which GPU is
the current one, on which Triton launches whatever it is given.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch


def current(device: torch.device) -> AbstractContextManager[object]:
    """Inside, a GPU is the current one of this thread; for any other device nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def plain_defaults() -> ExitStack:
    """Entered, it holds until it is closed. The default dtype is one for all threads, as torch has it."""
    stack = ExitStack()
    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
    if torch.get_default_device().type != "cpu":
        stack.enter_context(torch.device("cpu"))
    return stack
