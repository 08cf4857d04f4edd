"""Channel saliency, spelled out: a product, and its sum over positions."""

from __future__ import annotations

from torch import Tensor


def channel_saliency(activation: Tensor, grad: Tensor, channel_dim: int = 1) -> Tensor:
    """Return the sums, ``[batch, channels]``; arguments as in `memloc_ext.ops.channel_saliency`."""
    products = (activation * grad).movedim(channel_dim, 1)
    return products.flatten(2).sum(2) if products.dim() > 2 else products
