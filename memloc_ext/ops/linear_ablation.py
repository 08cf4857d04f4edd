"""A switched-off channel behind the next linear layer: the public function, and what PyTorch needs to know."""

from __future__ import annotations

import torch
from torch import Tensor

from memloc_ext.ops import _errors
from memloc_ext.ops._values import check_channels
from memloc_ext.ops.grad_sqnorm import detached

_op = torch.ops.memloc_ext.linear_ablation.default


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
    r"""Return a linear layer's result for many variants of its input, each of which has one feature changed.

    ``y[k, b] = act(scale * (output[b] + change[k, b, ..., None] * weight[:, channels[k]]) + shift + residual)``. What
    follows the layer, gradients, dtypes, strides and devices are as in `memloc_ext.ops.conv2d_ablation`.

    Args:
        output: What the layer returned for the unchanged input, bias included, ``[batch, *, out]``.
        change: New minus old values of the changed feature, ``[variants, batch, *]``.
        weight: The layer's weight, ``[out, in]``.
        channels: The feature that each variant changes, ``[variants]``, int64, in ``[0, in)``.
        scale: A factor per output, ``[out]``, or None for 1.
        shift: A term per output, ``[out]``, or None for 0.
        residual: A term per result, shaped like ``output`` where variants share it, else like the result; or None.
        relu: Whether a ReLU follows.
        examples: As of `memloc_ext.ops.conv2d_ablation`.

    Returns:
        ``[variants, batch, *, out]``, contiguous.

    Raises:
        ValueError: If a shape, channel or device breaks the above.
        TypeError: If a dtype or a type does.

    Source: the neuron probe of Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, which switches
    off one channel at a time.
    """
    if isinstance(weight, Tensor) and weight.dim() == 2:
        check_channels("linear_ablation", channels, weight.shape[1])
    if isinstance(output, Tensor) and output.dim() >= 2:
        check_channels("linear_ablation", examples, output.shape[0], "examples")
    return call(output, change, weight, channels, scale, shift, residual, relu, examples)


def call(*arguments: Tensor | bool | None) -> Tensor:
    """Run the operator on channels that are known to exist: the rest is checked without a wait."""
    return _errors.call(_op, "linear_ablation", *(detached(t) if isinstance(t, Tensor) else t for t in arguments))


@torch.library.register_fake("memloc_ext::linear_ablation")
def _(output: Tensor, change: Tensor, weight: Tensor, channels: Tensor, *_: object) -> Tensor:
    for tensor in (change, weight, channels):
        if tensor.device != output.device:
            raise ValueError(f"linear_ablation: tensors must be on {output.device} like output, got {tensor.device}")
    return output.new_empty(*change.shape, output.shape[-1])


def _no_derivative(*_: object) -> None:
    raise NotImplementedError("linear_ablation: there is no derivative; detach the arguments")


torch.library.register_autograd("memloc_ext::linear_ablation", _no_derivative)
