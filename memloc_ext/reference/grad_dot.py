"""Inner products of per-example gradients with directions, spelled out: each example's weight gradient, multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from memloc_ext.reference.grad_sqnorm import conv2d_grad_sums, linear_grad_sums


def linear_grad_dot(input: Tensor, grad_output: Tensor, directions: Tensor) -> Tensor:
    """Return the inner products ``[D, batch]``; arguments as in `memloc_ext.ops.linear_grad_dot`."""
    grads = linear_grad_sums(input, grad_output, torch.arange(len(input)), len(input))
    return directions.flatten(1) @ grads.flatten(1).t()


def conv2d_grad_dot(
    input: Tensor,
    grad_output: Tensor,
    directions: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return the inner products ``[D, batch]``; arguments as in `memloc_ext.ops.conv2d_grad_dot`."""
    geometry = (kernel_size, stride, padding, dilation, groups)
    grads = conv2d_grad_sums(input, grad_output, torch.arange(len(input)), len(input), *geometry)
    return directions.flatten(1) @ grads.flatten(1).t()
