r"""Gradient accounting: which examples move which layers, over an epoch.

A batch of B examples, c of them clean and m memorized, has the gradient ``g_clean + g_memorized``, where ``g_clean`` is
``c / B`` times the gradient of the mean loss of the clean examples, and ``g_memorized`` likewise. Both are summed over
the batches of an epoch. What the paper draws per layer group is the sum over its parameters of ``||g|| / sqrt(numel)``
and the mean over them of ``cos(g_clean, g_memorized)``. Added here: the norm of every single example's gradient, its
cosine with the clean gradient, and the noise scale.

The cosine of an example is that of its own gradient with the sum of ``g_clean`` over the batches of the epoch *before*
its own: where the clean examples have pushed the layer group so far. This takes no second pass, and no example is in
the sum that it is held against. It is asked for in the second batch and every second one after it.

Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on gradient accounting; for
the noise scale, McCandlish et al., "An empirical model of large-batch training", 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from memloc_ext.probes.epoch_account import EpochAccount, GroupAccount, ParameterAccount
from memloc_ext.probes.layer_groups import Groups, chosen_groups
from memloc_ext.tasks import Classification, Task, TaskName, example_losses, mean_loss, task_of

COSINES_EVERY = 2
"""Batches of which one is asked for cosines, which take a tenth of its accounted step, in a tiny network a fifth."""


class GradientAccounting:
    """The account of one epoch while it is kept.

    Nothing here waits for the device before `result`. It takes the memory of two gradients of the model and of
    ``2 N x groups`` numbers. Of several processes that share the batches, each adds its own slices and calls `gather`.

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
        self._cosines = [torch.empty(0, len(self._groups) + 1, device=device)]
        self._dtypes = {name: value.dtype for name, value in parameters.items()}
        self._noise = torch.zeros(2, len(self._groups), device=device)  # S and |g|^2
        self._batches = 0

    def kinds(self, ids: Tensor) -> Tensor:
        """Return the kind of the examples with the given numbers, ``[B]``, int64: 0 is clean, 1 is memorized."""
        return torch.zeros_like(ids) if self._memorized is None else self._memorized(ids).long()

    def queries(self, ids: Tensor) -> dict[str, Any]:
        """Return what `GradientAccountant.backward` must be asked of the next batch, for `add`, given its numbers."""
        asked = {"group_ids": self.kinds(ids), "num_groups": 2}
        if (self._batches - 1) % COSINES_EVERY == 0:
            asked["directions"] = {"clean": {name: t[0].to(self._dtypes[name]) for name, t in self._sums.items()}}
        return asked

    def add(self, account: Account, ids: Tensor, scale: float | Tensor | None = None, share: float = 1.0) -> None:
        """Add a batch to the account, in all processes that share it.

        Args:
            account: Of the batch's mean loss, with `queries` answered. A parameter that is missing in ``group_grad``
                got no gradient.
            ids: Numbers of its B examples, ``[B]``, int64.
            scale: What the loss was multiplied by, positive; divided out. A batch that overflowed under it, in any of
                the processes that share it, counts nothing, since its step is skipped. None for 1.
            share: What the loss of a slice of a batch was multiplied by besides, to be its part of the batch's mean; in
                ``(0, 1]``. Divided out of the norms of the examples.
        """
        names = [name for name in self._sums if name in account.group_grad]
        sqnorm = self._by_group(account.sqnorm, len(ids))
        cosines, sqnorm = self._cosines_with_clean(account, sqnorm), sqnorm / share / share
        *added, squares = distributed.summed([*(account.group_grad[name] for name in names), sqnorm.sum(1)])
        if scale is not None:
            finite = torch.stack([value.isfinite().all() for value in added]).all()
            added = [torch.where(finite, value / scale, 0) for value in added]
            squares = torch.where(finite, squares / scale / scale, 0)
            sqnorm, cosines = (torch.where(finite, t, float("nan")) for t in (sqnorm / scale / scale, cosines))
        if names:
            torch._foreach_add_([self._sums[name] for name in names], added)  # pyright: ignore
        examples = round(len(ids) / share)
        if names and examples > 1:
            mean = self._squares(names, torch._foreach_add(*zip(*added, strict=True)))  # pyright: ignore
            self._noise += torch.stack([squares - examples * mean, examples * mean - squares / examples])
        self._batches += 1
        self._ids.append(ids)
        self._sqnorms.append(sqnorm.T)
        self._cosines.append(cosines.T)

    def gather(self) -> None:
        """Make this the account of what all processes added; each calls it once, after its last batch."""
        own = tuple(torch.cat(parts).cpu() for parts in (self._ids, self._sqnorms, self._cosines))
        every = distributed.spread(lambda _: own, range(distributed.world_size()))
        self._ids, self._sqnorms, self._cosines = (list(parts) for parts in zip(*every, strict=True))

    def result(self) -> EpochAccount:
        """Return the account of all batches that were added."""
        table = torch.stack([_numbers(sums) for sums in self._sums.values()]).tolist()
        parameters = {name: ParameterAccount(*row) for name, row in zip(self._sums, table, strict=True)}
        ids, order = torch.cat(self._ids).cpu().sort(stable=True)
        norms, memorized = torch.cat(self._sqnorms).cpu()[order].clamp(min=0).sqrt(), self.kinds(ids) > 0
        cosines, noise = torch.cat(self._cosines).cpu()[order], self._noise.cpu().double()
        groups = {
            group: _group_account(
                [parameters[name] for name in names], norms[:, column], cosines[:, column], memorized, noise[:, column]
            )
            for column, (group, names) in enumerate(self._groups.items())
        }
        whole = norms.norm(dim=1), cosines[:, -1], memorized, noise.sum(1)
        model = _group_account(list(parameters.values()), *whole)
        return EpochAccount(model, groups, parameters, norms, cosines, memorized, ids)

    def _cosines_with_clean(self, account: Account, sqnorm: Tensor) -> Tensor:
        """Return the cosine of each example with the clean gradient so far, given its squared norms, ``[G + 1, B]``."""
        if "clean" not in account.dot:
            return sqnorm.new_full((len(sqnorm) + 1, sqnorm.shape[1]), float("nan"))
        clean = self._squares(list(self._sums), [sums[0] for sums in self._sums.values()])
        dot = self._by_group(account.dot["clean"], sqnorm.shape[1])
        dot, sqnorm = (torch.cat([each, each.sum(0, keepdim=True)]) for each in (dot, sqnorm))
        lengths = sqnorm.sqrt() * torch.cat([clean, clean.sum(0, keepdim=True)]).sqrt()[:, None]
        return torch.where(lengths > 0, (dot / lengths).clamp(-1, 1), float("nan"))

    def _squares(self, names: Sequence[str], tensors: Sequence[Tensor]) -> Tensor:
        """Return the squared norm of tensors of parameters over each layer group, ``[G]``."""
        squares = torch._foreach_pow(torch._foreach_norm(list(tensors)), 2)  # pyright: ignore
        return self._by_group(dict(zip(names, squares, strict=True)))

    def _by_group(self, numbers: Mapping[str, Tensor], *shape: int) -> Tensor:
        """Return the sums of parameters' numbers, ``[*shape]``, over each layer group, ``[G, *shape]``."""
        none = self._noise.new_zeros(shape)
        each = torch.stack([numbers.get(name, none).to(none) for name in self._sums])
        return none.new_zeros(len(self._groups), *shape).index_add_(0, self._owner, each)


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
                    account = _accounted(accountant, task, call(model, batch.x), batch, accounting.queries(batch.ids))
                accounting.add(account, batch.ids)
                if optimizer is not None:
                    optimizer.step()
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if batch is None:
        raise ValueError("account_epoch: data must hold at least one example, got none")
    return accounting.result()


def _accounted(
    accountant: GradientAccountant, task: Task, output: Any, batch: Batch, queries: Mapping[str, Any]
) -> Account:
    """Run the backward pass of a batch's mean loss, inside of the accountant, and return its account."""
    count = len(batch.ids)
    if isinstance(task, Classification):
        return accountant.backward(mean_loss(task, output, batch.y, count), loss_reduction="mean", **queries)
    losses = example_losses(task, output, batch.y, count) / count
    weights = torch.full_like(losses, 1 / count)
    return accountant.backward(losses, loss_reduction="none", example_weights=weights, **queries)


def _numbers(sums: Tensor) -> Tensor:
    """Return the fields of `ParameterAccount`, ``[4]``, float64, whose range holds the squares of float32."""
    clean, memorized = sums.double().reshape(2, sums[0].numel())
    norms = torch.stack([part.norm() for part in (clean, memorized, clean + memorized)])
    lengths = norms[0] * norms[1]
    cosine = torch.where(lengths > 0, clean @ memorized / lengths, 0).clamp(-1, 1)
    return torch.cat([norms / max(len(clean), 1) ** 0.5, cosine[None]])


def _group_account(
    parameters: Sequence[ParameterAccount], norms: Tensor, cosines: Tensor, memorized: Tensor, noise: Tensor
) -> GroupAccount:
    told, counted = cosines.isfinite(), norms.isfinite()
    clean, own = cosines[told & ~memorized], cosines[told & memorized].double()
    quartiles = own.quantile(own.new_tensor([0.25, 0.5, 0.75])).tolist() if own.numel() else [None] * 3
    norms, memorized = norms[counted], memorized[counted]
    variance, square = noise.tolist()
    return GroupAccount(
        clean=sum(parameter.clean for parameter in parameters),
        memorized=sum(parameter.memorized for parameter in parameters),
        total=sum(parameter.total for parameter in parameters),
        cosine=sum(parameter.cosine for parameter in parameters) / len(parameters),
        auc=roc_auc(norms, memorized),
        clean_example_norm=_mean(norms[~memorized]),
        memorized_example_norm=_mean(norms[memorized]),
        noise_scale=variance / square if square else None,
        memorized_cosine=_mean(own),
        memorized_cosine_q25=quartiles[0],
        memorized_cosine_q50=quartiles[1],
        memorized_cosine_q75=quartiles[2],
        memorized_against=_mean(own < 0),
        clean_against=_mean(clean < 0),
    )


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if values.numel() else None


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
