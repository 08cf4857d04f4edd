"""A linear classifier's loss for every switched-off feature: the public function, and what PyTorch needs to know."""

from __future__ import annotations

import torch
from torch import Tensor

from memloc_ext.ops import _errors
from memloc_ext.ops.grad_sqnorm import detached, result_dtype

_op = torch.ops.memloc_ext.linear_ablation_loss.default


def linear_ablation_loss(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, baseline: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return each example's cross-entropy and predicted class, for every feature switched off alone.

    The classifier is ``features @ weight.T + bias``. Its logits are computed once; a switched-off feature is subtracted
    from them, ``logits - weight[:, c] * (features[:, c] - baseline[c])``, in float64, so that nothing cancels in
    float32. The logits of all features are never stored together. The results are detached: gradients stop here.

    On CUDA nothing waits for the device, so targets are not checked there: one out of range has the loss NaN.

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
    bias = None if bias is None else detached(bias)
    tensors = (detached(features), detached(weight), bias, targets, detached(baseline))
    return _errors.call(_op, "linear_ablation_loss", *tensors)


@torch.library.register_fake("memloc_ext::linear_ablation_loss")
def _(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, baseline: Tensor
) -> tuple[Tensor, Tensor]:
    others = {"weight": weight, "targets": targets, "baseline": baseline} | ({} if bias is None else {"bias": bias})
    for name, other in others.items():
        if other.device != features.device:  # a meta tensor brings even real ones here
            raise ValueError(
                f"linear_ablation_loss: {name} must be on the device of features, {features.device}, got {other.device}"
            )
    loss = features.new_empty(features.shape[1], features.shape[0], dtype=result_dtype(features))
    return loss, torch.empty_like(loss, dtype=torch.int64)


# not differentiable: results of the operator itself do not ask for gradients either
torch.library.impl("memloc_ext::linear_ablation_loss", "Autograd", torch.library.fallthrough_kernel)
