"""Inner products of per-example gradients with each other, spelled out: all of them, multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from memloc_ext.reference.grad_sqnorm import conv2d_grad_sums, linear_grad_sums


def linear_grad_inner(input: Tensor, grad_output: Tensor) -> Tensor:
    """Return ``[batch, batch]``; arguments as in `memloc_ext.ops.linear_grad_inner`."""
    grads = linear_grad_sums(input, grad_output, torch.arange(len(input)), len(input)).flatten(1)
    return grads @ grads.t()


def conv2d_grad_inner(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return ``[batch, batch]``; arguments as in `memloc_ext.ops.conv2d_grad_inner`."""
    geometry = (kernel_size, stride, padding, dilation, groups)
    grads = conv2d_grad_sums(input, grad_output, torch.arange(len(input)), len(input), *geometry).flatten(1)
    return grads @ grads.t()
