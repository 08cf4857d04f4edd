"""Per-example gradient norms together with the sums of the gradients over groups of examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from memloc_ext.ops._checks import call_without_graph, check_devices, result_dtype, values_of
from memloc_ext.ops.grad_sqnorm import conv2d_grad_sqnorm, linear_grad_sqnorm, plan_conv2d, plan_linear

_linear = torch.ops.memloc_ext.linear_grad_sqnorm_groups.default
_conv2d = torch.ops.memloc_ext.conv2d_grad_sqnorm_groups.default


class Groups:
    """The group of each example of a batch, checked and sorted once for all layers that it passes.

    The values of ids on CUDA are not checked, as that would wait for the device: one that is no group's fails there, or
    leaves its example out.

    Args:
        group_ids: The group of each example, ``[batch]``, int64, in ``[0, num_groups)``.
        num_groups: At least 1.

    Raises:
        ValueError: If a shape or number breaks the above.
        TypeError: If a dtype or a type does.
    """

    def __init__(self, group_ids: Tensor, num_groups: int) -> None:
        if not isinstance(group_ids, Tensor):
            raise TypeError(f"group_ids must be a tensor, got {group_ids}")
        if group_ids.dtype != torch.int64:
            raise TypeError(f"group_ids must have dtype int64, got {group_ids.dtype}")
        if group_ids.ndim != 1:
            raise ValueError(f"group_ids must have shape [batch], got {list(group_ids.shape)}")
        if not isinstance(num_groups, int):
            raise TypeError(f"num_groups must be an int, got {num_groups}")
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}")
        for value in values_of(group_ids) or ():
            if not 0 <= value < num_groups:
                raise ValueError(f"group_ids must be in [0, {num_groups}), got {value}")
        self.ids, self.num = group_ids, num_groups

    @classmethod
    def single(cls, batch: int, device: torch.device) -> Groups:
        """Return one group of all examples."""
        return cls.trusted(torch.zeros(batch, dtype=torch.int64, device=device), 1)

    @classmethod
    def trusted(cls, ids: Tensor, num: int) -> Groups:
        """Return groups that were checked before."""
        groups = cls.__new__(cls)
        groups.ids, groups.num = ids, num
        return groups

    @cached_property
    def _rows(self) -> list[Tensor]:
        return list(self.ids.argsort(stable=True).split(self.ids.bincount(minlength=self.num).tolist()))

    def split(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the rows of each group, of every tensor ``[batch, *]``.

        Off the CPU that is all rows, of which those of other groups are 0: how many a group has is not read back.
        """
        if self.num == 1:
            yield tensors
        elif self.ids.is_cpu:
            for rows in self._rows:
                yield tuple(t.index_select(0, rows) for t in tensors)
        else:
            yield from self._masked(*tensors)

    def _masked(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        for group in range(self.num):
            own = self.ids == group
            yield tuple(torch.where(own.reshape(-1, *[1] * (t.dim() - 1)), t, 0) for t in tensors)


def linear_grad_sqnorm_groups(
    input: Tensor, grad_output: Tensor, group_ids: Tensor | Groups, num_groups: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the norms of `linear_grad_sqnorm`, and the *sum* of the weight gradients over each group of examples.

    One pass on the CPU where that is cheaper (see ``Plan.fused``), else the norms and one weight gradient per group.
    With a single group the sum is the gradient of the batch. Both results are detached.

    Args:
        input: What the layer was given, ``[batch, *, in]``; float16, bfloat16, float32 or float64, any strides.
        grad_output: Gradient of the loss by what it returned, ``[batch, *, out]``, of the same dtype.
        group_ids: The group of each example, ``[batch]``, int64, in ``[0, num_groups)``, on the device of ``input``; or
            `Groups`, checked before.
        num_groups: At least 1; not for `Groups`. A group without examples has the sum 0.

    Returns:
        ``[batch]`` and ``[num_groups, out, in]``; float64 for float64 inputs, else float32.

    Raises:
        ValueError: If a shape, number or device breaks the above.
        TypeError: If a dtype or a type does.
    """
    name, x, g = "linear_grad_sqnorm_groups", input, grad_output
    if may_compose(x, g) and not (x.is_cpu and plan_linear(prod(x.shape[1:-1]), x.shape[-1], g.shape[-1]).fused):
        norms = linear_grad_sqnorm(x, g)
        return norms, linear_group_grad(x.detach(), g.detach(), _groups(name, x, group_ids, num_groups))
    return call_without_graph(_linear, name, x, g, *given_ids(group_ids, num_groups))


def linear_group_grad(input: Tensor, grad_output: Tensor, groups: Groups) -> Tensor:
    """Return the *sum* of the weight gradients over each group of examples, ``[groups.num, out, in]``, and no norms."""
    dtype = result_dtype(input)
    sums = input.new_empty(groups.num, grad_output.shape[-1], input.shape[-1], dtype=dtype)
    for total, (x, g) in zip(sums, groups.split(input, grad_output), strict=True):
        x, g = x.flatten(0, -2), g.flatten(0, -2)
        if x.is_cuda and x.dtype != dtype:  # as many digits as a product of float32, without a cast of what is large
            torch.mm(g.t(), x, out_dtype=dtype, out=total)
        else:
            torch.mm(g.to(dtype).t(), x.to(dtype), out=total)
    return sums


def conv2d_grad_sqnorm_groups(
    input: Tensor,
    grad_output: Tensor,
    group_ids: Tensor | Groups,
    num_groups: int | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    r"""Return the norms of `conv2d_grad_sqnorm`, and the *sum* of the weight gradients over each group of examples.

    One pass on the CPU where that is cheaper, as `linear_grad_sqnorm_groups`, of which are ``group_ids`` and
    ``num_groups``. The other arguments are those of `conv2d_grad_sqnorm`, whose ``groups`` are of channels.

    Returns:
        ``[batch]`` and ``[num_groups, out, in / groups, *kernel_size]``; float64 for float64 inputs, else float32.

    Raises:
        ValueError: If a shape, number or device breaks the above.
        TypeError: If a dtype or a type does.
    """
    name, x, g = "conv2d_grad_sqnorm_groups", input, grad_output
    geometry = (list(kernel_size), list(stride), list(padding), list(dilation))
    if may_compose(x, g) and not (x.is_cpu and conv2d_is_fused(x, g, *geometry, groups)):
        norms = conv2d_grad_sqnorm(x, g, *geometry, groups)
        by = _groups(name, x, group_ids, num_groups)
        sums = norms.new_zeros(by.num, g.shape[1], x.shape[1] // groups, *kernel_size)
        settings = (*geometry[1:], False, [0, 0], groups, [False, True, False])
        for total, (rows_x, rows_g) in zip(sums, by.split(x.detach(), g.detach()), strict=True):
            if len(rows_x):  # of the weight, total is only the shape
                operands = (rows_g.to(sums.dtype), rows_x.to(sums.dtype), total, None)
                total.copy_(torch.ops.aten.convolution_backward(*operands, *settings)[1])
        return norms, sums
    return call_without_graph(_conv2d, name, x, g, *given_ids(group_ids, num_groups), *geometry, groups)


def conv2d_is_fused(x: Tensor, g: Tensor, *geometry: object, directions: int = 0) -> bool:
    """Return whether the operator takes one pass, or is to say what is wrong."""
    try:
        plan = plan_conv2d(x.shape[1], g.shape[1], x.shape[2:], *geometry, directions=directions)  # pyright: ignore[reportArgumentType]
        return plan.fused
    except (TypeError, ValueError):  # no such convolution: the operator says why
        return True


def may_compose(x: Tensor, g: Tensor) -> bool:
    """Return whether a composition knows these arguments.

    The operator refuses what is wrong and knows what is empty. Rows of a group are a choice by values, which a graph of
    torch.compile cannot make.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not isinstance(g, Tensor):
        return False
    return x.ndim == g.ndim >= 2 and 0 not in (x.numel(), g.numel())


def given_ids(group_ids: Tensor | Groups, num_groups: int | None) -> tuple[Tensor, int | None]:
    """Return what the operator takes."""
    return (group_ids.ids, group_ids.num) if isinstance(group_ids, Groups) else (group_ids, num_groups)


def _groups(name: str, x: Tensor, group_ids: Tensor | Groups, num_groups: int | None) -> Groups:
    ids = group_ids.ids if isinstance(group_ids, Groups) else group_ids
    if isinstance(ids, Tensor) and ids.device != x.device:
        raise ValueError(f"{name}: group_ids must be on the device of input")
    if isinstance(ids, Tensor) and ids.shape != x.shape[:1]:
        raise ValueError(f"{name}: group_ids must have shape {list(x.shape[:1])}, got {list(ids.shape)}")
    if isinstance(group_ids, Groups):
        return group_ids
    try:
        return Groups(group_ids, num_groups)  # pyright: ignore[reportArgumentType] None is refused there
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


@torch.library.register_fake("memloc_ext::linear_grad_sqnorm_groups")
def _(input: Tensor, grad_output: Tensor, group_ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    sizes = num_groups, grad_output.shape[-1], input.shape[-1]
    return _results("linear_grad_sqnorm_groups", input, grad_output, group_ids, sizes)


@torch.library.register_fake("memloc_ext::conv2d_grad_sqnorm_groups")
def _(
    input: Tensor, grad_output: Tensor, group_ids: Tensor, num_groups: int, kernel_size: Sequence[int], *geometry: Any
) -> tuple[Tensor, Tensor]:
    channels, groups = (input.shape[1], grad_output.shape[1]), geometry[-1]
    if groups < 1 or channels[0] % groups or channels[1] % groups:  # meta tensors bring unchecked numbers here
        rule = f"divide the {channels[0]} input and {channels[1]} output channels"
        raise ValueError(f"conv2d_grad_sqnorm_groups: groups must {rule}, got {groups}")
    sizes = (num_groups, grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    return _results("conv2d_grad_sqnorm_groups", input, grad_output, group_ids, sizes)


def _results(
    name: str, input: Tensor, grad_output: Tensor, group_ids: Tensor, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    check_devices(name, input=input, grad_output=grad_output, group_ids=group_ids)
    dtype = result_dtype(input)
    return input.new_empty(input.shape[0], dtype=dtype), input.new_empty(sizes, dtype=dtype)
