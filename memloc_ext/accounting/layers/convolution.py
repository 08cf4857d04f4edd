"""Convolutions of one, two and three dimensions, transposed ones too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext import ops
from memloc_ext.accounting.backward_pass import ParameterView
from memloc_ext.accounting.contributions import Contribution, Rows, accumulated
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.layers.layer_function import LayerFunction, autocast_dtype
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.ops import Groups

_Geometry = tuple[list[int], list[int], list[int], list[int]]
_DIMENSIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


class ConvolutionContribution(Contribution):
    """A convolution's weight; see `torch.nn.functional.conv2d` and its like.

    Args:
        input: ``[batch, in, *]`` with one, two or three dimensions of pixels.
        grad_output: ``[batch, out, *]``, of the same dtype.
        shape: Of the weight.
        stride: A number per dimension of pixels, as are ``padding``, ``dilation`` and ``output_padding``.
        padding: See ``stride``.
        dilation: See ``stride``.
        groups: Divides the channels.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution.
        repeats: Images of an example, one behind the other.
    """

    def __init__(
        self,
        input: Tensor,
        grad_output: Tensor,
        shape: torch.Size,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        transposed: bool = False,
        output_padding: Sequence[int] = (),
        repeats: int = 1,
    ) -> None:
        self.input, self.grad_output = input, grad_output
        self.geometry = list(stride), list(padding), list(dilation)
        self.groups, self.transposed, self.output_padding = (
            groups,
            transposed,
            list(output_padding) or [0] * len(stride),
        )
        self.repeats = repeats
        self.batch, self.shape = len(input) // repeats, shape
        self.dtype, self.device = accumulated(input.dtype), input.device

    def _weight_gradient(self, input: Tensor, grad_output: Tensor, shape: Sequence[int], groups: int) -> Tensor:
        weight = input.new_empty(1).expand(shape)  # only its shape is read
        stride, padding, dilation = self.geometry
        settings = (stride, padding, dilation, self.transposed, self.output_padding, groups)
        return torch.ops.aten.convolution_backward(grad_output, input, weight, None, *settings, [False, True, False])[1]

    def gradients(self, begin: int, end: int) -> Tensor:
        """Return each example's gradient, as one convolution whose groups are the examples."""
        images = slice(begin * self.repeats, end * self.repeats)
        x, g = self.input[images].to(self.dtype), self.grad_output[images].to(self.dtype)
        n = len(x)
        merged = self._weight_gradient(
            x.flatten(0, 1)[None], g.flatten(0, 1)[None], (n * self.shape[0], *self.shape[1:]), n * self.groups
        )
        return merged.reshape(n // self.repeats, self.repeats, *self.shape).sum(1)

    def total(self) -> Tensor:
        return self._weight_gradient(self.input, self.grad_output, self.shape, self.groups)

    def _planar(self) -> tuple[Tensor, Tensor, _Geometry] | None:
        """Return input, gradient and (kernel size, stride, padding, dilation) of an equal 2-d convolution."""
        if self.transposed or self.input.dim() > 4 or self.repeats > 1:
            return None
        x, g, kernel, geometry = self.input, self.grad_output, list(self.shape[2:]), self.geometry
        if x.dim() == 3:
            x, g = x.unsqueeze(2), g.unsqueeze(2)
            stride, padding, dilation = geometry
            kernel, geometry = [1, *kernel], ([1, *stride], [0, *padding], [1, *dilation])
        return x, g, (kernel, *geometry)

    def sqnorm(self) -> Tensor:
        planar = self._planar()
        if planar is None:
            return super().sqnorm()
        x, g, geometry = planar
        return ops.conv2d_grad_sqnorm(x, g, *geometry, self.groups)

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        planar = self._planar()
        if planar is None:
            return super().sqnorm_and_groups(groups)
        x, g, geometry = planar
        sqnorm, sums = ops.conv2d_grad_sqnorm_groups(x, g, groups, None, *geometry, self.groups)
        return sqnorm, sums.reshape(groups.num, *self.shape)


class Convolution(LayerFunction):
    """A convolution of ``[batch, channels, *]``; the examples are always in dimension 0.

    Args:
        weights: Of input, weight and bias.
        axis: See `LayerFunction`; of rows first.
        dtype: That it is computed in.
        settings: stride, padding, dilation, transposed, output_padding, groups, as of ``aten::convolution``.
    """

    def __init__(
        self,
        tracer: Tracer,
        weights: Sequence[ParameterView | None],
        axis: ExampleAxis,
        dtype: torch.dtype,
        settings: tuple[Any, ...],
    ) -> None:
        super().__init__(tracer, weights, axis)
        self.dtype, self.settings = dtype, settings

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        x, w = input.to(self.dtype), weight.to(self.dtype)
        b = None if bias is None else bias.to(self.dtype)
        out = torch.ops.aten.convolution(x, w, b, *self.settings)
        return out, (x, w)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = saved
        stride, padding, dilation, transposed, output_padding, groups = self.settings
        grad_input = grad_weight = grad_bias = None
        if needs[0]:
            outputs = [True, False, False]
            grad_input = torch.ops.aten.convolution_backward(grad, x, w, None, *self.settings, outputs)[0]
        if needs[1]:
            backward = self.telling
            repeats = 1 if backward is None else backward.place(self.axis).after
            geometry = (stride, padding, dilation, groups, transposed, output_padding, repeats)
            grad_weight = self.record(1, ConvolutionContribution(x, grad, w.shape, *geometry))
        if needs[2]:
            grad_bias = self.record(2, Rows(self.by_example(grad.flatten(2).sum(2))))
        return grad_input, grad_weight, grad_bias


def convolution(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle ``conv1d``, ``conv2d`` and ``conv3d`` of `torch.nn.functional`."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    n = _DIMENSIONS[func.__name__]
    stride, dilation = _each(given.get("stride", 1), n), _each(given.get("dilation", 1), n)
    padding, odd = given.get("padding", 0), []
    if padding == "valid":
        padding = 0
    elif padding == "same":
        missing = [d * (k - 1) for d, k in zip(dilation, given["weight"].shape[2:], strict=False)]
        odd = [side for total in reversed(missing) for side in (0, total % 2)]
        padding = [total // 2 for total in missing]
    return _run(tracer, given, (stride, _each(padding, n), dilation, False, [0] * n, given.get("groups", 1)), odd)


def convolution_transposed(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle ``conv_transpose1d``, ``conv_transpose2d`` and ``conv_transpose3d``."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given = dict(zip(names, args, strict=False)) | kwargs
    n = _DIMENSIONS[func.__name__.replace("_transpose", "")]
    stride, dilation = _each(given.get("stride", 1), n), _each(given.get("dilation", 1), n)
    extra, padding = _each(given.get("output_padding", 0), n), _each(given.get("padding", 0), n)
    return _run(tracer, given, (stride, padding, dilation, True, extra, given.get("groups", 1)))


def _run(tracer: Tracer, given: Mapping[str, Any], settings: tuple[Any, ...], pad: Sequence[int] = ()) -> Any:
    """Run the layer, if the parameters are plain ones and the examples are the input's rows, padded beforehand."""
    input, weight, bias = given["input"], given["weight"], given.get("bias")
    axis = tracer.axis(input)
    if axis is None or not axis.rows_first or input.dim() != len(settings[0]) + 2:
        return NotImplemented
    weights = tracer.weights(weight, bias)
    if weights is None:
        return NotImplemented
    if any(pad):
        input = F.pad(input, list(pad))
    return Convolution(tracer, [None, *weights], axis, autocast_dtype(input), settings)(input, weight, bias)


def _each(value: Any, n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value) * (n if len(value) == 1 else 1)
