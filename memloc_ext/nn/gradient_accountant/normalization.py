"""Normalisations with an affine part. Their per-example gradients are as small as their outputs' channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memloc_ext.nn.gradient_accountant.layer import Rule
from memloc_ext.nn.gradient_accountant.layout import Layout
from memloc_ext.nn.gradient_accountant.run import Weight
from memloc_ext.nn.gradient_accountant.session import Session
from memloc_ext.nn.gradient_accountant.uses import Rows, chunks

aten = torch.ops.aten


class _Norm(Rule):
    """What the normalisations share: input, weight and bias in, gradients of weight and bias by example."""

    def _channels(
        self, needs: Sequence[bool], x: Tensor, grad: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias; statistics as of `_channel_gradients`."""
        rows = _channel_gradients(x, grad, mean, var, eps)
        scaled, plain = (
            self.record(i, Rows(self.by_example(row))) if needs[i] else None for i, row in enumerate(rows, 1)
        )
        return scaled, plain


class BatchNorm(_Norm):
    """Batch normalisation of ``[batch, channels, *]``, by the batch's statistics or by running ones.

    Args:
        session: See `Rule`.
        weights: Of input, weight and bias.
        layout: See `Rule`.
        running: Running mean and variance.
        training: Whether the batch's statistics are used.
        momentum: Of the running statistics.
        eps: Added to the variance.
    """

    def __init__(
        self,
        session: Session,
        weights: Sequence[Weight | None],
        layout: Layout,
        running: tuple[Tensor | None, Tensor | None],
        training: bool,
        momentum: float,
        eps: float,
    ) -> None:
        super().__init__(session, weights, layout)
        self.running, self.training, self.momentum, self.eps = running, training, momentum, eps

    def forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `Rule`."""
        out, mean, rstd = aten.native_batch_norm(
            input, weight, bias, *self.running, self.training, self.momentum, self.eps
        )
        running = (None, None) if self.training else self.running
        return out, (input, weight, mean, rstd, *running)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `Rule`."""
        x, weight, mean, rstd, running_mean, running_var = saved
        grad_input = None
        if needs[0] and not self.training and grad.dtype == running_var.dtype:  # the statistics are constants
            scale = (running_var + self.eps).rsqrt()
            scale = scale if weight is None else scale * weight
            grad_input = grad * scale.reshape(len(scale), *[1] * (x.dim() - 2))
        elif needs[0]:
            stats = (running_mean, running_var, mean, rstd)
            grad_input = aten.native_batch_norm_backward(
                grad, x, weight, *stats, self.training, self.eps, [True, False, False]
            )[0]
        if not (needs[1] or needs[2]):
            return grad_input, None, None
        n = len(x)
        if self.training:
            mean, var, eps = mean.repeat(n), rstd.pow(-2).repeat(n), 0.0
        else:
            mean, var, eps = running_mean.repeat(n), running_var.repeat(n), self.eps
        return grad_input, *self._channels(needs, x, grad, mean, var, eps)


class GroupNorm(_Norm):
    """Group normalisation of ``[batch, channels, *]``.

    Args:
        session: See `Rule`.
        weights: Of input, weight and bias.
        layout: See `Rule`.
        groups: Of channels.
        eps: Added to the variance.
    """

    def __init__(
        self, session: Session, weights: Sequence[Weight | None], layout: Layout, groups: int, eps: float
    ) -> None:
        super().__init__(session, weights, layout)
        self.groups, self.eps = groups, eps

    def forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `Rule`."""
        x = input.contiguous()
        sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]))
        out, mean, rstd = aten.native_group_norm(x, weight, bias, *sizes, self.groups, self.eps)
        return out, (x, weight, mean, rstd)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `Rule`."""
        x, weight, mean, rstd = saved
        sizes, grad = (x.shape[0], x.shape[1], math.prod(x.shape[2:])), grad.contiguous()
        grad_input = None
        if needs[0]:
            outputs = [True, False, False]
            grad_input = aten.native_group_norm_backward(grad, x, mean, rstd, weight, *sizes, self.groups, outputs)[0]
        if not (needs[1] or needs[2]):
            return grad_input, None, None
        width = x.shape[1] // self.groups
        mean, var = (t.reshape(-1).repeat_interleave(width) for t in (mean, rstd.pow(-2)))
        return grad_input, *self._channels(needs, x, grad, mean, var, 0.0)


class LayerNorm(_Norm):
    """Layer normalisation over the last dimensions.

    Args:
        session: See `Rule`.
        weights: Of input, weight and bias.
        layout: See `Rule`.
        shape: Of the last dimensions.
        eps: Added to the variance.
    """

    def __init__(
        self,
        session: Session,
        weights: Sequence[Weight | None],
        layout: Layout,
        shape: Sequence[int],
        eps: float | None,
    ) -> None:
        super().__init__(session, weights, layout)
        self.shape, self.eps = list(shape), eps

    def forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `Rule`."""
        out, mean, rstd = aten.native_layer_norm(input, self.shape, weight, bias, self.eps)
        return out, (input, weight, bias, mean, rstd)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `Rule`."""
        x, weight, bias, mean, rstd = saved
        grad_input = None
        if needs[0]:
            outputs = [True, False, False]
            grad_input = aten.native_layer_norm_backward(grad, x, self.shape, mean, rstd, weight, bias, outputs)[0]
        if not (needs[1] or needs[2]):
            return grad_input, None, None
        return grad_input, *self._affine(needs, x, grad, mean, rstd)

    def _affine(
        self, needs: Sequence[bool], x: Tensor, grad: Tensor, mean: Tensor | None, rstd: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias."""
        own = len(self.shape)

        def split(t: Tensor) -> Tensor:  # [batch, positions, *shape]
            first = self.examples(t)
            return first.reshape(len(first), math.prod(first.shape[1 : first.dim() - own]), *first.shape[-own:])

        x, grad, rstd = split(x), split(grad), split(rstd)
        mean = None if mean is None else split(mean)
        scaled = plain = None
        if needs[1]:
            parts = []
            for begin, end in chunks(len(x), x.shape[1:], torch.float32, budget=1 << 20):  # stays in cache
                normalised = x[begin:end].to(rstd.dtype)
                if mean is not None:
                    normalised = normalised - mean[begin:end]
                parts.append((normalised * rstd[begin:end]).mul_(grad[begin:end]).sum(1))
            scaled = self.record(1, Rows(torch.cat(parts) if parts else x.new_zeros(0, *self.shape)))
        if needs[2]:
            plain = self.record(2, Rows(grad.sum(1)))
        return scaled, plain


class RMSNorm(LayerNorm):
    """Normalisation by the root mean square over the last dimensions."""

    def forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `Rule`."""
        out = torch.rms_norm(input, self.shape, weight, self.eps)
        return out, (input, weight)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `Rule`."""
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
        grad_weight = self._affine((False, needs[1], False), x, grad, None, rstd)[0] if needs[1] else None
        return grad_input, grad_weight, None


def _channel_gradients(x: Tensor, grad: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients by example of the scale and of the shift of channels, ``[batch, channels]`` each.

    Examples become channels of one example, whose normalisation by given statistics has those very gradients.

    Args:
        x: ``[batch, channels, *]``.
        grad: Of the output, like ``x``.
        mean: ``[batch * channels]``.
        var: Like ``mean``.
        eps: Added to ``var``.
    """
    batch, channels = x.shape[:2]
    parts = []
    dtype = torch.promote_types(x.dtype, mean.dtype)
    budget = 1 << 30 if x.dtype == dtype else 1 << 22  # a copy in another type is made of a few examples at a time
    for begin, end in chunks(batch, x.shape[1:], dtype, budget=budget):
        one = (1, (end - begin) * channels, math.prod(x.shape[2:]))
        pair = (t[begin:end].reshape(one).to(dtype) for t in (grad, x))
        part = slice(begin * channels, end * channels)
        stats = (mean[part].to(dtype), var[part].to(dtype), None, None)
        _, scaled, plain = aten.native_batch_norm_backward(*pair, None, *stats, False, eps, [False, True, True])
        parts.append((scaled.reshape(end - begin, channels), plain.reshape(end - begin, channels)))
    if not parts:
        return x.new_zeros(0, channels), x.new_zeros(0, channels)
    scaled, plain = zip(*parts, strict=True)
    return torch.cat(scaled), torch.cat(plain)


def batch_norm(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.nn.functional.batch_norm`."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    input, weight, bias = given["input"], given.get("weight"), given.get("bias")
    if not _accountable(session, input, weight, bias):
        return NotImplemented
    training = given.get("training", False)
    if training and input.numel() == input.shape[1]:
        return NotImplemented  # PyTorch's own error
    running = (given["running_mean"], given["running_var"])
    settings = (running, training, given.get("momentum", 0.1), given.get("eps", 1e-5))
    return BatchNorm(session, *_known(session, input, weight, bias), *settings)(input, weight, bias)


def group_norm(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.nn.functional.group_norm`."""
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
    input, weight, bias = _wide(session, given["input"]), given.get("weight"), given.get("bias")
    if not _accountable(session, input, weight, bias):
        return NotImplemented
    settings = (given["num_groups"], given.get("eps", 1e-5))
    return GroupNorm(session, *_known(session, input, weight, bias), *settings)(input, weight, bias)


def instance_norm(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.nn.functional.instance_norm` without running statistics: a group for each channel."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    input, weight, bias = given["input"], given.get("weight"), given.get("bias")
    if given.get("running_mean") is not None or not given.get("use_input_stats", True):
        return NotImplemented
    if not _accountable(session, input, weight, bias) or math.prod(input.shape[2:]) < 2:
        return NotImplemented
    settings = (input.shape[1], given.get("eps", 1e-5))
    return GroupNorm(session, *_known(session, input, weight, bias), *settings)(input, weight, bias)


def layer_norm(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.nn.functional.layer_norm`."""
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
    input, weight, bias = _wide(session, given["input"]), given.get("weight"), given.get("bias")
    if not _accountable(session, input, weight, bias, given["normalized_shape"]):
        return NotImplemented
    settings = (given["normalized_shape"], given.get("eps", 1e-5))
    return LayerNorm(session, *_known(session, input, weight, bias), *settings)(input, weight, bias)


def rms_norm(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.nn.functional.rms_norm`."""
    given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
    input, weight = given["input"], given.get("weight")
    if not _accountable(session, input, weight, None, given["normalized_shape"]):
        return NotImplemented
    settings = (given["normalized_shape"], given.get("eps"))
    return RMSNorm(session, *_known(session, input, weight, None), *settings)(input, weight, None)


def _wide(session: Session, input: Tensor) -> Tensor:
    """Return the input in the type that autocast computes layer and group normalisations in on this device."""
    device = input.device.type
    if device == "cuda" and torch.is_autocast_enabled(device) and input.dtype in (torch.float16, torch.bfloat16):
        layout, input = session.layout(input), input.float()
        if layout is not None:
            session.remember(input, layout)
    return input


def _accountable(
    session: Session, input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int] | None = None
) -> bool:
    """Return whether the parameters are plain ones, and the examples are not among what is normalised together."""
    layout = session.layout(input)
    if layout is None or not session.plain(weight, bias):
        return False
    return layout.dim < input.dim() - len(shape) if shape is not None else layout.dim == 0 and input.dim() >= 2


def _known(
    session: Session, input: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[list[Weight | None], Layout]:
    layout = session.layout(input)
    assert layout is not None
    return [None, session.weight(weight), session.weight(bias)], layout
