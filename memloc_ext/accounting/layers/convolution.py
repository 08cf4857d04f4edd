"""Convolutions of one, two and three dimensions, transposed ones too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext import ops
from memloc_ext.accounting.contributions import Contribution, Rows, scaled
from memloc_ext.accounting.layers.layer_function import Forward, Gradients, Product
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.ops import Groups
from memloc_ext.ops.example_tied_conv2d import compose
from memloc_ext.ops.grad_sqnorm_groups import conv2d_is_fused

aten = torch.ops.aten
_Settings = tuple[list[int], list[int], list[int], bool, list[int], int]


class ConvolutionContribution(Contribution):
    """A convolution's weight; see `torch.nn.functional.conv2d` and its like.

    Args:
        input: ``[batch, in, *]`` with one, two or three dimensions of pixels.
        grad_output: ``[batch, out, *]``, of the same dtype.
        shape: Of the weight.
        settings: See `Convolution`.
        repeats: Images of an example, one behind the other.
    """

    def __init__(
        self, input: Tensor, grad_output: Tensor, shape: torch.Size, settings: _Settings, repeats: int
    ) -> None:
        super().__init__(len(input) // repeats, shape, input)
        self.input, self.grad_output, self.settings, self.repeats = input, grad_output, settings, repeats

    def _weight_gradient(self, input: Tensor, grad_output: Tensor, shape: Sequence[int], groups: int) -> Tensor:
        weight = input.new_empty(1).expand(shape)  # only its shape is read
        settings = (*self.settings[:-1], groups, [False, True, False])
        return aten.convolution_backward(grad_output, input, weight, None, *settings)[1]

    def gradients(self, begin: int, end: int) -> Tensor:
        """Return each example's gradient, as one convolution whose groups are the examples."""
        if begin == end:  # a convolution has at least one group
            return torch.zeros(0, *self.shape, dtype=self.dtype, device=self.device)
        images = slice(begin * self.repeats, end * self.repeats)
        x, g = self.input[images].to(self.dtype), self.grad_output[images].to(self.dtype)
        n = len(x)
        shape, groups = (n * self.shape[0], *self.shape[1:]), n * self.settings[-1]
        merged = self._weight_gradient(x.flatten(0, 1)[None], g.flatten(0, 1)[None], shape, groups)
        return merged.reshape(n // self.repeats, self.repeats, *self.shape).sum(1)

    def total(self, factors: Tensor | None = None) -> Tensor:
        x, g = self.input, self.grad_output
        if factors is not None:
            x, g = x.to(self.dtype), scaled(g.to(self.dtype), factors.repeat_interleave(self.repeats))
        return self._weight_gradient(x, g, self.shape, self.settings[-1])

    def _planar(self) -> tuple[Any, ...] | None:
        """Return input, gradient, kernel size, stride, padding, dilation and groups of an equal 2-d convolution."""
        stride, padding, dilation, transposed, _, groups = self.settings
        if transposed or self.input.dim() > 4 or self.repeats > 1:
            return None
        x, g, kernel = self.input, self.grad_output, list(self.shape[2:])
        if x.dim() == 4:
            return x, g, kernel, stride, padding, dilation, groups
        return x.unsqueeze(2), g.unsqueeze(2), [1, *kernel], [1, *stride], [0, *padding], [1, *dilation], groups

    def sqnorm(self) -> Tensor:
        planar = self._planar()
        return super().sqnorm() if planar is None else ops.conv2d_grad_sqnorm(*planar)

    @property
    def one_pass(self) -> bool:
        planar = self._planar()
        if planar is None or not self.input.is_cpu or not self.input.numel():
            return False
        return conv2d_is_fused(*planar)

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        planar = self._planar()
        if planar is None:
            return super().sqnorm_and_groups(groups)
        x, g, *geometry = planar
        sqnorm, sums = ops.conv2d_grad_sqnorm_groups(x, g, groups, None, *geometry)
        return sqnorm, sums if x is self.input else sums.reshape(groups.num, *self.shape)

    def dot(self, directions: Tensor) -> Tensor:
        x, g = self.input.to(self.dtype), self.grad_output.to(self.dtype)
        outs = (aten.convolution(x, v, None, *self.settings) for v in directions.to(self.dtype))
        images = torch.stack([(out * g).flatten(1).sum(1) for out in outs])
        return images.unflatten(1, (self.batch, self.repeats)).sum(2)

    def dot_and_groups(self, directions: Tensor, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
        planar = self._planar()
        if planar is None:
            return super().dot_and_groups(directions, groups)
        x, g, kernel, *geometry = planar
        flat = directions.reshape(*directions.shape[:3], *kernel)
        dot, sqnorm, sums = ops.conv2d_grad_dot(x, g, flat, groups, None, kernel, *geometry)
        return dot, sqnorm, sums.reshape(groups.num, *self.shape)

    def inner(self) -> Tensor:
        planar = self._planar()
        return super().inner() if planar is None else ops.conv2d_grad_inner(*planar)

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        transposed, _, groups = self.settings[3:]
        if transposed:
            return super().projected(left, right)
        x, g = self.input.to(self.dtype), self.grad_output.to(self.dtype).flatten(2)
        kernels = right.reshape(-1, *self.shape[1:]).repeat(groups, *[1] * (len(self.shape) - 1))
        patches = aten.convolution(x, kernels, None, *self.settings).flatten(2).unflatten(1, (groups, -1))
        rows = torch.einsum("kgo,bgot->bgkt", left.unflatten(1, (groups, -1)), g.unflatten(1, (groups, -1)))
        return (rows @ patches.mT).unflatten(0, (self.batch, self.repeats)).sum((1, 2))


@dataclass(eq=False, repr=False)
class Convolution(Product):
    """A convolution of ``[batch, channels, *]``; the examples are always in dimension 0.

    Attributes:
        weights: Of input, weight and bias.
        axis: See `LayerFunction`; of rows first.
        settings: stride, padding, dilation, transposed, output_padding, groups, as of ``aten::convolution``.
    """

    settings: _Settings

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Forward:
        x, w, b = self.cast(input, weight, bias)
        return aten.convolution(x, w, b, *self.settings), (x, w)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        x, w = saved
        grad_input = grad_weight = grad_bias = None
        if needs[0]:
            grad_input = self.grad_input(x, w, grad)
        if needs[1]:
            axis = self.example_axis
            contribution = ConvolutionContribution(x, grad, w.shape, self.settings, 1 if axis is None else axis.after)
            grad_weight = self.record(1, contribution)
        if needs[2]:
            grad_bias = self.record(2, Rows(self.by_example(grad.flatten(2).sum(2))))
        return grad_input, grad_weight, grad_bias

    def grad_input(self, x: Tensor, w: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of the input."""
        return aten.convolution_backward(grad, x, w, None, *self.settings, [True, False, False])[0]


@dataclass(eq=False, repr=False)
class KeptConvolution(Convolution):
    """A convolution that reads the input channels which each row keeps.

    Attributes:
        keep: See `memloc_ext.ops.kept_conv2d`.
    """

    keep: Tensor

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Forward:
        x, w, b = self.cast(input, weight, bias)
        out = torch.ops.memloc_ext.kept_conv2d(x, self.keep, w, b, *self._geometry)
        return out, (torch.where(self.keep[:, :, None, None], x, 0), w)

    def grad_input(self, x: Tensor, w: Tensor, grad: Tensor) -> Tensor:
        size = list(x.shape[2:])
        return torch.ops.memloc_ext.kept_conv2d_input_grad(grad, self.keep, w, size, *self._geometry)

    @property
    def _geometry(self) -> tuple[Any, ...]:
        stride, padding, dilation, _, _, groups = self.settings
        return stride, padding, dilation, groups


def kept_convolution(
    tracer: Tracer,
    func: Any,
    /,
    x: Tensor,
    keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Any:
    """Handle the operator ``kept_conv2d``."""
    axis = tracer.axis(x)
    if axis is None or not axis.rows_first:
        return NotImplemented
    settings = (stride, padding, dilation, False, [0, 0], groups)
    return KeptConvolution.handle(tracer, axis, (x, weight, bias), settings, keep)


def example_tied_convolution(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle the operator ``example_tied_conv2d``, which is made of others."""
    with tracer:
        return compose(*args, **kwargs)


def convolution(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.nn.functional.conv1d`, ``conv_transpose1d`` and their like; the examples are the input's rows."""
    transposed, n = "transpose" in func.__name__, int(func.__name__[-2])
    last = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    given = dict(zip(("input", "weight", "bias", "stride", "padding", *last), args, strict=False)) | kwargs
    input, weight, padding = given["input"], given["weight"], given.get("padding", 0)
    axis = tracer.axis(input)
    if axis is None or not axis.rows_first or input.dim() != n + 2:
        return NotImplemented
    stride, dilation = _each(given.get("stride", 1), n), _each(given.get("dilation", 1), n)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        missing = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=False)]
        if any(total % 2 for total in missing):
            input = F.pad(input, [side for total in reversed(missing) for side in (0, total % 2)])
        padding = [total // 2 for total in missing]
    output_padding, groups = _each(given.get("output_padding", 0), n), given.get("groups", 1)
    settings = (stride, _each(padding, n), dilation, transposed, output_padding, groups)
    return Convolution.handle(tracer, axis, (input, weight, given.get("bias")), settings)


def _each(value: Any, n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value) * (n if len(value) == 1 else 1)
