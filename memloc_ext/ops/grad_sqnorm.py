"""Per-example gradient norms: the public functions, and what PyTorch needs to know about the operators."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from memloc_ext.ops._checks import call, call_without_graph, check_devices, result_dtype

_linear = torch.ops.memloc_ext.linear_grad_sqnorm.default
_conv2d = torch.ops.memloc_ext.conv2d_grad_sqnorm.default


def linear_grad_sqnorm(input: Tensor, grad_output: Tensor, *, method: str = "auto") -> Tensor:
    r"""Return the squared norm of each example's weight gradient of a linear layer, which is never materialised.

    Example ``b``'s gradient is the *sum* over its positions of ``grad_output[b, t] input[b, t]^T``. If the loss is a
    mean over the batch, ``grad_output`` is divided by its size: multiply the norms by its square for those of the
    example's own loss. The result is detached. Runs on the CPU and on CUDA, there without waiting for the device.

    Args:
        input: What the layer was given, ``[batch, *, in]``; float16, bfloat16, float32 or float64, any strides.
        grad_output: Gradient of the loss by what it returned, ``[batch, *, out]``, of the same dtype.
        method: ``auto`` takes the cheapest way (see `plan_linear`); ``outer`` (one position only), ``direct`` or
            ``gram`` forces one. Where the sum over positions cancels, ``gram`` loses twice the digits of ``direct``.
            A Gram's scratch grows with the square of the positions: beyond 2^24 elements ``gram`` is ``direct``.

    Returns:
        ``[batch]``; float64 for float64 inputs, else float32. Float32 tiles are added up in float64. On CUDA, ``gram``
        multiplies float32 in the precision of ``torch.set_float32_matmul_precision``.

    Raises:
        ValueError: If a shape, device or ``method`` breaks the above.
        TypeError: If a dtype or a type does.

    Source: Goodfellow, "Efficient per-example gradient computations", 2015 (``outer``).
    """
    return call_without_graph(_linear, "linear_grad_sqnorm", input, grad_output, method=method)


def conv2d_grad_sqnorm(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    method: str = "auto",
) -> Tensor:
    r"""Return the squared norm of each example's weight gradient of a 2-d convolution, which is never materialised.

    The patches are not unfolded either. Scale, precision and devices as in `linear_grad_sqnorm`.

    Args:
        input: What the layer was given, ``[batch, in, height, width]``; any of four float dtypes, any strides.
        grad_output: Gradient of the loss by what it returned, ``[batch, out, rows, columns]``, of the same dtype.
        kernel_size: Two numbers, at least 1.
        stride: Two numbers, at least 1.
        padding: Two numbers, at least 0; the padding is zeros.
        dilation: Two numbers, at least 1.
        groups: Divides ``in`` and ``out``.
        method: ``auto``, ``outer``, ``direct`` or ``shifted_gram``, as in `linear_grad_sqnorm`.

    Returns:
        ``[batch]``; float64 for float64 inputs, else float32.

    Raises:
        ValueError: If a shape, number, device or ``method`` breaks the above.
        TypeError: If a dtype or a type does.

    Source: Rochette, Manoel, Tramel, "Efficient per-example gradient computations in convolutional neural networks",
    2019.
    """
    settings = (list(kernel_size), list(stride), list(padding), list(dilation), groups)
    return call_without_graph(_conv2d, "conv2d_grad_sqnorm", input, grad_output, *settings, method=method)


@dataclass(frozen=True)
class Plan:
    """How a layer's per-example norms are computed.

    Attributes:
        method: The way that ``auto`` takes on the CPU: ``outer``, ``direct``, or ``gram`` (of a convolution
            ``shifted_gram``). CUDA weighs the same ways by its own rates.
        multiply_adds: Multiply-adds per example of each way that applies. A Gram's are those of its whole symmetric
            products, of which a little over half is computed.
        fused: Whether ``*_grad_sqnorm_groups`` takes one pass on the CPU for norms and sums over groups, or
            ``*_grad_dot`` with so many directions.
    """

    method: str
    multiply_adds: dict[str, float]
    fused: bool


def plan_linear(positions: int, in_features: int, out_features: int, *, directions: int = 0) -> Plan:
    """Return the way that ``auto`` takes on the CPU for a linear layer with so many positions (tokens) per example.

    Only ``fused`` depends on the number of ``directions``.

    Raises:
        ValueError: If there are no positions, or a number is negative.
    """
    axes = (1, 1, 1, 0, 1), (positions, 1, 1, 0, 1)
    return _plan("gram", 1, in_features, out_features, *axes, directions)


def plan_conv2d(
    in_channels: int,
    out_channels: int,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *,
    directions: int = 0,
) -> Plan:
    """Return the way that ``auto`` takes on the CPU for a convolution over images of ``size`` = (height, width).

    Only ``fused`` depends on the number of ``directions``.

    Raises:
        ValueError: If there is no such convolution.
    """
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(f"plan: groups must divide {in_channels} and {out_channels} channels, got {groups}")
    y, x = zip(size, kernel_size, stride, padding, dilation, strict=True)
    return _plan("shifted_gram", groups, in_channels // groups, out_channels // groups, y, x, directions)


def _plan(
    gram: str, groups: int, inputs: int, outputs: int, y: Sequence[int], x: Sequence[int], directions: int
) -> Plan:
    method, counts, fused = _planned(gram, groups, inputs, outputs, tuple(y), tuple(x), directions)
    return Plan(method, counts.copy(), fused)


@functools.lru_cache(maxsize=1024)  # a training asks the same of every batch
def _planned(gram: str, *shape: object) -> tuple[str, dict[str, float], bool]:
    way, *counts, fused = _cost_model(*shape)
    ways = ("outer", "direct", gram)
    return ways[way], {name: n for name, n in zip(ways, counts, strict=True) if n < inf}, fused


def _cost_model(*shape: object) -> tuple[int, float, float, float, bool]:
    try:
        return importlib.import_module("memloc_ext._host").grad_sqnorm_plan(*shape)
    except ModuleNotFoundError:  # a build without it
        return call(torch.ops.memloc_ext.plan.default, "plan", *shape)


@torch.library.register_fake("memloc_ext::linear_grad_sqnorm")
def _(input: Tensor, grad_output: Tensor, *_: object, method: str = "auto") -> Tensor:
    check_devices("linear_grad_sqnorm", input=input, grad_output=grad_output)
    return input.new_empty(input.shape[0], dtype=result_dtype(input))


@torch.library.register_fake("memloc_ext::conv2d_grad_sqnorm")
def _(input: Tensor, grad_output: Tensor, *_: object, method: str = "auto") -> Tensor:
    check_devices("conv2d_grad_sqnorm", input=input, grad_output=grad_output)
    return input.new_empty(input.shape[0], dtype=result_dtype(input))
