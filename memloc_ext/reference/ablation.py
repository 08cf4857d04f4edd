"""Switched-off channels, spelled out: the whole layer again on the changed input, and rows set to a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def conv2d_ablation(
    output: Tensor,
    change: Tensor,
    weight: Tensor,
    channels: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    examples: Tensor | None = None,
) -> Tensor:
    """Return every variant's result from a convolution of its own; as `torch.ops.memloc_ext.conv2d_ablation`."""
    results = output.new_empty(len(channels), change.shape[1], *output.shape[1:])
    for k, channel in enumerate(channels.tolist()):
        one = weight[:, channel : channel + 1]
        delta = functional.conv2d(change[k, :, None], one, None, tuple(stride), tuple(padding), tuple(dilation))
        per_output = (-1, 1, 1)
        row = _rows(k, examples)
        rest = residual[row] if residual is not None and residual.dim() == output.dim() else residual
        results[k] = _finish(output[row] + delta, _shaped(scale, per_output), _shaped(shift, per_output), relu, rest, k)
    return results


def linear_ablation(
    output: Tensor,
    change: Tensor,
    weight: Tensor,
    channels: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    examples: Tensor | None = None,
) -> Tensor:
    """Return every variant's result from an outer product; as `torch.ops.memloc_ext.linear_ablation`."""
    results = output.new_empty(*change.shape, output.shape[-1])
    for k, channel in enumerate(channels.tolist()):
        row = _rows(k, examples)
        rest = residual[row] if residual is not None and residual.dim() == output.dim() else residual
        results[k] = _finish(output[row] + change[k, ..., None] * weight[:, channel], scale, shift, relu, rest, k)
    return results


def ablate_channels(
    input: Tensor, offsets: Tensor, channels: Tensor, baseline: Tensor | None = None, channel_dim: int = 1
) -> Tensor:
    """Return the rows one by one; arguments as in `memloc_ext.ops.ablate_channels`."""
    rows = []
    for r, (begin, end) in enumerate(zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True)):
        row = input.movedim(channel_dim, 1)[r % len(input)].clone()
        for channel in channels[begin:end].tolist():
            row[channel] = 0 if baseline is None else baseline[channel]
        rows.append(row)
    return torch.stack(rows).movedim(1, channel_dim) if rows else input.clone()


def _shaped(tensor: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    return tensor if tensor is None else tensor.reshape(shape)


def _rows(variant: int, examples: Tensor | None) -> slice:
    """Return the rows of the unchanged output that a variant starts from."""
    return slice(None) if examples is None else slice(int(examples[variant]), int(examples[variant]) + 1)


def _finish(
    value: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, residual: Tensor | None, variant: int
) -> Tensor:
    if scale is not None:
        value = value * scale
    if shift is not None:
        value = value + shift
    if residual is not None:
        value = value + (residual[variant] if residual.dim() > value.dim() else residual)
    return torch.relu(value) if relu else value
