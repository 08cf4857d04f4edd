"""Layers that are accounted together, by one operator: which these are, and what they are given in a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.accounting.backward_pass import BackwardPass
from memloc_ext.accounting.contributions import accumulated
from memloc_ext.accounting.layers.convolution import Convolution
from memloc_ext.accounting.layers.elementwise import Broadcast
from memloc_ext.accounting.layers.layer_function import LayerFunction
from memloc_ext.accounting.layers.linear import Linear
from memloc_ext.accounting.layers.normalization import BatchNorm, GroupNorm, LayerNorm
from memloc_ext.ops.account import CHANNEL_NORM, CONVOLUTION, LAYER_NORM, LINEAR, Geometry, Layer, account
from memloc_ext.ops.grad_sqnorm import plan_conv2d, plan_linear

SMALL = 1 << 16  # bytes of what a layer is given, up to which it waits for the end of the backward pass
BUDGET = 1 << 22  # bytes of what waits
_FEW = 1 << 18  # multiply-adds of a gradient that one pass is best for, whatever the plan says
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Fused:
    """A layer for `memloc_ext.ops.account.account`.

    Attributes:
        layer: What it is.
        read: Returns its input, and the statistics of a normalisation, given its node; None if only a bias is added.
        keys: The ``id`` of each parameter, the weight first.
        shapes: Of the parameters.
        size: Bytes of what it is given.
        wide: Its device, and the type that sums are formed in.
        one_pass: Whether norms and sums are best found by one pass.
    """

    layer: Layer
    read: Callable[[Any], Any] | None
    keys: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    size: int
    wide: tuple[torch.device, torch.dtype]
    one_pass: bool


def fused(
    layer: LayerFunction,
    node: Any,
    shape: tuple[int, ...],
    rows: tuple[int, ...],
    parameters: Mapping[int, nn.Parameter],
) -> Fused | None:
    """Return how a layer takes part, or None if it does not.

    Args:
        layer: How it runs backward.
        node: That runs it.
        shape: Of the node's output.
        rows: Of the layer's output.
        parameters: Place among the layer's tensors to the parameter that it is.
    """
    output = node._input_metadata[0]
    found = _KINDS.get(type(layer), lambda *_: None)(layer, node, shape, rows, parameters)
    device: torch.device = next(iter(parameters.values())).device
    if found is None or output.dtype not in _DTYPES or device.type not in ("cpu", "cuda"):
        return None
    kind, read = found
    wide, size = accumulated(output.dtype), math.prod(shape) * output.dtype.itemsize
    input, *statistics = (read(node) if kind.kind in (LAYER_NORM, CHANNEL_NORM) else (read(node),)) if read else (None,)
    if input is not None:
        if input.dtype != output.dtype or any(t.dtype != wide or not t.is_contiguous() for t in statistics):
            return None
        size += input.numel() * input.itemsize
    given = [parameters[i] for i in sorted(parameters)]
    one_pass = device.type == "cuda" or kind.kind not in (LINEAR, CONVOLUTION) or not kind.parameters & 1
    if not one_pass:
        positions = math.prod(shape) // max(1, given[0].shape[0])
        one_pass = given[0].numel() * positions <= _FEW or _planned(kind, shape, input)
    return Fused(kind, read, tuple(map(id, given)), tuple(p.shape for p in given), size, (device, wide), one_pass)


def _planned(layer: Layer, shape: tuple[int, ...], input: Any) -> bool:
    """Return whether one pass takes less time than norms and sums for themselves."""
    if layer.kind == LINEAR:
        batch = shape[0] // (layer.before * layer.after)
        return plan_linear(shape[0] // max(1, batch), input.shape[1], shape[1]).fused
    size = input.shape[2:] if input.dim() == 4 else (1, *input.shape[2:])
    return plan_conv2d(input.shape[1], shape[1], size, *layer.convolution).fused


def _bits(parameters: Mapping[int, nn.Parameter]) -> int:
    return (1 in parameters) + 2 * (2 in parameters)


def _linear(
    layer: Any, node: Any, shape: tuple[int, ...], rows: tuple[int, ...], parameters: Mapping[int, nn.Parameter]
) -> tuple[Layer, Any] | None:
    if len(shape) != 2:
        return None
    axis = layer.axis
    before = axis.before * math.prod(rows[: axis.dim])
    after = axis.after * math.prod(rows[axis.dim + 1 : -1])
    read = attrgetter("_saved_mat1" if type(node).__name__ == "AddmmBackward0" else "_saved_self")
    return Layer(LINEAR, _bits(parameters), 0, before, after), read if 1 in parameters else None


def _added(
    layer: Any, node: Any, shape: tuple[int, ...], rows: tuple[int, ...], parameters: Mapping[int, nn.Parameter]
) -> tuple[Layer, Any] | None:
    """Return a parameter whose gradient of an example is the output's, summed over dimensions but the last ones."""
    axis, own = layer.axis, parameters[0].shape
    padded = (*[1] * (len(shape) - len(own)), *own)
    last = next((len(padded) - d for d, size in enumerate(padded) if size != 1), 1)
    if shape != rows or len(own) > len(shape) or padded[-last:] != shape[-last:] or len(shape) - last <= axis.dim:
        return None
    return Layer(LINEAR, 2, axis.dim, axis.before, axis.after, last), None


def _convolution(
    layer: Any, node: Any, shape: tuple[int, ...], rows: tuple[int, ...], parameters: Mapping[int, nn.Parameter]
) -> tuple[Layer, Any] | None:
    stride, padding, dilation, transposed, _, groups = layer.settings
    if transposed or len(shape) not in (3, 4) or layer.axis.after != 1:
        return None
    pairs = (list(node._saved_weight.shape[2:]), stride, padding, dilation)
    one = ([1], [1], [0], [1]) if len(shape) == 3 else ([],) * 4
    geometry = (*(n for first, pair in zip(one, pairs, strict=True) for n in (*first, *pair)), groups)
    return Layer(CONVOLUTION, _bits(parameters), geometry=geometry), attrgetter("_saved_input")


def _batch_norm(
    layer: Any, node: Any, shape: tuple[int, ...], rows: tuple[int, ...], parameters: Mapping[int, nn.Parameter]
) -> tuple[Layer, Any] | None:
    if not layer.axis.rows_first or layer.axis.after != 1:
        return None
    kind = Layer(CHANNEL_NORM, _bits(parameters), own=0, eps=-1.0 if node._saved_training else layer.eps)
    names = ("result1", "result2") if node._saved_training else ("running_mean", "running_var")
    return kind, attrgetter("_saved_input", *(f"_saved_{name}" for name in names))


def _group_norm(
    layer: Any, node: Any, shape: tuple[int, ...], rows: tuple[int, ...], parameters: Mapping[int, nn.Parameter]
) -> tuple[Layer, Any] | None:
    if not layer.axis.rows_first or layer.axis.after != 1:
        return None
    read = attrgetter("_saved_input", "_saved_result1", "_saved_result2")
    return Layer(CHANNEL_NORM, _bits(parameters), own=layer.groups), read


def _layer_norm(
    layer: Any, node: Any, shape: tuple[int, ...], rows: tuple[int, ...], parameters: Mapping[int, nn.Parameter]
) -> tuple[Layer, Any] | None:
    axis = layer.axis
    read = attrgetter("_saved_input", "_saved_result1", "_saved_result2")
    return Layer(LAYER_NORM, _bits(parameters), axis.dim, axis.before, axis.after, len(layer.shape)), read


_KINDS: Mapping[type[LayerFunction], Callable[..., tuple[Layer, Any] | None]] = {
    Linear: _linear,
    Broadcast: _added,
    Convolution: _convolution,
    BatchNorm: _batch_norm,
    GroupNorm: _group_norm,
    LayerNorm: _layer_norm,
}


class Together:
    """Some layers that are accounted by one call.

    Args:
        layers: At least one, all of the same device and kind of type.
    """

    def __init__(self, layers: Sequence[Fused]) -> None:
        self.layers = layers
        self._normal = [layer.layer.kind in (LAYER_NORM, CHANNEL_NORM) for layer in layers]
        self._geometry = Geometry.of([layer.layer for layer in layers])
        self._keys = [key for layer in layers for key in layer.keys]
        self._shapes = [shape for layer in layers for shape in layer.shapes]

    def account(self, backward: BackwardPass, given: Sequence[Any], gradients: Sequence[Tensor]) -> dict[int, Tensor]:
        """Tell a backward pass of the layers; return the parameters' gradients, by the ``id`` of each.

        Args:
            backward: Is told.
            given: What was read of each layer, None if it only adds a bias.
            gradients: Of each layer's output.
        """
        inputs, statistics = [], []
        for read, gradient, normal in zip(given, gradients, self._normal, strict=True):
            if normal:
                inputs.append(read[0])
                statistics += read[1:]
            else:
                inputs.append(gradient if read is None else read)
        told = account(inputs, list(gradients), statistics, self._geometry, backward.groups, sums=backward.weight_grads)
        sqnorm, squares, sums = told
        keys, count = self._keys, len(self._keys)
        backward.sqnorm.update(zip(keys, sqnorm.unbind(), strict=True))
        if not backward.weight_grads:
            return {}
        backward.sum_sqnorm.update(zip(keys, squares.unbind(), strict=True))
        if backward.groups is not None:
            shapes = ((backward.groups.num, *shape) for shape in self._shapes)
            backward.group_grad.update(zip(keys, map(_shaped, sums[count:], shapes), strict=True))
        return dict(zip(keys, map(_shaped, sums[:count], self._shapes), strict=True))


class Waiting:
    """Layers that wait for each other, up to a budget.

    Args:
        backward: Is told of them.

    Attributes:
        written: The gradients of the parameters, by their ``id``.
    """

    def __init__(self, backward: BackwardPass) -> None:
        self._backward, self._size = backward, 0
        self._held: list[tuple[Fused, Any, Tensor]] = []
        self.written: dict[int, Tensor] = {}

    def add(self, layer: Fused, node: Any, gradient: Tensor) -> None:
        """Have a layer wait, given the gradient of its node's output; or account all, if that is too much."""
        if self._held and self._held[-1][0].wide != layer.wide:
            self.finish()
        self._held.append((layer, layer.read and layer.read(node), gradient))
        self._size += layer.size
        if self._size > BUDGET:
            self.finish()

    def finish(self) -> None:
        """Account what waits."""
        if self._held:
            layers, given, gradients = zip(*self._held, strict=True)
            self._held, self._size = [], 0
            self.written.update(Together(layers).account(self._backward, given, gradients))


def _shaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    return t if t.shape == shape else t.reshape(shape)
