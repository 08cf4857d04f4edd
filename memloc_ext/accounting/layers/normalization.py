"""Normalisations with an affine part. Their per-example gradients are as small as their outputs' channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memloc_ext import ops
from memloc_ext.accounting.contributions import Rows, accumulated
from memloc_ext.accounting.layers.layer_function import Forward, Gradients, LayerFunction
from memloc_ext.accounting.tracer import Tracer

aten = torch.ops.aten
_OF_INPUT = [True, False, False]  # the gradient that an operator is to return


class _Norm(LayerFunction):
    """What the normalisations share: input, weight and bias in, gradients of weight and bias by example."""

    def record_rows(self, needs: Sequence[bool], *given: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias; ``given``: as of `memloc_ext.ops.normalization_grads`."""
        if not (needs[1] or needs[2]):
            return None, None
        x, grad, mean, rstd = given
        if x.dtype != grad.dtype:
            dtype = torch.promote_types(x.dtype, grad.dtype)
            x, grad = x.to(dtype), grad.to(dtype)
        if mean.dtype != (dtype := accumulated(x.dtype)):
            mean, rstd = mean.to(dtype), rstd.to(dtype)
        scale, shift = ops.normalization_grads(x, grad, mean, rstd)
        scaled = self.record(1, Rows(self.shaped(scale))) if needs[1] else None
        return scaled, self.record(2, Rows(self.shaped(shift))) if needs[2] else None

    def shaped(self, rows: Tensor) -> Tensor:
        """Return the gradients of each example, given them with a row for each row of the layer's input."""
        return self.by_example(rows)


@dataclass(eq=False, repr=False)
class BatchNorm(_Norm):
    """Batch normalisation of ``[batch, channels, *]``, by the batch's statistics or by running ones.

    Attributes:
        weights: Of input, weight and bias.
        running: Running mean and variance.
        training: Whether the batch's statistics are used.
        momentum: Of the running statistics.
        eps: Added to the variance.
    """

    running: tuple[Tensor | None, Tensor | None]
    training: bool
    momentum: float
    eps: float

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Forward:
        settings = (*self.running, self.training, self.momentum, self.eps)
        out, mean, rstd = aten.native_batch_norm(input, weight, bias, *settings)
        running = (None, None) if self.training else self.running
        return out, (input, weight, mean, rstd, *running)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        x, weight, mean, rstd, running_mean, running_var = saved
        backward = self.tracer.backward
        constant = not self.training or (backward is not None and backward.constant_statistics)
        if not self.training:  # the statistics are constants
            mean, rstd = running_mean, (running_var + self.eps).rsqrt()
        grad_input = None
        if needs[0] and constant and (self.training or grad.dtype == running_var.dtype):
            scale = rstd if weight is None else rstd * weight
            grad_input = (grad * scale.reshape(len(scale), *[1] * (x.dim() - 2))).to(grad.dtype)
        elif needs[0]:
            given = (grad, x, weight, running_mean, running_var, mean, rstd, self.training, self.eps)
            grad_input = aten.native_batch_norm_backward(*given, _OF_INPUT)[0]
        return grad_input, *self.record_rows(needs, _planes(x), _planes(grad), *map(_by_plane, (mean, rstd)))


@dataclass(eq=False, repr=False)
class GroupNorm(_Norm):
    """Group normalisation of ``[batch, channels, *]``.

    Attributes:
        weights: Of input, weight and bias.
        groups: Of channels.
        eps: Added to the variance.
    """

    groups: int
    eps: float

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Forward:
        x = input.contiguous()
        sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]))
        out, mean, rstd = aten.native_group_norm(x, weight, bias, *sizes, self.groups, self.eps)
        return out, (x, weight, mean, rstd)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        x, weight, mean, rstd = saved
        sizes, grad = (x.shape[0], x.shape[1], math.prod(x.shape[2:])), grad.contiguous()
        given = (grad, x, mean, rstd, weight, *sizes, self.groups)
        grad_input = aten.native_group_norm_backward(*given, _OF_INPUT)[0] if needs[0] else None
        width = x.shape[1] // self.groups
        mean, rstd = (t.reshape(len(x), self.groups).repeat_interleave(width, 1)[..., None] for t in (mean, rstd))
        return grad_input, *self.record_rows(needs, _planes(x), _planes(grad), mean, rstd)


@dataclass(eq=False, repr=False)
class LayerNorm(_Norm):
    """Layer normalisation over the last dimensions.

    Attributes:
        weights: Of input, weight and bias.
        shape: Of the last dimensions.
        eps: Added to the variance.
    """

    shape: Sequence[int]
    eps: float | None

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Forward:
        out, mean, rstd = aten.native_layer_norm(input, self.shape, weight, bias, self.eps)
        return out, (input, weight, bias, mean, rstd)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        x, weight, bias, mean, rstd = saved
        given = (grad, x, self.shape, mean, rstd, weight, bias)
        grad_input = aten.native_layer_norm_backward(*given, _OF_INPUT)[0] if needs[0] else None
        return grad_input, *self.record_rows(needs, *map(self.tokens, (x, grad, mean, rstd)))

    def tokens(self, t: Tensor) -> Tensor:
        """Return activations or statistics as ``[batch, channels, positions]``; a channel is what is normalised."""
        first, own = self.examples(t), len(self.shape)
        positions, channels = first.shape[1 : first.dim() - own], first.shape[-own:]
        return first.reshape(len(first), math.prod(positions), math.prod(channels)).transpose(1, 2)

    def shaped(self, rows: Tensor) -> Tensor:
        """See `_Norm`; the rows are the examples."""
        return rows.reshape(len(rows), *self.shape)


class RMSNorm(LayerNorm):
    """Normalisation by the root mean square over the last dimensions."""

    def forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Forward:
        out = torch.rms_norm(input, self.shape, weight, self.eps)
        return out, (input, weight)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        x, weight = saved
        dims = tuple(range(x.dim() - len(self.shape), x.dim()))
        wide = x.double() if x.dtype == torch.float64 else x.float()
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps
        rstd = (wide.square().mean(dims, keepdim=True) + eps).rsqrt()
        grad_input = None
        if needs[0]:
            scaled = grad.to(wide.dtype) if weight is None else grad * weight.to(wide.dtype)
            mean = (scaled * wide).mean(dims, keepdim=True)
            grad_input = (rstd * (scaled - wide * mean * rstd.square())).to(x.dtype)
        x, grad, rstd = map(self.tokens, (x, grad, rstd))
        return grad_input, *self.record_rows((False, needs[1], False), x, grad, rstd.new_zeros(1, 1, 1), rstd)


def _by_plane(t: Tensor) -> Tensor:
    """Return ``[channels]``, or ``[batch, channels]``, as numbers of planes, ``[batch or 1, channels, 1]``."""
    return t.reshape(-1, t.shape[-1], 1)


def _planes(t: Tensor) -> Tensor:
    """Return ``[batch, channels, *]`` as ``[batch, channels, positions]``."""
    return t.reshape(*t.shape[:2], math.prod(t.shape[2:]))


def batch_norm(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.nn.functional.batch_norm`."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    training, input = given.get("training", False), given["input"]
    if training and input.numel() == input.shape[1]:
        return NotImplemented  # PyTorch's own error
    if not training and given.get("weight") is None and given.get("bias") is None:
        return NotImplemented
    running = (given["running_mean"], given["running_var"])
    return _run(BatchNorm, tracer, given, running, training, given.get("momentum", 0.1), given.get("eps", 1e-5))


def group_norm(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.nn.functional.group_norm`."""
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
    given["input"] = _wide(tracer, given["input"])
    return _run(GroupNorm, tracer, given, given["num_groups"], given.get("eps", 1e-5))


def instance_norm(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.nn.functional.instance_norm` without running statistics: a group for each channel."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    input, own = given["input"], given.get("use_input_stats", True)
    if given.get("running_mean") is not None or not own or math.prod(input.shape[2:]) < 2:
        return NotImplemented
    return _run(GroupNorm, tracer, given, input.shape[1], given.get("eps", 1e-5))


def layer_norm(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.nn.functional.layer_norm`."""
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
    given["input"] = _wide(tracer, given["input"])
    return _run(LayerNorm, tracer, given, given["normalized_shape"], given.get("eps", 1e-5))


def rms_norm(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.nn.functional.rms_norm`."""
    given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
    return _run(RMSNorm, tracer, given, given["normalized_shape"], given.get("eps"))


def _wide(tracer: Tracer, input: Tensor) -> Tensor:
    """Return the input in the type that autocast computes layer and group normalisations in on this device."""
    device = input.device.type
    if device == "cuda" and torch.is_autocast_enabled(device) and input.dtype in (torch.float16, torch.bfloat16):
        axis, input = tracer.axis(input), input.float()
        if axis is not None:
            tracer.remember(input, axis)
    return input


def _run(layer: type[_Norm], tracer: Tracer, given: Mapping[str, Any], *settings: Any) -> Any:
    """Run a layer, if the parameters are plain ones and the examples are not among what is normalised together."""
    input, weight, bias = given["input"], given.get("weight"), given.get("bias")
    shape = given.get("normalized_shape")
    axis = tracer.axis(input)
    if axis is None or axis.dim >= (min(1, input.dim() - 1) if shape is None else input.dim() - len(shape)):
        return NotImplemented  # examples are normalised together
    return layer.handle(tracer, axis, (input, weight, bias), *settings)
