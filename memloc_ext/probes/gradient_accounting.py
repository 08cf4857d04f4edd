r"""Gradient accounting: which examples move which layers, over an epoch.

A batch of B examples, n_c of them clean and n_n noisy, has the gradient ``g_clean + g_noisy``, where ``g_clean`` is
``n_c / B`` times the gradient of the mean loss of the clean examples, and ``g_noisy`` likewise. Both are summed over
the batches of an epoch. What the paper draws per layer group is the sum over its parameters of ``||g|| / sqrt(numel)``
and the mean over them of ``cos(g_clean, g_noisy)``. Added here: the norm of every single example's gradient.

Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on gradient accounting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import distributed, models
from memloc_ext.accounting import GradientAccountant
from memloc_ext.borrowing import kept_training_flags
from memloc_ext.data import Split
from memloc_ext.nn import example_ids
from memloc_ext.probes.roc import roc_auc


class BatchAccount(Protocol):
    """What `memloc_ext.GradientAccountant` returns for a batch of B examples."""

    @property
    def sqnorm(self) -> Mapping[str, Tensor]:
        """Parameter to the squared norm of the gradient of each example's own loss, ``[B]``."""
        ...

    @property
    def group_grad(self) -> Mapping[str, Tensor]:
        """Parameter to its gradient from the clean and from the noisy examples, ``[2, *shape]``."""
        ...


@dataclass(frozen=True)
class ParameterAccount:
    """The gradient of a parameter, summed over the batches of an epoch; 0 where there is none.

    Attributes:
        clean: ``||g_clean|| / sqrt(numel)``.
        noisy: ``||g_noisy|| / sqrt(numel)``.
        total: ``||g_clean + g_noisy|| / sqrt(numel)``.
        cosine: Of the angle between ``g_clean`` and ``g_noisy``, in ``[-1, 1]``; 0 where one of them is 0.
    """

    clean: float
    noisy: float
    total: float
    cosine: float


@dataclass(frozen=True)
class GroupAccount:
    """The gradients of several parameters over an epoch.

    Attributes:
        clean: Sum over the parameters of `ParameterAccount.clean`.
        noisy: Likewise.
        total: Likewise.
        cosine: Mean over the parameters of `ParameterAccount.cosine`.
        auc: Area under the ROC curve of "noisy" predicted from the norm of the example's gradient; None where there is
            no noisy or no clean example.
        clean_example_norm: Norm of a clean example's gradient, mean over them; None where there is none.
        noisy_example_norm: Likewise.
    """

    clean: float
    noisy: float
    total: float
    cosine: float
    auc: float | None
    clean_example_norm: float | None
    noisy_example_norm: float | None


@dataclass(frozen=True, eq=False)
class EpochAccount:
    """The account of an epoch of N examples, on the CPU.

    Attributes:
        model: All parameters together.
        groups: Layer group to its account, from input to output.
        parameters: Parameter name to its account.
        example_norms: Norm of the gradient of each example's own loss with respect to each layer group,
            ``[N, groups]``, float32; NaN for an example whose batch overflowed in float16.
        memorized: The noisy examples, ``[N]``, bool.
        indices: Number of each example in the data set, ``[N]``, int64.
    """

    model: GroupAccount
    groups: dict[str, GroupAccount]
    parameters: dict[str, ParameterAccount]
    example_norms: Tensor
    memorized: Tensor
    indices: Tensor

    @property
    def total_norms(self) -> Tensor:
        """Norm of the gradient of each example's own loss with respect to all parameters, ``[N]``, float32."""
        return self.example_norms.norm(dim=1)


class GradientAccounting:
    """The account of one epoch while it is kept.

    Nothing here waits for the device before `result`. It takes the memory of two gradients of the model and of
    ``N x groups`` numbers. Of several processes that share the batches, each adds its own slices and calls `gather`.

    Args:
        model: Its parameters that require a gradient are accounted.
        split: The N examples of the epoch; ``memorized`` says which are noisy.
        layer_groups: Group to parameter names, each parameter in exactly one; by default the model's own, see
            `memloc_ext.models.layer_groups`.

    Raises:
        ValueError: If the groups break the above, or an example is in the split twice.
    """

    def __init__(
        self, model: nn.Module, split: Split, *, layer_groups: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._groups = _trained_groups(model, parameters, layer_groups)
        order = split.indices.argsort()
        self._order, self._sorted = order, split.indices[order]
        if (self._sorted[1:] == self._sorted[:-1]).any():
            raise ValueError("GradientAccounting: split must hold each example once, got an index twice")
        self._split = split
        owner = {name: column for column, names in enumerate(self._groups.values()) for name in names}
        self._owner = torch.tensor([owner[name] for name in parameters], device=split.device)
        self._sums = {
            name: value.new_zeros(2, *value.shape, dtype=torch.promote_types(value.dtype, torch.float32))
            for name, value in parameters.items()
        }
        shape = len(split), len(self._groups)
        self._sqnorm = torch.full(shape, float("nan"), dtype=torch.float32, device=split.device)
        self._added = torch.zeros(len(split), dtype=torch.float32, device=split.device)

    def kinds(self, ids: Tensor) -> Tensor:
        """Return the kind of the examples with the given numbers, ``[B]``, int64: 0 is clean, 1 is noisy."""
        return self._split.memorized[self._rows(ids)].long()

    def add(self, account: BatchAccount, ids: Tensor, scale: float | Tensor | None = None, share: float = 1.0) -> None:
        """Add a batch to the account.

        Args:
            account: Of the batch; ``group_grad`` with `kinds` as its groups and of the mean loss, as the paper's
                ``g_clean`` and ``g_noisy``. A parameter that is missing in it got no gradient.
            ids: Numbers of its B examples in the data set, ``[B]``, int64; each must be in the split, which is checked
                on the CPU, where that does not wait for a device.
            scale: What the loss was multiplied by, positive; divided out. A batch that overflowed under it, in any of
                the processes that share it, counts nothing, since its step is skipped. None for 1.
            share: What the loss of a slice of a batch was multiplied by besides, to be its part of the batch's mean; in
                ``(0, 1]``. Divided out of the norms of the examples.
        """
        names = [name for name in self._sums if name in account.group_grad]
        added = [account.group_grad[name] for name in names]
        none = self._sqnorm.new_zeros(len(ids))
        each = torch.stack([account.sqnorm.get(name, none).to(none) for name in self._sums])
        sqnorm = none.new_zeros(len(self._groups), len(ids)).index_add_(0, self._owner, each)
        if scale is not None:
            overflows = torch.stack([value.isfinite().all() for value in added]).all().logical_not().float()
            finite = distributed.summed([overflows])[0] == 0
            added = [torch.where(finite, value / scale, 0) for value in added]
            sqnorm = torch.where(finite, sqnorm / scale / scale, float("nan"))
        if names:
            torch._foreach_add_([self._sums[name] for name in names], added)  # pyright: ignore[reportPrivateImportUsage]
        if share != 1:
            sqnorm = sqnorm / share / share
        rows = self._rows(ids)
        self._sqnorm[rows], self._added[rows] = sqnorm.T, 1

    def gather(self) -> None:
        """Make this the account of what all processes added; each calls it once, after its last batch."""
        self._sums = dict(zip(self._sums, distributed.summed(list(self._sums.values())), strict=True))
        own = torch.where(self._added[:, None] > 0, self._sqnorm, 0)  # an overflow stays NaN
        sqnorm, self._added = distributed.summed([own, self._added])
        self._sqnorm = torch.where(self._added[:, None] > 0, sqnorm, float("nan"))

    def result(self) -> EpochAccount:
        """Return the account of all batches that were added."""
        table = torch.stack([_numbers(sums) for sums in self._sums.values()]).tolist()
        parameters = {name: ParameterAccount(*row) for name, row in zip(self._sums, table, strict=True)}
        norms, memorized = self._sqnorm.clamp(min=0).sqrt().cpu(), self._split.memorized.cpu()
        groups = {
            group: _group_account([parameters[name] for name in names], norms[:, column], memorized)
            for column, (group, names) in enumerate(self._groups.items())
        }
        model = _group_account(list(parameters.values()), norms.norm(dim=1), memorized)
        return EpochAccount(model, groups, parameters, norms, memorized, self._split.indices.cpu())

    def _rows(self, ids: Tensor) -> Tensor:
        places = torch.searchsorted(self._sorted, ids).clamp_(max=len(self._sorted) - 1)
        if ids.device.type == "cpu" and not torch.equal(self._sorted[places], ids):
            wrong = ids[self._sorted[places] != ids][0].item()
            raise ValueError(f"GradientAccounting: ids must be those of examples in the split, got {wrong}")
        return self._order[places]


def gradient_accounting(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 512,
    layer_groups: Mapping[str, Sequence[str]] | None = None,
) -> EpochAccount:
    """Keep the account of a model as it stands, in evaluation mode, over all examples of a split in their order.

    The loss is the cross-entropy, mean over each batch. Nothing is updated: flags and gradients are put back.

    Args:
        model: Inputs ``[B, C, H, W]`` to logits ``[B, classes]``, on the device of ``split``, not compiled.
        split: The examples, at least one.
        batch_size: Examples at a time, at least 1. The paper's sums over batches are proportional to their number; the
            norms of the single examples do not depend on it.
        layer_groups: As for `GradientAccounting`.

    Returns:
        The account.

    Raises:
        ValueError: If an argument breaks the above.
    """
    if len(split) == 0:
        raise ValueError("gradient_accounting: split must hold at least one example, got none")
    accounting = GradientAccounting(model, split, layer_groups=layer_groups)
    accountant = GradientAccountant(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with kept_training_flags(model), torch.enable_grad():
            model.eval()
            for inputs, labels, ids in split.batches(batch_size):
                model.zero_grad()
                with example_ids(ids), accountant:
                    loss = F.cross_entropy(model(inputs), labels)
                    account = accountant.backward(
                        loss, group_ids=accounting.kinds(ids), num_groups=2, loss_reduction="mean"
                    )
                accounting.add(account, ids)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return accounting.result()


def _trained_groups(
    model: nn.Module, parameters: Mapping[str, Tensor], layer_groups: Mapping[str, Sequence[str]] | None
) -> dict[str, list[str]]:
    if not parameters:
        raise ValueError("GradientAccounting: model must have a parameter that requires a gradient, got none")
    groups = models.layer_groups(model) if layer_groups is None else layer_groups
    named = [name for names in groups.values() for name in names]
    known = {name for name, _ in model.named_parameters()}
    for name in [*parameters, *named]:
        if name not in known or named.count(name) != 1:
            where = f"in {named.count(name)} of them" if name in known else "which the model does not have"
            raise ValueError(
                f"GradientAccounting: layer_groups must hold each parameter exactly once, got {name} {where}"
            )
    trained = {group: [name for name in names if name in parameters] for group, names in groups.items()}
    return {group: names for group, names in trained.items() if names}


def _numbers(sums: Tensor) -> Tensor:
    """Return the fields of `ParameterAccount`, ``[4]``, float64, whose range holds the squares of float32."""
    clean, noisy = sums.double().reshape(2, sums[0].numel())
    norms = torch.stack([part.norm() for part in (clean, noisy, clean + noisy)])
    lengths = norms[0] * norms[1]
    cosine = torch.where(lengths > 0, clean @ noisy / lengths, 0).clamp(-1, 1)
    return torch.cat([norms / max(len(clean), 1) ** 0.5, cosine[None]])


def _group_account(parameters: Sequence[ParameterAccount], norms: Tensor, memorized: Tensor) -> GroupAccount:
    counted = norms.isfinite()
    norms, memorized = norms[counted], memorized[counted]
    return GroupAccount(
        clean=sum(parameter.clean for parameter in parameters),
        noisy=sum(parameter.noisy for parameter in parameters),
        total=sum(parameter.total for parameter in parameters),
        cosine=sum(parameter.cosine for parameter in parameters) / len(parameters),
        auc=roc_auc(norms, memorized),
        clean_example_norm=_mean(norms[~memorized]),
        noisy_example_norm=_mean(norms[memorized]),
    )


def _mean(norms: Tensor) -> float | None:
    return norms.double().mean().item() if norms.numel() else None
