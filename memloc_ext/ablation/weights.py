"""The weights of a convolution or linear layer: their gradients by example, and changes of a few of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.ablation.interpreter import Graph
from memloc_ext.ablation.layers import Layer, find_layer
from memloc_ext.ablation.sites import Site, producer

CHANNELS = 2  # the dimension of a layer's inputs and outputs that holds them, behind rows and a recorded batch
_CACHED = 1 << 26  # bytes of patches at a time


@dataclass(frozen=True)
class Filters:
    """The weights of a layer.

    Attributes:
        layer: The layer alone, without what follows it.
        parameter: Name of its weight in the model.
        single: Whether its units are single weights, numbered as in the flattened weight, or whole filters, numbered as
            the output channels.
    """

    layer: Layer
    parameter: str
    single: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The number of units, and that of the weights of each."""
        weight = self.layer.weight
        return (weight.numel(), 1) if self.single else (len(weight), weight[0].numel())

    def outputs(self, units: Tensor) -> Tensor:
        """Return the output channel of each unit."""
        return units // self.layer.weight[0].numel() if self.single else units

    def weights(self) -> Tensor:
        """Return the weights by unit."""
        return self.layer.weight.reshape(self.shape)

    def added(self, x: Tensor, rows: Tensor, units: Tensor, changes: Tensor) -> Tensor:
        """Return what changed units add to their output channels, ``[units, *positions]``; differentiable in ``x``.

        Args:
            x: The layer's input, ``[rows, *shape]``.
            rows: Of each unit, in rising order.
            units: Numbers.
            changes: What is added to their weights, ``[units, weights]``.
        """
        x = x.movedim(CHANNELS, 1)
        positions = self._windows(x[:1]).shape[2:-2]
        if self.single:
            _, channels, *tap = torch.unravel_index(units, self.layer.weight.shape)
            windows = self._windows(x[rows, channels])
            if tap:
                windows = windows.movedim((-2, -1), (1, 2))[(torch.arange(len(units), device=x.device), *tap)]
            return windows.reshape(len(units), *positions) * changes.reshape(-1, *[1] * len(positions))
        some, place, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
        within = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[place]
        most = int(counts.max()) if len(counts) else 0
        parts = []
        step = max(1, _CACHED // max(1, x.element_size() * changes.shape[1] * (positions.numel() + most)))
        for begin in range(0, len(some), step):
            here = (place >= begin) & (place < begin + step)
            patches = self._patches(x[some[begin : begin + step]])
            filters = changes.new_zeros(len(patches), most, changes.shape[1])
            filters[place[here] - begin, within[here]] = changes[here]
            parts.append((filters @ patches.mT)[place[here] - begin, within[here]])
        return torch.cat(parts).unflatten(1, positions) if parts else x.new_zeros(0, *positions)

    def gradients(self, x: Tensor, grad: Tensor, copies: int) -> Tensor:
        """Return the gradient with respect to the weight, ``[examples, out, weights of a filter]``.

        Args:
            x: The layer's input, ``[examples * copies, *shape]``.
            grad: With respect to its output, likewise.
            copies: Rows of each example, over which the gradient is summed.
        """
        x, grad = (t.movedim(CHANNELS, 1).unflatten(0, (-1, copies)) for t in (x, grad))
        grad = grad.flatten(3)
        filters = self.layer.weight[0].numel()
        total = grad.new_zeros(len(x), grad.shape[2], filters)
        step = max(1, _CACHED // max(1, len(x) * filters * grad.shape[3] * x.element_size()))
        for begin in range(0, copies, step):
            some = x[:, begin : begin + step]
            patches = self._patches(some.flatten(0, 1)).reshape(len(x), -1, filters)
            total.baddbmm_(grad[:, begin : begin + step].transpose(1, 2).flatten(2), patches)
        return total

    def _windows(self, x: Tensor) -> Tensor:
        """Return what each weight of a filter meets at each position, ``[*, *positions, *kernel]``, of ``[*, *]``."""
        if not self.layer.is_convolution:
            return x[..., None, None]
        stride, padding, dilation = self.layer.geometry()
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        for dim, size in zip((-2, -1), self.layer.weight.shape[2:], strict=True):
            x = x.unfold(dim - (dim == -1), dilation[dim] * (size - 1) + 1, stride[dim])
        return x[..., :: dilation[0], :: dilation[1]]

    def _patches(self, x: Tensor) -> Tensor:
        """Return the same in the order of a filter's weights, ``[rows, positions, weights]``."""
        return self._windows(x).movedim(1, -3).flatten(-3).flatten(1, -2)


def find_filters(model: nn.Module, graph: Graph, sites: Sequence[Site], single: bool) -> list[Filters]:
    """Return the weights of the convolution or linear layer that computes each site.

    Raises:
        ValueError: If there is none, its weight is no parameter of the model, or the convolution is grouped,
            transposed or not of images.
    """
    found, recording = [], graph.recording
    for site in sites:
        call = producer(recording, site)
        layer = find_layer(recording, graph.readers, recording.writer()[call.outputs[0]], set(), call.outputs)
        if layer is None:
            raise ValueError(f"weights: the convolution of {site.name} must be a plain 2-D one without groups")
        weight = layer.weight
        names = [
            name
            for name, p in model.named_parameters()
            if p.data_ptr() == weight.data_ptr() and (p.shape, p.stride()) == (weight.shape, weight.stride())
        ]
        if not names:
            raise ValueError(f"weights: those that compute {site.name} are no parameter of the model")
        found.append(Filters(layer, names[0], single))
    return found


@dataclass(frozen=True)
class WeightChange:
    """What is added to some neighbouring weights.

    Attributes:
        parameter: Name in the model.
        first: Index of the first of them in the flattened parameter.
        values: Added to it and those that follow, one each.
    """

    parameter: str
    first: int
    values: Tensor


class AppliedChanges:
    """Weights that are changed by a ``with``, and put back at its end, bit for bit.

    Args:
        model: To change; not before the ``with`` or the `AppliedChanges.copy`.
        changes: To make, in this order.

    Raises:
        ValueError: If the model has no such parameter, or it has too few weights.
    """

    def __init__(self, model: nn.Module, changes: Sequence[WeightChange]) -> None:
        self.model, self.changes = model, list(changes)
        parameters = dict(model.named_parameters())
        for change in self.changes:
            size = parameters[change.parameter].numel() if change.parameter in parameters else 0
            if change.first < 0 or change.first + len(change.values) > size:
                raise ValueError(
                    f"changes must be of the model's weights, got {len(change.values)} from {change.first} on in "
                    f"{change.parameter} with {size}"
                )
        self._old: list[tuple[Tensor, tuple[Tensor, ...], Tensor]] = []

    def __enter__(self) -> nn.Module:
        """Change the weights and return the model."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for change in self.changes:
                weight = parameters[change.parameter]
                flat = torch.arange(change.first, change.first + len(change.values), device=weight.device)
                index = torch.unravel_index(flat, weight.shape)
                old = weight[index]
                self._old.append((weight, index, old))
                weight.index_put_(index, old + change.values.to(weight))
        return self.model

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Put the old weights back."""
        with torch.no_grad():
            while self._old:
                weight, index, old = self._old.pop()
                weight.index_put_(index, old)

    def copy(self) -> nn.Module:
        """Return a copy of the model with the weights changed for good."""
        return AppliedChanges(copy.deepcopy(self.model), self.changes).__enter__()
