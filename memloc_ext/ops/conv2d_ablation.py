"""A switched-off channel behind the next convolution: the public function, and what PyTorch needs to know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memloc_ext.ops import _errors
from memloc_ext.ops._values import check_channels
from memloc_ext.ops.grad_sqnorm import detached

_op = torch.ops.memloc_ext.conv2d_ablation.default


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

    The result is detached: there is no derivative. On CUDA the channels are read back once to check them, which waits
    for the device; ``torch.ops.memloc_ext`` does not, and takes a channel that does not exist for one without weights
    and an example that does not for the first.

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

    Source: the neuron probe of Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, which switches
    off one channel at a time.
    """
    if isinstance(weight, Tensor) and weight.dim() == 4:
        check_channels("conv2d_ablation", channels, weight.shape[1])
    if isinstance(output, Tensor) and output.dim() == 4:
        check_channels("conv2d_ablation", examples, output.shape[0], "examples")
    return call(output, change, weight, channels, stride, padding, dilation, scale, shift, residual, relu, examples)


def call(
    output: Tensor,
    change: Tensor,
    weight: Tensor,
    channels: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *epilogue: Tensor | bool | None,
) -> Tensor:
    """Run the operator on channels that are known to exist: the rest is checked without a wait."""
    tensors = [detached(t) for t in (output, change, weight, channels)]
    rest = [detached(t) if isinstance(t, Tensor) else t for t in epilogue]
    return _errors.call(_op, "conv2d_ablation", *tensors, list(stride), list(padding), list(dilation), *rest)


@torch.library.register_fake("memloc_ext::conv2d_ablation")
def _(output: Tensor, change: Tensor, weight: Tensor, channels: Tensor, *_: object) -> Tensor:
    for tensor in (change, weight, channels):
        if tensor.device != output.device:
            raise ValueError(f"conv2d_ablation: tensors must be on {output.device} like output, got {tensor.device}")
    return output.new_empty(channels.shape[0], change.shape[1], *output.shape[1:])


def _no_derivative(*_: object) -> None:
    raise NotImplementedError("conv2d_ablation: there is no derivative; detach the arguments")


torch.library.register_autograd("memloc_ext::conv2d_ablation", _no_derivative)
