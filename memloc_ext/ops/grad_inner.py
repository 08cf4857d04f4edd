"""Inner products of all pairs of the examples' own weight gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.ops._checks import call_without_graph, check_devices, result_dtype
from memloc_ext.ops.grad_sqnorm import conv2d_grad_sqnorm, linear_grad_sqnorm
from memloc_ext.ops.grad_sqnorm_groups import may_compose

_linear = torch.ops.memloc_ext.linear_grad_inner.default
_conv2d = torch.ops.memloc_ext.conv2d_grad_inner.default
_ELEMENTS = 1 << 22
"""Of the products or gradients that a composition holds at a time."""


def linear_grad_inner(input: Tensor, grad_output: Tensor) -> Tensor:
    r"""Return the inner products of the examples' own weight gradients of a linear layer with each other.

    The gradients are those of `linear_grad_sqnorm`: *sums* over an example's positions. On the CPU some tiles of all of
    them at a time are multiplied with each other where they stay in the cache. Few positions, and CUDA, take library
    products: a Gram over all positions, or some rows of the gradients at a time. The result is detached.

    Args:
        input: What the layer was given, ``[batch, *, in]``; float16, bfloat16, float32 or float64, any strides.
        grad_output: Gradient of the loss by what it returned, ``[batch, *, out]``, of the same dtype.

    Returns:
        ``[batch, batch]``, symmetric, with the squared norms on its diagonal; float64 for float64 inputs, else float32.

    Raises:
        ValueError: If a shape or device breaks the above.
        TypeError: If a dtype or a type does.
    """
    x, g = input, grad_output
    if may_compose(x, g):
        positions, sizes = prod(x.shape[1:-1]), (x.shape[-1], g.shape[-1])
        gram = _gram_is_cheaper(len(x), positions, *sizes)
        if gram or not x.is_cpu:
            linear_grad_sqnorm(*_none_of(x, g))  # which refuses what is wrong
            x, g = (t.detach().to(result_dtype(t)).reshape(len(t), -1, t.shape[-1]) for t in (x, g))
            return _gram(x, g) if gram else _in_parts(_columns(x), g)
    return call_without_graph(_linear, "linear_grad_inner", x, g)


def conv2d_grad_inner(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    r"""Return the inner products of the examples' own weight gradients of a 2-d convolution with each other.

    As `linear_grad_inner`.

    Args:
        input: What the layer was given, ``[batch, in, height, width]``; any of four float dtypes, any strides.
        grad_output: Gradient of the loss by what it returned, ``[batch, out, rows, columns]``, of the same dtype.
        kernel_size: Two numbers, at least 1.
        stride: Two numbers, at least 1.
        padding: Two numbers, at least 0; the padding is zeros.
        dilation: Two numbers, at least 1.
        groups: Divides ``in`` and ``out``.

    Returns:
        ``[batch, batch]``, symmetric, with the squared norms on its diagonal; float64 for float64 inputs, else float32.

    Raises:
        ValueError: If a shape, number or device breaks the above.
        TypeError: If a dtype or a type does.
    """
    x, g, geometry = input, grad_output, (list(kernel_size), list(stride), list(padding), list(dilation))
    if may_compose(x, g):
        sizes = (prod(g.shape[2:]), x.shape[1] * prod(geometry[0]), g.shape[1])
        gram = groups == 1 and _gram_is_cheaper(len(x), *sizes)
        if gram or not x.is_cpu:
            conv2d_grad_sqnorm(*_none_of(x, g), *geometry, groups)
            unfold: Any = (geometry[0], geometry[3], geometry[2], geometry[1])
            x, g = x.detach().to(result_dtype(x)), g.detach().to(result_dtype(g)).flatten(2).transpose(1, 2)
            if gram:
                return _gram(F.unfold(x, *unfold).transpose(1, 2), g)
            pairs = zip(x.chunk(groups, 1), g.chunk(groups, 2), strict=True)
            return torch.stack([_in_parts(_patches(x, unfold), g) for x, g in pairs]).sum(0)
    return call_without_graph(_conv2d, "conv2d_grad_inner", x, g, *geometry, groups)


def _none_of(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return (x[:0], g[:0]) if len(x) == len(g) else (x, g)


def _gram_is_cheaper(batch: int, positions: int, inputs: int, outputs: int) -> bool:
    # multiply-adds per example, as measured: of a Gram half is computed, by library products, and multiplied and added
    # up from memory; of gradients all, of their products a little over half
    gram = batch * positions**2 * (0.85 * (inputs + outputs) + 14)
    return gram < inputs * outputs * (positions + 0.6 * batch)


def _gram(x: Tensor, g: Tensor) -> Tensor:
    # sum over t, t' of (x_t . x_t') (g_t . g_t'), for x [batch, T, in] and g [batch, T, out]
    batch, positions = x.shape[:2]
    inner = x.new_zeros(batch, batch, dtype=torch.float64)
    step = max(1, _ELEMENTS // (batch * positions**2))
    with torch.autocast(x.device.type, enabled=False):
        for first in range(0, batch, step):
            some, rest = slice(first, first + step), slice(first, None)
            products = x[some].flatten(0, 1) @ x[rest].flatten(0, 1).t()
            products *= g[some].flatten(0, 1) @ g[rest].flatten(0, 1).t()
            products = products.unflatten(1, (-1, positions)).unflatten(0, (-1, positions))
            inner[some, rest] = products.sum((1, 3))
    return _symmetric(inner, x)


def _in_parts(parts: Iterator[Tensor], g: Tensor) -> Tensor:
    # some inputs at a time, [batch, T, some], and some outputs of g [batch, T, out]
    inner = g.new_zeros(len(g), len(g), dtype=torch.float64)
    with torch.autocast(g.device.type, enabled=False):
        for x in parts:
            for some in g.split(max(1, _ELEMENTS // (len(g) * x.shape[2])), 2):
                grads = torch.bmm(some.transpose(1, 2), x).flatten(1)
                inner += grads @ grads.t()
    return _symmetric(inner, g)


def _symmetric(upper: Tensor, like: Tensor) -> Tensor:
    return (upper.triu() + upper.triu(1).t()).to(like.dtype)


def _columns(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(256, 2)


def _patches(x: Tensor, unfold: Any) -> Iterator[Tensor]:
    for channels in x.split(max(1, 256 // prod(unfold[0])), 1):
        yield F.unfold(channels, *unfold).transpose(1, 2)


@torch.library.register_fake("memloc_ext::linear_grad_inner")
def _(input: Tensor, grad_output: Tensor) -> Tensor:
    check_devices("linear_grad_inner", input=input, grad_output=grad_output)
    return input.new_empty(input.shape[0], input.shape[0], dtype=result_dtype(input))


@torch.library.register_fake("memloc_ext::conv2d_grad_inner")
def _(input: Tensor, grad_output: Tensor, *_: object) -> Tensor:
    check_devices("conv2d_grad_inner", input=input, grad_output=grad_output)
    return input.new_empty(input.shape[0], input.shape[0], dtype=result_dtype(input))
