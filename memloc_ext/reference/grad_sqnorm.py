"""Per-example gradient norms, spelled out: each example's weight gradient, squared and summed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.grad import conv2d_weight


def linear_grad_sqnorm(input: Tensor, grad_output: Tensor) -> Tensor:
    """Return the squared norms from the materialised gradients; arguments as in `memloc_ext.ops.linear_grad_sqnorm`."""
    rows = input.reshape(len(input), -1, input.shape[-1])
    grads = grad_output.reshape(len(input), rows.shape[1], grad_output.shape[-1]).transpose(1, 2) @ rows
    return grads.square().sum((1, 2))


def conv2d_grad_sqnorm(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return the squared norms from autograd, one example at a time; arguments as in `ops.conv2d_grad_sqnorm`."""
    weight_shape = (grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    norms = input.new_zeros(len(input))
    for b in range(len(input)):
        one = slice(b, b + 1)
        geometry: Any = (stride, padding, dilation, groups)
        norms[b] = conv2d_weight(input[one], weight_shape, grad_output[one], *geometry).square().sum()
    return norms


def linear_grad_sums(input: Tensor, grad_output: Tensor, group_ids: Tensor, num_groups: int) -> Tensor:
    """Return the weight gradient of each group's examples; arguments as in `ops.linear_grad_sqnorm_groups`."""
    sums = input.new_zeros(num_groups, grad_output.shape[-1], input.shape[-1])
    for k in range(num_groups):
        rows = group_ids == k
        sums[k] = grad_output[rows].flatten(0, -2).t() @ input[rows].flatten(0, -2)
    return sums


def conv2d_grad_sums(
    input: Tensor,
    grad_output: Tensor,
    group_ids: Tensor,
    num_groups: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return the weight gradient of each group's examples; arguments as in `ops.conv2d_grad_sqnorm_groups`."""
    sums = input.new_zeros(num_groups, grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    for k in range(num_groups):
        rows = group_ids == k
        geometry: Any = (stride, padding, dilation, groups)
        if rows.any() and sums.numel() != 0:
            sums[k] = conv2d_weight(input[rows], tuple(sums.shape[1:]), grad_output[rows], *geometry)
    return sums
