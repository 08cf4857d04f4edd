"""Convolutions of one, two and three dimensions, transposed ones too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.accounting.layer import Rule, autocast_dtype
from memloc_ext.accounting.layout import Layout
from memloc_ext.accounting.run import Weight
from memloc_ext.accounting.session import Session
from memloc_ext.accounting.uses import ConvolutionUse, Rows

_DIMENSIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


class Convolution(Rule):
    """A convolution of ``[batch, channels, *]``; the examples are always in dimension 0.

    Args:
        session: See `Rule`.
        weights: Of input, weight and bias.
        layout: See `Rule`; of rows first.
        dtype: That it is computed in.
        settings: stride, padding, dilation, transposed, output_padding, groups, as of ``aten::convolution``.
    """

    def __init__(
        self,
        session: Session,
        weights: Sequence[Weight | None],
        layout: Layout,
        dtype: torch.dtype,
        settings: tuple[Any, ...],
    ) -> None:
        super().__init__(session, weights, layout)
        self.dtype, self.settings = dtype, settings

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `Rule`."""
        x, w = input.to(self.dtype), weight.to(self.dtype)
        b = None if bias is None else bias.to(self.dtype)
        out = torch.ops.aten.convolution(x, w, b, *self.settings)
        return out, (x, w)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `Rule`."""
        x, w = saved
        stride, padding, dilation, transposed, output_padding, groups = self.settings
        grad_input = grad_weight = grad_bias = None
        if needs[0]:
            outputs = [True, False, False]
            grad_input = torch.ops.aten.convolution_backward(grad, x, w, None, *self.settings, outputs)[0]
        if needs[1]:
            run = self.telling
            repeats = 1 if run is None else run.place(self.layout).after
            geometry = (stride, padding, dilation, groups, transposed, output_padding, repeats)
            grad_weight = self.record(1, ConvolutionUse(x, grad, w.shape, *geometry))
        if needs[2]:
            grad_bias = self.record(2, Rows(self.by_example(grad.flatten(2).sum(2))))
        return grad_input, grad_weight, grad_bias


def convolution(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
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
    return _run(session, given, (stride, _each(padding, n), dilation, False, [0] * n, given.get("groups", 1)), odd)


def convolution_transposed(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle ``conv_transpose1d``, ``conv_transpose2d`` and ``conv_transpose3d``."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given = dict(zip(names, args, strict=False)) | kwargs
    n = _DIMENSIONS[func.__name__.replace("_transpose", "")]
    stride, dilation = _each(given.get("stride", 1), n), _each(given.get("dilation", 1), n)
    extra, padding = _each(given.get("output_padding", 0), n), _each(given.get("padding", 0), n)
    return _run(session, given, (stride, padding, dilation, True, extra, given.get("groups", 1)))


def _run(session: Session, given: Mapping[str, Any], settings: tuple[Any, ...], pad: Sequence[int] = ()) -> Any:
    """Run the rule, if the parameters are plain ones and the examples are the input's rows, padded beforehand."""
    input, weight, bias = given["input"], given["weight"], given.get("bias")
    layout = session.layout(input)
    if layout is None or not layout.rows_first or input.dim() != len(settings[0]) + 2:
        return NotImplemented
    weights = session.weights(weight, bias)
    if weights is None:
        return NotImplemented
    if any(pad):
        input = F.pad(input, list(pad))
    return Convolution(session, [None, *weights], layout, autocast_dtype(input), settings)(input, weight, bias)


def _each(value: Any, n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value) * (n if len(value) == 1 else 1)
