"""The checks of what `GradientAccountant.backward` is given."""

from __future__ import annotations

from torch import Tensor

from memloc_ext.ops import Groups

_REDUCTIONS = ("mean", "sum", "none")


def batch_of(
    loss: Tensor, loss_reduction: str, group_ids: Tensor | None, batch_size: int | None, seen: int | None, unread: str
) -> int:
    """Return the number of examples, ``seen`` if not told; checks what it depends on. ``unread``: other inputs."""
    if loss_reduction not in _REDUCTIONS:
        raise ValueError(f"GradientAccountant: loss_reduction must be mean, sum or none, got {loss_reduction!r}")
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError(
            "GradientAccountant: loss must be a tensor that depends on a parameter that requires a gradient"
        )
    if (loss.numel() == 1 and loss.dim() == 0) == (loss_reduction == "none"):
        rule = "one loss per example, [batch, *]," if loss_reduction == "none" else "a scalar"
        raise ValueError(
            f"GradientAccountant: loss must be {rule} for loss_reduction={loss_reduction!r}, got {list(loss.shape)}"
        )
    sizes = {
        "batch_size": batch_size,
        "group_ids": group_ids.numel() if isinstance(group_ids, Tensor) else None,
        "loss": len(loss) if loss_reduction == "none" else None,
    }
    known = {name: size for name, size in sizes.items() if size is not None}
    if len(set(known.values())) > 1:
        raise ValueError(f"GradientAccountant: sizes of the batch must agree, got {known}")
    batch = batch_size if batch_size is not None else next(iter(known.values()), None if unread else seen)
    if batch is None and unread:
        raise ValueError(
            "GradientAccountant: the model must be called with tensors, or tuples, lists, mappings or dataclasses of "
            f"them, to tell the examples apart, got {unread}; or give batch_size: then every layer takes a pass per "
            "example"
        )
    if batch is None:
        raise ValueError(
            "GradientAccountant: the forward pass must run inside the with, where the first layer's input tells the "
            "size of the batch; no layer was seen there, so give batch_size"
        )
    return batch


def groups_of(
    loss: Tensor, group_ids: Tensor | None, num_groups: int | None, batch: int, exact_groups: bool
) -> Groups | None:
    """Return the groups, checked."""
    if group_ids is None:
        for name, value in (("num_groups", num_groups), ("exact_groups", exact_groups or None)):
            if value is not None:
                raise ValueError(f"GradientAccountant: {name} needs group_ids, got None")
        return None
    if isinstance(group_ids, Tensor) and (group_ids.shape != (batch,) or group_ids.device != loss.device):
        raise ValueError(
            f"GradientAccountant: group_ids must be [{batch}] on {loss.device}, got {list(group_ids.shape)} on "
            f"{group_ids.device}"
        )
    try:
        if num_groups is None:
            num_groups = int(group_ids.max()) + 1 if batch else 1
        return Groups(group_ids, num_groups)
    except (TypeError, ValueError) as error:
        raise type(error)(f"GradientAccountant: {error}") from None
