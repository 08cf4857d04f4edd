"""What is checked of the values of an operator's arguments on a CUDA device, before it runs there without a wait."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
)
from torch._subclasses.fake_tensor import FakeTensor


def readable(tensor: object) -> bool:
    """Return whether a tensor's values are on a CUDA device, which operators do not wait for, and can be read back.

    They cannot while a graph is captured or compiled, inside ``vmap``, and from fake tensors.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_cuda or torch.compiler.is_compiling():
        return False
    while is_functorch_wrapped_tensor(tensor):  # grad inside vmap wraps what vmap has wrapped
        if is_batchedtensor(tensor):
            return False
        tensor = get_unwrapped(tensor)
    return not (isinstance(tensor, FakeTensor) or torch.cuda.is_current_stream_capturing())


def check_channels(name: str, channels: object, count: int, argument: str = "channels") -> None:
    """Raise ValueError if an index on a CUDA device is not in ``[0, count)``; on the CPU the operator checks."""
    if not isinstance(channels, Tensor) or not readable(channels) or channels.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.stack(torch.aminmax(channels)).tolist())
    if low < 0 or high >= count:
        raise ValueError(f"{name}: {argument} must be in [0, {count}), got {low if low < 0 else high}")
