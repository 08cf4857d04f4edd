"""What one pass over the examples tells of each, for an audit: losses, margins, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.accounting import Account, GradientAccountant
from memloc_ext.batches import Batch, call
from memloc_ext.examples import Examples
from memloc_ext.marks import Lookup
from memloc_ext.nn import dropout_mode, example_ids
from memloc_ext.nn.insert import example_tied_sites
from memloc_ext.tasks import Classification, Task, Tokens, example_losses, logits_of, right_examples

OTHERS = "audit: data must yield the same examples in every pass; leave out drop_last of a DataLoader"


@dataclass(frozen=True)
class Pass:
    """What one state says of each example, by their numbers; lists may be empty but for the first four.

    Attributes:
        ids: Numbers, ascending.
        sqnorm: Squared norm of the gradient of the example's loss.
        loss: That loss.
        right: Whether the model is right.
        margin: Logit of the label less the largest other one.
        predicted: Class with the largest logit.
        labels: The label.
        cosine: Of the example's gradient with the clean average.
        drop: Loss without memorization channels.
        without: Class that is predicted then.
    """

    ids: list[int]
    sqnorm: list[float]
    loss: list[float]
    right: list[bool]
    margin: list[float] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    drop: list[float] = field(default_factory=list)
    without: list[int] = field(default_factory=list)


class Passes:
    """Passes over the examples with a copy of a model, in one state after another."""

    def __init__(self, model: nn.Module, source: Examples, task: Task, marks: Lookup | None, batch_size: int) -> None:
        self._network = copy.deepcopy(model).eval()
        self._tensors, self._tied = self._network.state_dict(), bool(example_tied_sites(model))
        self._accountant = GradientAccountant(self._network)
        self._source, self._task, self._marks, self._batch_size = source, task, marks, batch_size

    def of(self, state: Mapping[str, Tensor], where: str, last: bool) -> Pass:
        """Return what a state says of each example; of the last one all of it."""
        with torch.no_grad():
            for name, value in state.items():
                self._tensors[name].copy_(value)
        sums: dict[str, Tensor] = {}
        ids, found = self._columns(lambda batch: self._told(batch, sums if last else None))
        if last:
            kind = int(self._kinds(ids).all())  # all examples count as clean where none is
            clean = {name: value[kind].to(self._tensors[name].dtype) for name, value in sums.items()}
            again, cosines = self._columns(lambda batch: self._cosine(batch, clean))
            if not torch.equal(ids, again):
                raise ValueError(OTHERS)
            found |= cosines
        for name, values in found.items():
            if not values.isfinite().all():
                at = int(values.isfinite().logical_not().nonzero()[0])
                got = f"{float(values[at])} as {name} of example {int(ids[at])} in {where}"
                raise ValueError(f"audit: losses, margins and gradients must be finite, got {got}")
        return Pass(ids.tolist(), **{name: values.tolist() for name, values in found.items()})

    def _columns(self, told: Callable[[Batch], dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the numbers of all examples, ascending, and what is told of them batch by batch."""
        ids, columns = [], {}
        for batch in self._source.batches(self._batch_size):
            ids.append(batch.ids.cpu())
            for name, values in told(batch).items():
                columns.setdefault(name, []).append(values.cpu())
        if not ids:
            raise ValueError("audit: data must hold at least one example, got none")
        every, order = torch.cat(ids).sort(stable=True)
        return every, {name: torch.cat(values)[order] for name, values in columns.items()}

    def _kinds(self, ids: Tensor) -> Tensor:
        """Return the kind of examples, int64: 0 is clean, 1 is memorized."""
        return torch.zeros_like(ids) if self._marks is None else self._marks(ids).long()

    def _cosine(self, batch: Batch, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        _, _, account = self._accounted(batch, weight_grads=False, directions={"clean": direction})
        return {"cosine": account.cosine("clean")}

    def _told(self, batch: Batch, sums: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Return columns of `Pass` for a batch; with ``sums``, of the last state, add the gradient of each kind."""
        (x, y, ids), task = batch, self._task
        how = {"weight_grads": False} if sums is None else {"group_ids": self._kinds(ids), "num_groups": 2}
        output, loss, account = self._accounted(batch, **how)
        with torch.no_grad():
            told = {"sqnorm": account.total_sqnorm.clamp(min=0), "loss": loss.detach()}
            told["right"] = right_examples(task, output, y, len(ids))
            if isinstance(task, Classification | Tokens):
                told["margin"] = task.margin(output, y)
            if isinstance(task, Classification):
                told["predicted"] = logits_of(output).argmax(1)
            if sums is None:
                return told
            for name, gradients in account.group_grad.items():
                sums[name] = sums[name] + gradients if name in sums else gradients
            if isinstance(task, Classification):
                told["labels"] = y
            if self._tied:
                with dropout_mode(self._network, "drop"):
                    output = call(self._network, x)
                told["drop"] = example_losses(task, output, y, len(ids))
                if isinstance(task, Classification):
                    told["without"] = logits_of(output).argmax(1)
        return told

    def _accounted(self, batch: Batch, **how: Any) -> tuple[Any, Tensor, Account]:
        """Return the output for a batch, the loss of each example, and the account of their gradients."""
        with torch.enable_grad(), dropout_mode(self._network, "train"), example_ids(batch.ids), self._accountant:
            output = call(self._network, batch.x)
            loss = example_losses(self._task, output, batch.y, len(batch.ids))
            return output, loss, self._accountant.backward(loss, loss_reduction="none", **how)
