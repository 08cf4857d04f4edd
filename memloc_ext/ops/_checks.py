"""What every operator needs around its C++: errors of Python's kinds, and the checks that C++ cannot make.

The rules are checked once, in C++, below every dispatch mode; what crosses the boundary is a RuntimeError with the
operator's message, and `call` turns it into the type that a Python caller expects. Two checks are made here: of values
on a CUDA device, for which C++ does not wait, and of the devices of meta tensors, which bring other tensors to an
operator's fake.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
)
from torch._subclasses.fake_tensor import FakeTensor


def call(operator: Callable[..., Any], name: str, *arguments: object, **options: object) -> Any:
    """Run ``operator(*arguments, **options)``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument breaks another rule of the operator.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments, **options)
    try:
        return operator(*arguments, **options)
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        if message.startswith(f"{name}: "):
            wrong_type = "must have dtype" in message or "must be a tensor" in message
            raise (TypeError if wrong_type else ValueError)(message) from None
        too_large = [a for a in (*arguments, *options.values()) if type(a) is int and not -(2**63) <= a < 2**63]
        if too_large:
            raise ValueError(f"{name}: an integer must fit in 64 bits, got {too_large[0]}") from None
        if "Expected a value of type" in message:
            raise TypeError(f"{name}: {message}") from None
        if isinstance(error, NotImplementedError) and message.startswith("Could not run"):  # the dispatcher's words
            kinds = {f"{a.layout} on {a.device.type}" for a in arguments if isinstance(a, Tensor)}
            raise TypeError(
                f"{name}: no kernel for {' with '.join(sorted(kinds))}; tensors must be strided, and `memloc info` "
                "lists the devices that this build has kernels for"
            ) from None
        raise


def call_without_graph(operator: Callable[..., Any], name: str, *arguments: object, **options: object) -> Any:
    """As `call`, for results that no gradient passes, whatever the arguments require."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        without = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        return call(operator, name, *without, **options)
    with torch._C._AutoDispatchBelowAutograd():  # takes less time than to detach
        return call(operator, name, *arguments, **options)


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


def values_of(t: Tensor) -> list[Any] | None:
    """Return the values of a tensor on the CPU, without an operator; None where they cannot be read at once."""
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(t) or isinstance(t, FakeTensor) or not t.is_cpu:
        return None
    return t.tolist()


def check_devices(name: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first; those of None are not there."""
    (first, reference), *others = tensors.items()
    if reference is None:
        raise TypeError(f"{name}: {first} must be a tensor, got None")
    for argument, tensor in others:
        if tensor is not None and tensor.device != reference.device:
            got = f"{argument} on {tensor.device} and {first} on {reference.device}"
            raise ValueError(f"{name}: {argument} must be on the device of {first}; got {got}")


def result_dtype(input: Tensor) -> torch.dtype:
    """Return the type of norms, sums and losses: float64 of float64, else float32."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def no_derivative(name: str, *_: object) -> NoReturn:
    """Refuse the backward pass of an operator that has none."""
    raise NotImplementedError(f"{name}: there is no derivative; detach the arguments")


def cast_for_autocast(device: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Return arguments with their floating-point tensors in the type of autocast; float64 stays."""
    dtype = torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        narrows = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if narrows else value

    return tuple(map(cast, arguments))


def register_autocast(name: str) -> None:
    """Let an operator compute in the type of autocast; float64 stays."""
    operator = getattr(torch.ops.memloc_ext, name)

    def run(device: str, *arguments: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return operator(*cast_for_autocast(device, arguments))

    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        torch.library.impl(f"memloc_ext::{name}", key, functools.partial(run, device))
