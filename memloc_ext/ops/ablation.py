"""A switched-off channel behind the next layer: ``conv2d_ablation``, ``linear_ablation`` and ``linear_ablation_loss``.

These functions are for the package; users have ``torch.ops.memloc_ext``, with the same arguments. Results are detached:
there is no derivative. On CUDA nothing waits for the device, so values are not checked there: a channel that does not
exist has no weights, an example that does not is the first, and a target out of range has the loss NaN.

Source: the neuron probe of Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, which switches off
one channel at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from memloc_ext.ops._checks import call_without_graph, check_devices, no_derivative, result_dtype

_ops = torch.ops.memloc_ext


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
    r"""Return a convolution's result for many variants of its input, each of which has one channel changed.

    ``y[k, b] = act(scale * (output[b] + conv(change[k, b], weight[:, channels[k]])) + shift + residual)``: a
    convolution is linear, so a changed channel goes through one input channel of the filters, and the rest of the
    result is that of the unchanged input. Normalisation in evaluation mode, a residual sum and a ReLU that follow are
    applied before the result is written, once. What is not finite in ``output`` stays so.

    Args:
        output: What the convolution (one group) returned for the unchanged input, bias included, ``[batch, out, rows,
            columns]``; float16, bfloat16, float32 or float64.
        change: New minus old values of the changed channel, ``[variants, batch, height, width]``.
        weight: The convolution's filters, ``[out, in, kernel height, kernel width]``.
        channels: The input channel that each variant changes, ``[variants]``, int64, in ``[0, in)``.
        stride: Two numbers, at least 1.
        padding: Two numbers, at least 0; the padding is zeros.
        dilation: Two numbers, at least 1.
        scale: A factor per output, ``[out]``, or None for 1.
        shift: A term per output, ``[out]``, or None for 0.
        residual: A term per result, shaped like ``output`` where variants share it, else like the result; or None.
        relu: Whether a ReLU follows.
        examples: Gives each variant one row only, that starts from this row of ``output`` (and of a shared
            ``residual``): ``[variants]``, int64, in ``[0, batch)``; ``change`` and the result then have a batch of 1.

    All tensors but ``channels`` and ``examples`` have the dtype of ``output``, and all its device; any strides,
    copied where they are not dense. 16-bit values are computed in float32.

    Returns:
        ``[variants, batch, out, rows, columns]``, contiguous.

    Raises:
        ValueError: If a shape, number, channel or device breaks the above.
        TypeError: If a dtype or a type does.
    """
    geometry = list(stride), list(padding), list(dilation)
    epilogue = scale, shift, residual, relu, examples
    arguments = output, change, weight, channels, *geometry, *epilogue
    return call_without_graph(_ops.conv2d_ablation.default, "conv2d_ablation", *arguments)


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

    ``y[k, b] = act(scale * (output[b] + change[k, b, ..., None] * weight[:, channels[k]]) + shift + residual)``.
    Arguments and errors are as of `conv2d_ablation`, but for the shapes: ``output`` is ``[batch, *, out]``, ``change``
    ``[variants, batch, *]``, and ``weight`` ``[out, in]``.

    Returns:
        ``[variants, batch, *, out]``, contiguous.
    """
    arguments = output, change, weight, channels, scale, shift, residual, relu, examples
    return call_without_graph(_ops.linear_ablation.default, "linear_ablation", *arguments)


def linear_ablation_loss(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, baseline: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return each example's cross-entropy and predicted class, for every feature switched off alone.

    The classifier is ``features @ weight.T + bias``. Its logits are computed once; a switched-off feature is subtracted
    from them, ``logits - weight[:, c] * (features[:, c] - baseline[c])``, in float64, so that nothing cancels in
    float32. The logits of all features are never stored together.

    Args:
        features: What the last layer is given, ``[batch, features]``; float16, bfloat16, float32 or float64, any
            strides.
        weight: ``[classes, features]``, of the same dtype.
        bias: ``[classes]`` or None, likewise.
        targets: Class of each example, ``[batch]``, int64 in ``[0, classes)``.
        baseline: What a switched-off feature is replaced by, ``[features]`` or ``[batch, features]``, of the dtype of
            ``features``; zeros for "off".

    Returns:
        The loss in nats, ``[features, batch]``: one value per feature and example, neither summed nor averaged; float64
        for float64 inputs, else float32. And the class with the largest logit, the first of several, ``[features,
        batch]``, int64. As in a forward pass, a feature that is not finite harms no result but those that keep it,
        whose loss is NaN.

    Raises:
        ValueError: If a shape, device or target breaks the above.
        TypeError: If a dtype or a type does.
    """
    arguments = features, weight, bias, targets, baseline
    return call_without_graph(_ops.linear_ablation_loss.default, "linear_ablation_loss", *arguments)


@torch.library.register_fake("memloc_ext::conv2d_ablation")
def _(output: Tensor, change: Tensor, weight: Tensor, channels: Tensor, *_: object) -> Tensor:
    check_devices("conv2d_ablation", output=output, change=change, weight=weight, channels=channels)
    return output.new_empty(channels.shape[0], change.shape[1], *output.shape[1:])


@torch.library.register_fake("memloc_ext::linear_ablation")
def _(output: Tensor, change: Tensor, weight: Tensor, channels: Tensor, *_: object) -> Tensor:
    check_devices("linear_ablation", output=output, change=change, weight=weight, channels=channels)
    return output.new_empty(*change.shape, output.shape[-1])


@torch.library.register_fake("memloc_ext::linear_ablation_loss")
def _(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, baseline: Tensor
) -> tuple[Tensor, Tensor]:
    name = "linear_ablation_loss"
    check_devices(name, features=features, weight=weight, targets=targets, baseline=baseline, bias=bias)
    loss = features.new_empty(features.shape[1], features.shape[0], dtype=result_dtype(features))
    return loss, torch.empty_like(loss, dtype=torch.int64)


for _name in ("conv2d_ablation", "linear_ablation"):
    torch.library.register_autograd(f"memloc_ext::{_name}", functools.partial(no_derivative, _name))
# a pair of results, which do not ask for gradients at all
torch.library.impl("memloc_ext::linear_ablation_loss", "Autograd", torch.library.fallthrough_kernel)
