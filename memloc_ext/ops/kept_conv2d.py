"""A convolution that reads the input channels that each example keeps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from memloc_ext.ops._checks import check_devices, no_derivative, register_autocast

_ops = torch.ops.memloc_ext


def kept_conv2d(
    x: Tensor,
    keep: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Return ``conv2d(where(keep, x, 0), weight, bias, ...)``, reading the channels that are kept.

    This function is for the package; users have ``torch.ops.memloc_ext.kept_conv2d``. It has the costs, derivatives and
    arguments of `memloc_ext.ops.example_tied_conv2d`, but for the channels that each example keeps.

    Args:
        x: ``[batch, in, height, width]``.
        keep: Whether an example keeps a channel, ``[batch, in]``, bool, on the device of ``x``.
        weight: ``[out, in / groups, kernel height, kernel width]``.
        bias: ``[out]``, or None.
        stride: One number or two.
        padding: One number or two.
        dilation: One number or two.
        groups: Divides ``in`` and ``out``.

    Returns:
        ``[batch, out, rows, columns]``, contiguous.

    Raises:
        RuntimeError: If an argument breaks the above.
    """
    geometry: Any = *pairs(stride, padding, dilation), groups
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed and not torch.compiler.is_compiling():  # the operator knows backward passes only
        if x.dim() != 4:
            raise RuntimeError(f"kept_conv2d: x must be [batch, in, height, width], got {list(x.shape)}")
        return torch.conv2d(_zero_unless(keep, x), weight, bias, *geometry)
    return _ops.kept_conv2d.default(x, keep, weight, bias, *geometry)


def pairs(*numbers: int | Sequence[int]) -> list[Any]:
    """Return one number as two of it, and what is not one as it is."""
    return [[n, n] if isinstance(n, int) else n for n in numbers]


def _zero_unless(keep: Tensor, x: Tensor) -> Tensor:
    return torch.where(keep[:, :, None, None], x, 0)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, keep, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, keep, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, keep, weight = ctx.saved_tensors
    of_x, _, of_weight, of_bias, *_ = ctx.needs_input_grad
    by_x = by_weight = None
    if torch.is_grad_enabled():  # to be differentiated again
        zeros, wanted = [0, 0], [of_x, of_weight, False]
        *geometry, groups = ctx.geometry
        arguments = (grad, _zero_unless(keep, x), weight, None, *geometry, False, zeros, groups, wanted)
        by_x, by_weight, _ = torch.ops.aten.convolution_backward(*arguments)
        by_x = None if by_x is None else _zero_unless(keep, by_x)
    else:
        if of_x:
            by_x = _ops.kept_conv2d_input_grad(grad, keep, weight, x.shape[2:], *ctx.geometry)
        if of_weight:
            by_weight = _ops.kept_conv2d_weight_grad(grad, x, keep, weight.shape[2:], *ctx.geometry)
    return by_x, None, by_weight, grad.sum((0, 2, 3)) if of_bias else None, *(None for _ in ctx.geometry)


torch.library.register_autograd("memloc_ext::kept_conv2d", _backward, setup_context=_setup_context)
register_autocast("kept_conv2d")
for _name in ("kept_conv2d_input_grad", "kept_conv2d_weight_grad"):
    torch.library.register_autograd(f"memloc_ext::{_name}", functools.partial(no_derivative, _name))


@torch.library.register_fake("memloc_ext::kept_conv2d")
def _(x: Tensor, keep: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    check_devices("kept_conv2d", x=x, keep=keep, weight=weight, bias=bias)
    return x.new_empty(torch.conv2d(x, weight, bias, *geometry).shape)


@torch.library.register_fake("memloc_ext::kept_conv2d_input_grad")
def _(grad: Tensor, keep: Tensor, weight: Tensor, input_size: Sequence[int], *_: Any) -> Tensor:
    check_devices("kept_conv2d_input_grad", grad=grad, keep=keep, weight=weight)
    return grad.new_empty(*keep.shape, *input_size)


@torch.library.register_fake("memloc_ext::kept_conv2d_weight_grad")
def _(grad: Tensor, x: Tensor, keep: Tensor, kernel_size: Sequence[int], *geometry: Any) -> Tensor:
    check_devices("kept_conv2d_weight_grad", grad=grad, x=x, keep=keep)
    return x.new_empty(grad.shape[1], x.shape[1] // geometry[-1], *kernel_size)
