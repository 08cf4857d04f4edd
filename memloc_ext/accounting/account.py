"""Arguments and result of a backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memloc_ext.accounting.backward_pass import BackwardPass
from memloc_ext.accounting.contributions import accumulated
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.ops import Groups

_REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Account:
    """What one backward pass tells of its examples. Its tensors take no part in autograd.

    Attributes:
        sqnorm: Parameter name to ``[batch]``: squared L2 norm of the gradient of each example's *own* loss, whatever
            the loss of the batch was; float64 for a float64 parameter, else float32. Zeros if the loss does not
            depend on the parameter.
        group_grad: Parameter name to ``[num_groups, *shape]``: what each group of examples adds to the gradient of the
            loss *as it was given*, so that their sum is the gradient of the batch; a mean loss divides by the size
            of the batch, not of the group. Of the dtypes of ``sqnorm``. Empty without ``group_ids``.
    """

    sqnorm: dict[str, Tensor]
    group_grad: dict[str, Tensor]

    @property
    def total_sqnorm(self) -> Tensor:
        """Squared L2 norm of each example's own gradient over all parameters, ``[batch]``."""
        first, *others = self.sqnorm.values()
        return sum((norm.to(first.device) for norm in others), start=first)

    @property
    def norms(self) -> Tensor:
        """L2 norm of each example's own gradient over all parameters, ``[batch]``."""
        return self.total_sqnorm.sqrt()


def account_of(
    tracer: Tracer, backward: BackwardPass, groups: Groups | None, loss_reduction: str, example_weights: Tensor | None
) -> Account:
    """Return what a backward pass told of every parameter that requires a gradient; zeros where it told nothing."""
    sqnorm, group_grad = {}, {}
    for name, p in tracer.named_parameters():
        if not p.requires_grad:
            continue
        dtype, key = accumulated(p.dtype), id(p)
        norms = backward.sqnorm.get(key)
        sqnorm[name] = torch.zeros(backward.batch, dtype=dtype.to_real(), device=p.device) if norms is None else norms
        if groups is not None:
            sums = backward.group_grad.get(key)
            shape = (groups.num, *p.shape)
            group_grad[name] = torch.zeros(shape, dtype=dtype, device=p.device) if sums is None else sums
    if example_weights is not None:
        sqnorm = {name: _divided(norm, example_weights.to(norm.device)) for name, norm in sqnorm.items()}
    elif loss_reduction == "mean" and sqnorm:
        scaled = torch._foreach_mul(list(sqnorm.values()), backward.batch**2)  # pyright: ignore[reportPrivateImportUsage]
        sqnorm = dict(zip(sqnorm, scaled, strict=True))
    return Account(sqnorm, group_grad)


def _divided(norm: Tensor, factors: Tensor) -> Tensor:
    """Divide by the squares of factors, whose range float64 has room for; where a factor is 0, so is the norm."""
    wide = factors.double()
    return torch.where(wide > 0, norm / wide / wide, 0).to(norm.dtype)


def batch_of(
    tracer: Tracer, loss: Tensor, loss_reduction: str, group_ids: Tensor | None, batch_size: int | None
) -> int:
    """Return the number of examples, that of the model's inputs if not told; checks what it depends on."""
    if loss_reduction not in _REDUCTIONS:
        raise ValueError(f"GradientAccountant: loss_reduction must be mean, sum or none, got {loss_reduction!r}")
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError(
            "GradientAccountant: loss must be a tensor that depends on a parameter that requires a gradient"
        )
    if (loss.dim() == 0) == (loss_reduction == "none"):
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
    unread = tracer.passes[-1].unread if tracer.passes else ""
    batch = batch_size if batch_size is not None else next(iter(known.values()), None if unread else tracer.batch)
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
