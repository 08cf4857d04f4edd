"""Rows with channels switched off: the public functions, and what PyTorch needs to know about the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memloc_ext.ops._checks import call, check_devices, readable

_op = torch.ops.memloc_ext.ablate_channels.default
_op_ = torch.ops.memloc_ext.ablate_channels_.default


def ablate_channels(
    input: Tensor, offsets: Tensor, channels: Tensor, baseline: Tensor | None = None, channel_dim: int = 1
) -> Tensor:
    r"""Return rows that each have channels of their own switched off.

    Row ``r`` of the result is row ``r % batch`` of the input, with channels ``channels[offsets[r] : offsets[r + 1]]``
    set to their baseline at every position. More rows than the batch has fork it: ``K * batch`` rows hold ``K``
    variants of it, one after the other. A channel may be named twice.

    Differentiable in ``input``, to any order: the gradient is zero where a channel is switched off, and summed over
    the forks. ``baseline`` is taken for a constant.

    On CUDA offsets and channels are read back once to check them, which waits for the device;
    ``torch.ops.memloc_ext`` does not, and ignores what is out of range.

    Args:
        input: Activations, ``[batch, channels, ...]`` (or with the channels at ``channel_dim``), float16, bfloat16,
            float32 or float64, any strides.
        offsets: Where each row's channels begin and end, ``[rows + 1]``, int64; from 0 to ``len(channels)``, not
            decreasing. ``rows`` is a multiple of ``batch``, and not 0 unless that is.
        channels: The channels, row after row, int64, each in ``[0, channels of input)``.
        baseline: The value that each channel is set to, ``[channels of input]``, of the dtype of ``input``; None for 0.
        channel_dim: The dimension of ``input`` that holds the channels; not 0.

    Returns:
        ``[rows, channels, ...]``: rows outermost, each with the memory format of the input's.

    Raises:
        ValueError: If a shape, device, offset, channel or ``channel_dim`` breaks the above.
        TypeError: If a dtype or a type does.

    Source: the neuron probe of Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, which switches
    channels off until the prediction flips.
    """
    return _call(_op, "ablate_channels", input, offsets, channels, baseline, channel_dim)


def ablate_channels_(
    input: Tensor, offsets: Tensor, channels: Tensor, baseline: Tensor | None = None, channel_dim: int = 1
) -> Tensor:
    """Switch channels off in place: as `ablate_channels` with as many rows as ``input`` has, which is returned.

    Only what changes is written. ``input`` must not be expanded. No gradient is recorded, so it must not require one
    while gradients are.

    Raises:
        ValueError: If a shape, device, offset, channel or ``channel_dim`` breaks the above, or input requires a
            gradient.
        TypeError: If a dtype or a type does.
    """
    _call(_op_, "ablate_channels_", input, offsets, channels, baseline, channel_dim)
    return input


def _call(operator: Any, name: str, input: Tensor, offsets: Tensor, channels: Tensor, *rest: Any) -> Any:
    if readable(offsets) and readable(channels) and offsets.dim() == 1 and offsets.numel() > 0:
        steps = offsets.diff()
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != channels.numel() or (steps.numel() > 0 and int(steps.min()) < 0):
            raise ValueError(f"{name}: offsets must go from 0 to {channels.numel()} and not decrease")
        channel_dim = rest[-1]
        if isinstance(input, Tensor) and -input.dim() <= channel_dim < input.dim() and channels.numel() > 0:
            count = input.shape[channel_dim]
            low, high = (int(bound) for bound in torch.stack(torch.aminmax(channels)).tolist())
            if low < 0 or high >= count:
                raise ValueError(f"{name}: channels must be in [0, {count}), got {low if low < 0 else high}")
    return call(operator, name, input, offsets, channels, *rest)


@torch.library.register_fake("memloc_ext::ablate_channels")
def _(input: Tensor, offsets: Tensor, channels: Tensor, baseline: Tensor | None = None, channel_dim: int = 1) -> Tensor:
    check_devices("ablate_channels", input=input, offsets=offsets, channels=channels)
    if input.shape[0] == 0:
        return torch.empty_like(input)
    row = torch.empty_like(input[0])
    return row.new_empty_strided((offsets.shape[0] - 1, *row.shape), (row.numel(), *row.stride()))


@torch.library.register_fake("memloc_ext::ablate_channels_")
def _(input: Tensor, offsets: Tensor, channels: Tensor, baseline: Tensor | None = None, channel_dim: int = 1) -> None:
    check_devices("ablate_channels_", input=input, offsets=offsets, channels=channels)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, offsets, channels, _, ctx.channel_dim = inputs
    ctx.batch = input.shape[0]
    ctx.save_for_backward(offsets, channels)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    kept = _op(grad, *ctx.saved_tensors, None, ctx.channel_dim)
    forks = kept.shape[0] // max(1, ctx.batch)
    return (kept if forks <= 1 else kept.unflatten(0, (forks, ctx.batch)).sum(0)), None, None, None, None


torch.library.register_autograd("memloc_ext::ablate_channels", _backward, setup_context=_setup_context)


def _refuse_gradients(input: Tensor, *arguments: Any) -> None:
    if torch.is_grad_enabled() and input.requires_grad:
        raise RuntimeError("ablate_channels_: input must not require a gradient, which would not be recorded")
    with torch._C._AutoDispatchBelowAutograd():
        _op_(input, *arguments)
    torch.autograd.graph.increment_version(input)


torch.library.impl("memloc_ext::ablate_channels_", "Autograd", _refuse_gradients)
