"""What a backward pass tells of its examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memloc_ext.accounting.run import Run
from memloc_ext.accounting.session import Session
from memloc_ext.accounting.uses import accumulated
from memloc_ext.ops import Groups


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


def account_of(
    session: Session, run: Run, groups: Groups | None, loss_reduction: str, example_weights: Tensor | None
) -> Account:
    """Return what a run told of every parameter that requires a gradient; zeros where it told nothing."""
    sqnorm, group_grad = {}, {}
    for name, p in session.named_parameters():
        if not p.requires_grad:
            continue
        dtype, key = accumulated(p.dtype), id(p)
        norms = run.sqnorm.get(key)
        sqnorm[name] = torch.zeros(run.batch, dtype=dtype, device=p.device) if norms is None else norms
        if groups is not None:
            sums = run.group_grad.get(key)
            shape = (groups.num, *p.shape)
            group_grad[name] = torch.zeros(shape, dtype=dtype, device=p.device) if sums is None else sums
    if example_weights is not None:
        sqnorm = {name: _divided(norm, example_weights.to(norm.device)) for name, norm in sqnorm.items()}
    elif loss_reduction == "mean" and sqnorm:
        scaled = torch._foreach_mul(list(sqnorm.values()), run.batch**2)  # pyright: ignore[reportPrivateImportUsage]
        sqnorm = dict(zip(sqnorm, scaled, strict=True))
    return Account(sqnorm, group_grad)


def _divided(norm: Tensor, factors: Tensor) -> Tensor:
    """Divide by the squares of factors, whose range float64 has room for; where a factor is 0, so is the norm."""
    wide = factors.double()
    return torch.where(wide > 0, norm / wide / wide, 0).to(norm.dtype)
