r"""Gradient accounting: which examples move which layers, over an epoch.

A batch of B examples, c of them clean and m memorized, has the gradient ``g_clean + g_memorized``, where ``g_clean`` is
``c / B`` times the gradient of the mean loss of the clean examples, and ``g_memorized`` likewise. Both are summed over
the batches of an epoch. What the paper draws per layer group is the sum over its parameters of ``||g|| / sqrt(numel)``
and the mean over them of ``cos(g_clean, g_memorized)``. Added here: the norm of every single example's gradient.

Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on gradient accounting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext import distributed
from memloc_ext.accounting import Account, GradientAccountant
from memloc_ext.batches import Batch, call, device_of
from memloc_ext.borrowing import kept_training_flags
from memloc_ext.examples import Data, examples
from memloc_ext.marks import Lookup, Marks, marked
from memloc_ext.nn import example_ids
from memloc_ext.probes.layer_groups import Groups, chosen_groups
from memloc_ext.tasks import Classification, Task, TaskName, example_losses, mean_loss, task_of


@dataclass(frozen=True)
class ParameterAccount:
    """The gradient of a parameter, summed over the batches of an epoch; 0 where there is none.

    Attributes:
        clean: ``||g_clean|| / sqrt(numel)``.
        memorized: ``||g_memorized|| / sqrt(numel)``.
        total: ``||g_clean + g_memorized|| / sqrt(numel)``.
        cosine: Of the angle between ``g_clean`` and ``g_memorized``, in ``[-1, 1]``; 0 where one of them is 0.
    """

    clean: float
    memorized: float
    total: float
    cosine: float


@dataclass(frozen=True)
class GroupAccount(ParameterAccount):
    """The gradients of several parameters over an epoch: the sums of their norms, and the mean of their cosines.

    Attributes:
        auc: Area under the ROC curve of "memorized" predicted from the norm of the example's gradient; None where there
            is no memorized or no clean example.
        clean_example_norm: Norm of a clean example's gradient, mean over them; None where there is none.
        memorized_example_norm: Likewise.
    """

    auc: float | None
    clean_example_norm: float | None
    memorized_example_norm: float | None


@dataclass(frozen=True, eq=False)
class EpochAccount:
    """The account of an epoch of N examples, on the CPU.

    Attributes:
        model: All parameters together.
        groups: Layer group to its account, from input to output.
        parameters: Parameter name to its account.
        example_norms: Norm of the gradient of each example's own loss with respect to each layer group,
            ``[N, groups]``, float32; NaN for an example whose batch overflowed in float16.
        memorized: Which examples are memorized, ``[N]``, bool.
        indices: Number of each example, ``[N]``, int64, in ascending order.
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

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per layer group: ``group``, ``clean``, ``memorized``, ``total``, ``cosine`` and ``auc``."""
        names = ("clean", "memorized", "total", "cosine", "auc")
        return [{"group": g, **{name: getattr(row, name) for name in names}} for g, row in self.groups.items()]


class GradientAccounting:
    """The account of one epoch while it is kept.

    Nothing here waits for the device before `result`. It takes the memory of two gradients of the model and of
    ``N x groups`` numbers. Of several processes that share the batches, each adds its own slices and calls `gather`.

    Args:
        model: Its parameters that require a gradient are accounted, but for those that ``groups`` leaves out.
        memorized: Tells by number which examples are memorized, see `memloc_ext.marks`; None if none is.
        groups: As for `account_epoch`.

    Raises:
        ValueError: If no parameter is to be accounted, or the groups break the above.
    """

    def __init__(self, model: nn.Module, memorized: Lookup | None, *, groups: Groups = None) -> None:
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not trained:
            raise ValueError("account_epoch: model must have a parameter that requires a gradient, got none")
        chosen = chosen_groups("account_epoch", model, groups)
        parts = {group: [name for name in part.parameters if name in trained] for group, part in chosen.items()}
        self._groups = {group: names for group, names in parts.items() if names}
        owner = {name: column for column, names in enumerate(self._groups.values()) for name in names}
        parameters = {name: value for name, value in trained.items() if name in owner}
        self._memorized, device = memorized, device_of(model)
        self._owner = torch.tensor([owner[name] for name in parameters], device=device)
        self._sums = {
            name: value.new_zeros(2, *value.shape, dtype=torch.promote_types(value.dtype, torch.float32))
            for name, value in parameters.items()
        }
        self._ids = [torch.empty(0, dtype=torch.int64, device=device)]
        self._sqnorms = [torch.empty(0, len(self._groups), device=device)]

    def kinds(self, ids: Tensor) -> Tensor:
        """Return the kind of the examples with the given numbers, ``[B]``, int64: 0 is clean, 1 is memorized."""
        return torch.zeros_like(ids) if self._memorized is None else self._memorized(ids).long()

    def add(self, account: Account, ids: Tensor, scale: float | Tensor | None = None, share: float = 1.0) -> None:
        """Add a batch to the account.

        Args:
            account: Of the batch's mean loss, with `kinds` as its groups, as the paper's ``g_clean`` and
                ``g_memorized``. A parameter that is missing in ``group_grad`` got no gradient.
            ids: Numbers of its B examples, ``[B]``, int64.
            scale: What the loss was multiplied by, positive; divided out. A batch that overflowed under it, in any of
                the processes that share it, counts nothing, since its step is skipped. None for 1.
            share: What the loss of a slice of a batch was multiplied by besides, to be its part of the batch's mean; in
                ``(0, 1]``. Divided out of the norms of the examples.
        """
        names = [name for name in self._sums if name in account.group_grad]
        added = [account.group_grad[name] for name in names]
        none = self._sqnorms[0].new_zeros(len(ids))
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
        self._ids.append(ids)
        self._sqnorms.append(sqnorm.T)

    def gather(self) -> None:
        """Make this the account of what all processes added; each calls it once, after its last batch."""
        self._sums = dict(zip(self._sums, distributed.summed(list(self._sums.values())), strict=True))
        own = torch.cat(self._ids).cpu(), torch.cat(self._sqnorms).cpu()
        every = distributed.spread(lambda _: own, range(distributed.world_size()))
        self._ids, self._sqnorms = [ids for ids, _ in every], [sqnorms for _, sqnorms in every]

    def result(self) -> EpochAccount:
        """Return the account of all batches that were added."""
        table = torch.stack([_numbers(sums) for sums in self._sums.values()]).tolist()
        parameters = {name: ParameterAccount(*row) for name, row in zip(self._sums, table, strict=True)}
        ids, order = torch.cat(self._ids).cpu().sort(stable=True)
        norms, memorized = torch.cat(self._sqnorms).cpu()[order].clamp(min=0).sqrt(), self.kinds(ids) > 0
        groups = {
            group: _group_account([parameters[name] for name in names], norms[:, column], memorized)
            for column, (group, names) in enumerate(self._groups.items())
        }
        model = _group_account(list(parameters.values()), norms.norm(dim=1), memorized)
        return EpochAccount(model, groups, parameters, norms, memorized, ids)


def account_epoch(
    model: nn.Module,
    data: Data,
    *,
    memorized: Marks | None = None,
    true_labels: Any | None = None,
    test: Data | None = None,
    task: TaskName | Task = "classification",
    groups: Groups = None,
    optimizer: torch.optim.Optimizer | None = None,
    batch_size: int = 512,
    num_workers: int = 0,
) -> EpochAccount:
    """Keep the account of a model over one pass over all examples.

    The loss of a batch is the mean of its examples' losses. Without an optimizer the model stands still, in evaluation
    mode; flags and gradients are put back. With one it is trained as it is accounted: in training mode, with a step
    after each batch; flags are put back, and parameters are left without gradients.

    Args:
        model: Any model; if compiled, it runs as it was written.
        data: The examples, at least one; see `memloc_ext.examples`. A ``DataLoader`` may shuffle if its items give
            their numbers.
        memorized: Bool ``[N]`` by number, or the numbers; by default what the data set says, or none.
        true_labels: Not read; every probe takes this and ``test``, so that the same settings go to all.
        test: Not read.
        task: ``classification``, ``tokens``, or an object with ``loss`` and ``right``; see `memloc_ext.tasks`.
        groups: Layer group to names of parameters or modules, or names of some of `memloc_ext.models.layer_groups`; by
            default all of these. Parameters in no group are not accounted.
        optimizer: Makes the steps; None for none.
        batch_size: Examples in a batch of a data set, at least 1; a ``DataLoader`` has its own. The paper's sums over
            batches are proportional to their number; the norms of the single examples do not depend on it.
        num_workers: Processes that read a data set; a ``DataLoader`` has its own.

    Returns:
        The account.

    Raises:
        ValueError: If an argument breaks the above, or the numbers of the examples cannot be known.
        TypeError: If data can be iterated only once.
    """
    model, task = getattr(model, "_orig_mod", model), task_of(task)
    source = examples("account_epoch", data, device_of(model), num_workers=num_workers)
    accounting = GradientAccounting(model, marked("account_epoch", memorized, data), groups=groups)
    accountant = GradientAccountant(model)
    gradients = [(parameter, parameter.grad if optimizer is None else None) for parameter in model.parameters()]
    batch = None
    try:
        with kept_training_flags(model), torch.enable_grad():
            model.train(optimizer is not None)
            for batch in source.batches(batch_size):
                model.zero_grad()
                with example_ids(batch.ids), accountant:
                    account = _accounted(accountant, task, call(model, batch.x), batch, accounting.kinds)
                accounting.add(account, batch.ids)
                if optimizer is not None:
                    optimizer.step()
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if batch is None:
        raise ValueError("account_epoch: data must hold at least one example, got none")
    return accounting.result()


def _accounted(accountant: GradientAccountant, task: Task, output: Any, batch: Batch, kinds: Lookup) -> Account:
    """Run the backward pass of a batch's mean loss, inside of the accountant, and return its account."""
    count = len(batch.ids)
    groups: dict[str, Any] = {"group_ids": kinds(batch.ids), "num_groups": 2}
    if isinstance(task, Classification):
        return accountant.backward(mean_loss(task, output, batch.y, count), loss_reduction="mean", **groups)
    losses = example_losses(task, output, batch.y, count) / count
    weights = torch.full_like(losses, 1 / count)
    return accountant.backward(losses, loss_reduction="none", example_weights=weights, **groups)


def _numbers(sums: Tensor) -> Tensor:
    """Return the fields of `ParameterAccount`, ``[4]``, float64, whose range holds the squares of float32."""
    clean, memorized = sums.double().reshape(2, sums[0].numel())
    norms = torch.stack([part.norm() for part in (clean, memorized, clean + memorized)])
    lengths = norms[0] * norms[1]
    cosine = torch.where(lengths > 0, clean @ memorized / lengths, 0).clamp(-1, 1)
    return torch.cat([norms / max(len(clean), 1) ** 0.5, cosine[None]])


def _group_account(parameters: Sequence[ParameterAccount], norms: Tensor, memorized: Tensor) -> GroupAccount:
    counted = norms.isfinite()
    norms, memorized = norms[counted], memorized[counted]
    return GroupAccount(
        **{name: sum(getattr(parameter, name) for parameter in parameters) for name in ("clean", "memorized", "total")},
        cosine=sum(parameter.cosine for parameter in parameters) / len(parameters),
        auc=roc_auc(norms, memorized),
        clean_example_norm=_mean(norms[~memorized]),
        memorized_example_norm=_mean(norms[memorized]),
    )


def _mean(norms: Tensor) -> float | None:
    return norms.double().mean().item() if norms.numel() else None


def roc_auc(scores: Tensor, positive: Tensor) -> float | None:
    """Return the area under the ROC curve of "positive" predicted from a score.

    It is the probability that a positive example, drawn at random, has a higher score than a negative one; a tie counts
    one half.

    Args:
        scores: ``[N]``, floating point, without NaN.
        positive: The examples to be found, ``[N]``, bool.

    Returns:
        In ``[0, 1]``; None where there is no positive example or no negative one.
    """
    positive, num_positive = positive.cpu(), int(positive.sum())
    pairs = num_positive * (len(positive) - num_positive)
    if pairs == 0:
        return None
    _, place, counts = scores.cpu().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts.double() - 1) / 2  # equal scores share the mean of their ranks, which start at 1
    return float((ranks[place[positive]].sum() - num_positive * (num_positive + 1) / 2) / pairs)
