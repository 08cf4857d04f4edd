"""The loss of a linear classifier for every switched-off feature, spelled out: one forward pass per feature."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear_ablation_loss(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, baseline: Tensor
) -> tuple[Tensor, Tensor]:
    """Return losses and predicted classes; arguments as in `torch.ops.memloc_ext.linear_ablation_loss`."""
    losses = features.new_empty(features.shape[1], features.shape[0])
    predicted = torch.empty_like(losses, dtype=torch.int64)
    for c in range(features.shape[1]):
        without = features.clone()
        without[:, c] = baseline[..., c]
        logits = functional.linear(without, weight, bias)
        losses[c] = functional.cross_entropy(logits, targets, reduction="none")
        predicted[c] = logits.argmax(1)
    return losses, predicted
