"""Convolutions and linear layers with what follows them, of a slab or of rows that differ all over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.ablation.recording import Call, Recording, Ref
from memloc_ext.ablation.rows import BATCH_NORMS, normalises_by_batch, trimmed
from memloc_ext.ops.ablation import conv2d_ablation, linear_ablation


@dataclass(frozen=True)
class Layer:
    """``relu(scale * layer(input) + shift + residual)``, of which all but the layer may be missing.

    Attributes:
        call: The convolution or matrix product.
        input: The value that it is given.
        weight: ``[out, in, *]``.
        bias: ``[out]``.
        norm: A normalisation by running statistics, which scales and shifts.
        residual: A value that is added.
        relu: Whether a ReLU ends it.
        output: The value of the whole.
        calls: Positions of the calls that it stands for.
    """

    call: Call
    input: int
    weight: Tensor
    bias: Tensor | None
    output: int
    calls: tuple[int, ...]
    norm: Call | None = None
    residual: int | None = None
    relu: bool = False

    @property
    def refs(self) -> list[int]:
        """The values it reads."""
        return [self.input] if self.residual is None else [self.input, self.residual]

    @property
    def outputs(self) -> list[int]:
        """The value of the whole."""
        return [self.output]

    @property
    def is_convolution(self) -> bool:
        """Whether the layer is a convolution."""
        return self.call.name == "convolution"

    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Return stride, padding and dilation of a convolution."""
        stride, padding, dilation = (list(self.call.args[i]) for i in (3, 4, 5))
        return stride, padding, dilation

    def affine(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return scale and shift, ``[out]``."""
        if self.norm is None:
            return None, None
        _, weight, bias, mean, var, *_, eps = self.norm.args
        scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
        return scale, -mean * scale if bias is None else bias - mean * scale

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias that do the scale and shift too."""
        scale, shift = self.affine()
        if scale is None or shift is None:
            return self.weight, self.bias
        bias = shift if self.bias is None else shift + self.bias * scale
        return self.weight * scale.reshape(-1, *[1] * (self.weight.dim() - 1)), bias


def find_layer(
    recording: Recording, readers: Sequence[Sequence[int]], position: int, taken: set[int], whole: Sequence[int]
) -> Layer | None:
    """Return the layer that begins at a call, with as much of what follows as belongs to it alone.

    Calls that are taken belong to another layer; values that must be ``whole`` end one.
    """
    call = recording.calls[position]
    layer = _plain(recording, call, position)
    if layer is None:
        return None
    while True:
        value = layer.output
        ends = value in whole or value in recording.outputs or len(readers[value]) != 1
        if ends or readers[value][0] in taken:
            return layer
        position = readers[value][0]
        call = recording.calls[position]
        calls, output = (*layer.calls, position), call.outputs[0]
        if call.name == "relu":
            return replace(layer, relu=True, calls=calls, output=output)
        if not layer.is_convolution or layer.residual is not None:
            return layer
        if call.name in BATCH_NORMS and layer.norm is None and not normalises_by_batch(call):
            if call.args[3].dtype != layer.weight.dtype:  # under autocast
                return layer
            layer = replace(layer, norm=call, calls=calls, output=output)
        elif call.name == "add" and not call.kwargs and all(isinstance(a, Ref) for a in call.args):
            other = next((a.index for a in call.args if a.index != value), None)
            if other is None or any(kinds[other] != kinds[value] for kinds in (recording.shapes, recording.dtypes)):
                return layer
            layer = replace(layer, residual=other, calls=calls, output=output)
        else:
            return layer


def _plain(recording: Recording, call: Call, position: int) -> Layer | None:
    refs = call.refs
    if len(refs) != 1:
        return None
    if call.name == "convolution" and isinstance(call.args[0], Ref):
        _, weight, bias, _, _, _, transposed, _, groups = call.args
        if transposed or groups != 1 or weight.dim() != 4:
            return None
        return Layer(call, refs[0], weight, bias, call.outputs[0], (position,))
    if call.name == "addmm" and isinstance(call.args[1], Ref) and not call.kwargs and call.args[0].dim() == 1:
        return Layer(call, refs[0], call.args[2].t(), call.args[0], call.outputs[0], (position,))
    if call.name == "mm" and isinstance(call.args[0], Ref):
        weight: Any = call.args[1]
        return Layer(call, refs[0], weight.t(), None, call.outputs[0], (position,))
    return None


def run_layer(layer: Layer, x: Tensor, residual: Tensor | None) -> Tensor:
    """Run a layer on rows, ``[rows, *shape]`` to the same."""
    weight, bias = layer.folded()
    if layer.is_convolution:
        stride, padding, dilation = layer.geometry()
        weight, padding = trimmed(x[0], weight, stride, padding, dilation)
        arguments = x.flatten(0, 1), weight, bias, stride, padding, dilation
        if layer.relu and has_fused(x):
            out = _fused(*arguments, None if residual is None else residual.flatten(0, 1))
            if out is not None:
                return out.unflatten(0, x.shape[:2])
        out = F.conv2d(*arguments).unflatten(0, x.shape[:2])
    else:
        out = F.linear(x, weight, bias)
    if residual is not None:
        out += residual
    return out.relu_() if layer.relu else out


def has_fused(x: Tensor) -> bool:
    """Whether cuDNN has convolutions for a tensor that add a residual and end in a ReLU; they have no gradient."""
    types = (torch.float16, torch.float32)
    return x.is_cuda and x.dtype in types and torch.backends.cudnn.enabled and not torch.is_grad_enabled()


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
) -> Tensor | None:
    """Return the ReLU of a convolution and a residual in one kernel, None where cuDNN has none of that kind."""
    kind = (x.dtype, weight.shape, *stride, *padding, *dilation, residual is None)
    if kind in _WITHOUT:
        return None
    try:
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, 1)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1, bias, stride, padding, dilation, 1)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no engine for these sizes
        _WITHOUT.add(kind)
        return None


_WITHOUT = set[object]()


def run_layer_on_channel(
    layer: Layer, change: Tensor, channels: Tensor, unchanged: Tensor, rows: Tensor, residual: Tensor | None
) -> Tensor:
    """Run a layer on rows of which one input channel each differs from the unchanged network's.

    Args:
        layer: To run.
        change: New minus old values, ``[rows, *shape]`` with one channel.
        channels: Of each row.
        unchanged: The layer's own output in the unchanged network, before the scale: ``[examples, *shape]``.
        rows: Example of each row.
        residual: ``[rows, *shape]``.
    """
    scale, shift = layer.affine()
    rest = (scale, shift, residual, layer.relu, rows)
    if layer.is_convolution:
        operands = (unchanged[:, 0], change[:, 0], layer.weight, channels, *layer.geometry())
        return conv2d_ablation(*operands, *rest)
    return linear_ablation(unchanged, change[..., 0][:, None], layer.weight, channels, *rest)[:, 0]
