"""Inner products of each example's weight gradient with given directions, beside its norm and the sums over groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.ops._checks import call_without_graph, check_devices, result_dtype
from memloc_ext.ops.grad_sqnorm import conv2d_grad_sqnorm, linear_grad_sqnorm, plan_linear
from memloc_ext.ops.grad_sqnorm_groups import (
    Groups,
    conv2d_grad_sqnorm_groups,
    conv2d_is_fused,
    given_ids,
    linear_grad_sqnorm_groups,
    may_compose,
)

_linear = torch.ops.memloc_ext.linear_grad_dot.default
_conv2d = torch.ops.memloc_ext.conv2d_grad_dot.default


def linear_grad_dot(
    input: Tensor,
    grad_output: Tensor,
    directions: Tensor,
    group_ids: Tensor | Groups | None = None,
    num_groups: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the inner product of each example's weight gradient with each direction, its norm and the groups' sums.

    The gradients are those of `linear_grad_sqnorm`: *sums* over an example's positions, never materialised. One pass on
    the CPU where that is cheaper (see ``Plan.fused``). Elsewhere, and on CUDA, a direction takes a product as large as
    the layer's forward pass, beside `linear_grad_sqnorm_groups`. All results are detached.

    Args:
        input: What the layer was given, ``[batch, *, in]``; float16, bfloat16, float32 or float64, any strides.
        grad_output: Gradient of the loss by what it returned, ``[batch, *, out]``, of the same dtype.
        directions: ``[D, out, in]``, ``D`` at least 1, any strides; float64 for float64 inputs, else float32.
        group_ids: As in `linear_grad_sqnorm_groups`; None for no sums.
        num_groups: At least 1; not for `Groups` or without ``group_ids``.

    Returns:
        The inner products, ``[D, batch]``; the squared norms, ``[batch]``; the sums, ``[num_groups, out, in]``, or
        ``[0, out, in]`` without ``group_ids``. Float64 for float64 inputs, else float32.

    Raises:
        ValueError: If a shape, number or device breaks the above.
        TypeError: If a dtype or a type does.
    """
    name, x, g, ids = "linear_grad_dot", input, grad_output, _ids("linear_grad_dot", group_ids, num_groups)
    if may_compose(x, g):
        plan = plan_linear(prod(x.shape[1:-1]), x.shape[-1], g.shape[-1], directions=_count(directions))
        if not (x.is_cpu and plan.fused):
            if group_ids is None:
                sqnorm = linear_grad_sqnorm(x, g)
                sums = sqnorm.new_empty(0, g.shape[-1], x.shape[-1])
            else:
                sqnorm, sums = linear_grad_sqnorm_groups(x, g, group_ids, num_groups)
            return _dots(name, x, g, directions, sums.shape[1:], F.linear), sqnorm, sums
    return call_without_graph(_linear, name, x, g, directions, *ids)


def conv2d_grad_dot(
    input: Tensor,
    grad_output: Tensor,
    directions: Tensor,
    group_ids: Tensor | Groups | None,
    num_groups: int | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the inner product of each example's weight gradient with each direction, its norm and the groups' sums.

    As `linear_grad_dot`, of which are ``group_ids`` and ``num_groups``. The other arguments are those of
    `conv2d_grad_sqnorm`, whose ``groups`` are of channels.

    Args:
        input: What the layer was given, ``[batch, in, height, width]``; any of four float dtypes, any strides.
        grad_output: Gradient of the loss by what it returned, ``[batch, out, rows, columns]``, of the same dtype.
        directions: ``[D, out, in / groups, *kernel_size]``, ``D`` at least 1, any strides; float64 for float64 inputs,
            else float32.
        group_ids: As in `linear_grad_sqnorm_groups`; None for no sums.
        num_groups: At least 1; None for `Groups` or without ``group_ids``.
        kernel_size: Two numbers, at least 1.
        stride: Two numbers, at least 1.
        padding: Two numbers, at least 0; the padding is zeros.
        dilation: Two numbers, at least 1.
        groups: Divides ``in`` and ``out``.

    Returns:
        The inner products, ``[D, batch]``; the squared norms, ``[batch]``; the sums, ``[num_groups, out, in / groups,
        *kernel_size]``, ``num_groups`` 0 without ``group_ids``. Float64 for float64 inputs, else float32.

    Raises:
        ValueError: If a shape, number or device breaks the above.
        TypeError: If a dtype or a type does.
    """
    name, x, g, ids = "conv2d_grad_dot", input, grad_output, _ids("conv2d_grad_dot", group_ids, num_groups)
    geometry = (list(kernel_size), list(stride), list(padding), list(dilation))
    if may_compose(x, g) and not (x.is_cpu and conv2d_is_fused(x, g, *geometry, groups, directions=_count(directions))):
        if group_ids is None:
            sqnorm = conv2d_grad_sqnorm(x, g, *geometry, groups)
            sums = sqnorm.new_empty(0, g.shape[1], x.shape[1] // groups, *kernel_size)
        else:
            sqnorm, sums = conv2d_grad_sqnorm_groups(x, g, group_ids, num_groups, *geometry, groups)

        def product(x: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(x, weight, None, *geometry[1:], groups)

        return _dots(name, x, g, directions, sums.shape[1:], product), sqnorm, sums
    return call_without_graph(_conv2d, name, x, g, directions, *ids, *geometry, groups)


def _dots(
    name: str,
    x: Tensor,
    g: Tensor,
    directions: Tensor,
    weight: torch.Size,
    product: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    # as the operator would say it
    dtype = result_dtype(x)
    if not isinstance(directions, Tensor):
        raise TypeError(f"{name}: directions must be a tensor, got {directions}")
    if directions.dtype != dtype:
        raise TypeError(f"{name}: directions must have dtype {dtype} for input of {x.dtype}, got {directions.dtype}")
    if directions.device != x.device:
        raise ValueError(f"{name}: directions must be on the device of input")
    if directions.shape[1:] != weight or not _count(directions):
        sizes = ", ".join(map(str, ("D", *weight)))
        got = list(directions.shape)
        raise ValueError(f"{name}: directions must have shape [{sizes}] with D at least 1, got {got}")
    x, g = x.detach().to(dtype), g.detach()
    with torch.autocast(x.device.type, enabled=False):
        return torch.stack([(product(x, along) * g).flatten(1).sum(1) for along in directions.detach()])


def _count(directions: object) -> int:
    return len(directions) if isinstance(directions, Tensor) and directions.ndim else 0


def _ids(name: str, group_ids: Tensor | Groups | None, num_groups: int | None) -> tuple[Tensor | None, int | None]:
    if group_ids is not None:
        return given_ids(group_ids, num_groups)
    if num_groups:
        raise ValueError(f"{name}: num_groups must be 0 without group_ids, got {num_groups}")
    return None, 0


@torch.library.register_fake("memloc_ext::linear_grad_dot")
def _(
    input: Tensor, grad_output: Tensor, directions: Tensor, group_ids: Tensor | None = None, num_groups: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    return _results("linear_grad_dot", input, grad_output, directions, group_ids, num_groups)


@torch.library.register_fake("memloc_ext::conv2d_grad_dot")
def _(
    input: Tensor,
    grad_output: Tensor,
    directions: Tensor,
    group_ids: Tensor | None,
    num_groups: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results("conv2d_grad_dot", input, grad_output, directions, group_ids, num_groups)


def _results(
    name: str, input: Tensor, grad_output: Tensor, directions: Tensor, group_ids: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(name, input=input, grad_output=grad_output, directions=directions, group_ids=group_ids)
    batch, new = input.shape[0], directions.new_empty
    return new(directions.shape[0], batch), new(batch), new(num_groups, *directions.shape[1:])
