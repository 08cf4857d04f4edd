"""Channel saliency: the public function, and what PyTorch needs to know about the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memloc_ext.ops._checks import call, check_devices, result_dtype

_op = torch.ops.memloc_ext.channel_saliency.default


def channel_saliency(activation: Tensor, grad: Tensor, channel_dim: int = 1) -> Tensor:
    r"""Return the *sum* over positions of ``activation * grad`` for each example and channel; no product is stored.

    With the gradient of a loss by the activation it is, to first order, how much the loss falls when the channel is
    switched off. If the loss is a mean over the batch, so is its gradient: multiply by the batch size for each
    example's own loss. Runs on the CPU and on CUDA; the same bits on every call. Differentiable in both, to any order.

    Args:
        activation: ``[batch, channels, ...]`` (or with the channels at ``channel_dim``), float16, bfloat16, float32 or
            float64; any strides, channels-last ones are read where they lie.
        grad: Of the same shape, dtype and device.
        channel_dim: The dimension that holds the channels; not 0.

    Returns:
        ``[batch, channels]``; float64 for float64 inputs, else float32. 16-bit products are formed in float32. Without
        positions the sums are 0.

    Raises:
        ValueError: If a shape, device or ``channel_dim`` breaks the above.
        TypeError: If a dtype or a type does.

    Source: Molchanov et al., "Pruning convolutional neural networks for resource efficient inference", ICLR 2017 (the
    first-order criterion).
    """
    return call(_op, "channel_saliency", activation, grad, channel_dim)


@torch.library.register_fake("memloc_ext::channel_saliency")
def _(activation: Tensor, grad: Tensor, channel_dim: int = 1) -> Tensor:
    check_devices("channel_saliency", activation=activation, grad=grad)
    sizes = activation.shape[0], activation.shape[channel_dim]
    return activation.new_empty(sizes, dtype=result_dtype(activation))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    activation, grad, ctx.channel_dim = inputs
    by_activation, by_grad = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad if by_activation else None, activation if by_grad else None)


def _backward(ctx: Any, by_sum: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    def product(other: Tensor | None) -> Tensor | None:
        if other is None:
            return None
        shape = [1] * other.dim()
        shape[0], shape[ctx.channel_dim] = by_sum.shape
        return (by_sum.reshape(shape) * other).to(other.dtype)

    grad, activation = ctx.saved_tensors
    return product(grad), product(activation), None


torch.library.register_autograd("memloc_ext::channel_saliency", _backward, setup_context=_setup_context)
