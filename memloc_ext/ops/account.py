"""Many layers accounted in one call: what PyTorch needs to know about the operator, and its composition on CUDA."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memloc_ext.ops._checks import call_without_graph, check_devices, result_dtype
from memloc_ext.ops.grad_sqnorm import conv2d_grad_sqnorm, linear_grad_sqnorm
from memloc_ext.ops.grad_sqnorm_groups import Groups, conv2d_grad_sqnorm_groups, linear_grad_sqnorm_groups
from memloc_ext.ops.normalization_grads import normalization_grads

_op = torch.ops.memloc_ext.account.default
LINEAR, CONVOLUTION, LAYER_NORM, CHANNEL_NORM = range(4)
_NUMBERS = 15  # of a layer
_split: Any = torch.split_with_sizes_copy  # gradients are no views of each other


class Layer(NamedTuple):
    """What kind of layer it is, and where its examples are.

    Attributes:
        kind: ``LINEAR`` or ``LAYER_NORM``, of tokens; ``CONVOLUTION`` or ``CHANNEL_NORM`` (batch, group or instance
            normalisation), of ``[batch, channels, *]``.
        parameters: 1 for a weight, 2 for a bias, 3 for both.
        dim: Of tokens: index ``(i * batch + b) * after + j`` of this dimension belongs to example ``b``.
        before: Number of ``i``.
        after: Number of ``j``.
        own: Of tokens, the number of the last dimensions that are features; of ``CHANNEL_NORM`` the number of groups
            of channels with statistics of their own in each example, or 0 for statistics by channel.
        geometry: Kernel size, stride, padding and dilation of a convolution, two numbers each, and its groups.
        eps: Added to the second statistic of ``CHANNEL_NORM``, which is a variance; or -1: it is one by the deviation.
    """

    kind: int
    parameters: int
    dim: int = 0
    before: int = 1
    after: int = 1
    own: int = 1
    geometry: tuple[int, ...] = (1, 1, 1, 1, 0, 0, 1, 1, 1)
    eps: float = -1.0

    @property
    def convolution(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        """See `conv2d_grad_sqnorm`."""
        *pairs, groups = self.geometry
        return pairs[:2], pairs[2:4], pairs[4:6], pairs[6:], groups


class Geometry(NamedTuple):
    """Layers as the operator takes them."""

    numbers: list[int]
    eps: list[float]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Geometry:
        """Return that of some layers."""
        return cls([n for layer in layers for n in (*layer[:6], *layer.geometry)], [layer.eps for layer in layers])


def account(
    inputs: list[Tensor],
    grad_outputs: list[Tensor],
    statistics: list[Tensor],
    geometry: Geometry,
    groups: Groups | None,
    *,
    sums: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the squared norms of each example's gradient of the parameters of many layers, and the gradients' sums.

    On the CPU one call; elsewhere composed of the operators for one layer. Results are detached.

    Args:
        inputs: What each layer was given; of one that only adds a bias, ``grad_outputs``' own.
        grad_outputs: Gradients of the loss by what they returned, of the dtype of ``inputs``.
        statistics: Means and reciprocal deviations, or variances, of each normalisation, float64 for float64, else
            float32.
        geometry: What each layer is.
        groups: Of the examples, or None.
        sums: Whether to add up the gradients.

    Returns:
        ``[parameters, batch]`` squared norms, each layer's weight before its bias; squared norms ``[parameters]`` of
        the gradients' sums over all examples; those sums, and behind all of them the sums ``[groups.num, *]`` over each
        group. Features of several dimensions are flattened. Float64 for float64, else float32; off the CPU, sums of
        products over all examples have the dtype of ``inputs``.

    Raises:
        ValueError: If a shape or a number does not fit.
        TypeError: If a dtype does not.
    """
    ids, num = (None, 0) if groups is None else (groups.ids, groups.num)
    return call_without_graph(_op, "account", inputs, grad_outputs, statistics, *geometry, ids, num, sums)


def compose(
    inputs: list[Tensor],
    grad_outputs: list[Tensor],
    statistics: list[Tensor],
    geometry: list[int],
    eps: list[float],
    group_ids: Tensor | None,
    num_groups: int,
    sums: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return what the operator returns, by the operators for one layer."""
    groups = None if group_ids is None else Groups.trusted(group_ids, num_groups)
    found = _Found(groups, sums)
    remaining = iter(statistics)
    for x, g, layer in zip(inputs, grad_outputs, _layers(geometry, eps), strict=True):
        if layer.kind == CONVOLUTION:
            if layer.parameters & 1:
                found.weight(_convolution(x, g, layer, groups, sums))
            if layer.parameters & 2:
                found.rows(g.flatten(2).sum(2, dtype=result_dtype(g)))
        elif layer.kind == LINEAR:
            tokens = _tokens(g, layer)
            if layer.parameters & 1:
                found.weight(_linear(_tokens(x, layer), tokens, groups, sums))
            if layer.parameters & 2:
                found.rows(tokens.sum(1, dtype=result_dtype(g)))
        else:
            rows = _normalization(x, g, next(remaining), next(remaining), layer)
            for i, bit in enumerate((1, 2)):
                if layer.parameters & bit:
                    found.rows(rows[i])
    return found.results()


def _layers(geometry: list[int], eps: list[float]) -> Iterator[Layer]:
    for i, own in enumerate(eps):
        numbers = geometry[_NUMBERS * i : _NUMBERS * (i + 1)]
        kind, parameters, dim, before, after, features = numbers[:6]
        yield Layer(kind, parameters, dim, before, after, features, tuple(numbers[6:]), own)


def _tokens(t: Tensor, layer: Layer) -> Tensor:
    """Return ``[batch, positions, features]``."""
    t = t.flatten(-layer.own)
    batch = t.shape[layer.dim] // (layer.before * layer.after)
    first = t.unflatten(layer.dim, (layer.before, batch, layer.after)).movedim(layer.dim + 1, 0)
    return first.reshape(batch, prod(first.shape[1:-1]), t.shape[-1])


def _linear(x: Tensor, g: Tensor, groups: Groups | None, sums: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return norms, the sum over all examples and those over groups."""
    if groups is not None:
        norms, by_group = linear_grad_sqnorm_groups(x, g, groups)
        return norms, by_group.sum(0), by_group
    return linear_grad_sqnorm(x, g), g.flatten(0, 1).t() @ x.flatten(0, 1) if sums else None, None


def _convolution(
    x: Tensor, g: Tensor, layer: Layer, groups: Groups | None, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, g = (t.unsqueeze(2) if t.dim() == 3 else t for t in (x, g))
    kernel, stride, padding, dilation, channel_groups = layer.convolution
    geometry = (stride, padding, dilation)
    if groups is not None:
        norms, by_group = conv2d_grad_sqnorm_groups(x, g, groups, None, kernel, *geometry, channel_groups)
        return norms, by_group.sum(0), by_group
    total = None
    if sums:
        weight = x.new_empty(1).expand(g.shape[1], x.shape[1] // channel_groups, *kernel)  # only its shape is read
        settings = (*geometry, False, [0, 0], channel_groups, [False, True, False])
        total = torch.ops.aten.convolution_backward(g, x, weight, None, *settings)[1]
    return conv2d_grad_sqnorm(x, g, kernel, *geometry, channel_groups), total, None


def _normalization(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, layer: Layer) -> tuple[Tensor, ...]:
    """Return the gradients of scale and shift, ``[batch, channels]``."""
    if layer.kind == LAYER_NORM:
        x, g, mean, rstd = (_tokens(t, layer).transpose(1, 2) for t in (x, g, mean, rstd))
        return normalization_grads(x, g, mean, rstd)
    if layer.eps >= 0:
        rstd = (rstd + layer.eps).rsqrt()
    if layer.own:
        width = x.shape[1] // layer.own
        mean, rstd = (t.reshape(len(x), -1).repeat_interleave(width, 1) for t in (mean, rstd))
    mean, rstd = (t.reshape(-1, x.shape[1], 1) for t in (mean, rstd))
    x, g = (t.reshape(*t.shape[:2], prod(t.shape[2:])) for t in (x, g))
    return normalization_grads(x, g, mean, rstd)


class _Found:
    """What was found of each parameter; what has a row for each example waits for the others of its kind."""

    def __init__(self, groups: Groups | None, sums: bool) -> None:
        self._groups, self._sums = groups, sums
        self._sqnorm: list[Tensor | None] = []
        self._totals: list[Tensor | None] = []
        self._by_group: list[Tensor | None] = []
        self._rows: list[tuple[int, Tensor]] = []

    def weight(self, found: tuple[Tensor | None, Tensor | None, Tensor | None]) -> None:
        """Take note of a parameter's norms, the sum over all examples and those over groups."""
        sqnorm, total, by_group = found
        self._sqnorm.append(sqnorm)
        self._totals.append(total)
        self._by_group.append(by_group)

    def rows(self, rows: Tensor) -> None:
        """Take note of the gradients ``[batch, features]`` of a parameter."""
        self._rows.append((len(self._sqnorm), rows))
        self.weight((None, None, None))

    def results(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return what the operator returns."""
        if self._rows:
            self._add_rows([i for i, _ in self._rows], [rows for _, rows in self._rows])
        sqnorm = torch.stack([t for t in self._sqnorm if t is not None])
        totals = [t for t in self._totals if t is not None]
        if not totals:
            return sqnorm, sqnorm.new_empty(0), []
        norms = torch.stack(torch._foreach_norm(totals, 2, dtype=sqnorm.dtype))  # pyright: ignore
        return sqnorm, norms.square(), totals + [t for t in self._by_group if t is not None]

    def _add_rows(self, places: list[int], each: list[Tensor]) -> None:
        sizes = tuple(rows.shape[1] for rows in each)
        rows = torch.cat(each, 1)
        lengths = _lengths(sizes, rows.device)
        found = torch.segment_reduce(rows.t().square(), "sum", lengths=lengths, axis=0, unsafe=True).unbind()
        for place, norms in zip(places, found, strict=True):
            self._sqnorm[place] = norms
        if self._sums:
            for place, total in zip(places, _split(rows.sum(0), sizes), strict=True):
                self._totals[place] = total
        if self._groups is not None:
            sums = rows.new_zeros(self._groups.num, rows.shape[1]).index_add_(0, self._groups.ids, rows)
            for place, part in zip(places, _split(sums, sizes, 1), strict=True):
                self._by_group[place] = part


@functools.lru_cache(maxsize=256)  # a tensor that is made in each step would have a captured one wait
def _lengths(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device)


torch.library.impl("memloc_ext::account", "CUDA", compose)


@torch.library.register_fake("memloc_ext::account")
def _(
    inputs: list[Tensor],
    grad_outputs: list[Tensor],
    statistics: list[Tensor],
    geometry: list[int],
    eps: list[float],
    group_ids: Tensor | None,
    num_groups: int,
    sums: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    everything: dict[str, Any] = {f"inputs[{i}]": t for i, t in enumerate((*inputs, *grad_outputs, *statistics))}
    check_devices("account", **everything, group_ids=group_ids)
    shapes: list[tuple[int, ...]] = []
    batch = 0
    for x, g, layer in zip(inputs, grad_outputs, _layers(geometry, eps), strict=True):
        batch = g.shape[layer.dim] // (layer.before * layer.after)
        outputs = prod(g.shape[-layer.own :]) if layer.kind in (LINEAR, LAYER_NORM) else g.shape[1]
        weight: tuple[int, ...] = (outputs,)
        if layer.kind == LINEAR:
            weight = (outputs, x.shape[-1])
        elif layer.kind == CONVOLUTION:
            weight = (outputs, x.shape[1] // layer.geometry[-1], *layer.geometry[:2])
        shapes += [shape for shape, bit in ((weight, 1), ((outputs,), 2)) if layer.parameters & bit]
    first, dtype = grad_outputs[0], result_dtype(grad_outputs[0])
    kept = shapes if sums else []
    by_group = [(num_groups, *shape) for shape in kept] if group_ids is not None else []
    results = [first.new_empty(shape, dtype=dtype) for shape in (*kept, *by_group)]
    return first.new_empty(len(shapes), batch, dtype=dtype), first.new_empty(len(kept), dtype=dtype), results
