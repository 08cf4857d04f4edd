"""What a model is given and returns, taken apart into tensors, and what its outputs are worth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memloc_ext.batches import call, tensors_of, with_each_tensor
from memloc_ext.nn.example_ids import checked_example_ids, current_example_ids
from memloc_ext.tasks import IGNORED, Classification, Task, Tokens, example_losses, logits_of, right_examples

_HOLE = torch.empty(0)


class Signature:
    """How a model is called with the tensors of a batch, ``[batch, *]``; of equal ``key`` if in the same way.

    ``x`` is a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments; if ``named``, the ids
    of the examples follow its tensors.
    """

    def __init__(self, x: Any, named: bool) -> None:
        x = tuple(x) if isinstance(x, list) else dict(x) if isinstance(x, Mapping) else x
        self._form, self.named = with_each_tensor(x, lambda _: _HOLE), named
        self.key = (repr(self._form), named)

    def call(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Return what a model returns for the tensors of a batch, as of `given`."""
        parts = iter(tensors)
        with checked_example_ids(tensors[-1]) if self.named else nullcontext():
            return call(model, with_each_tensor(self._form, lambda _: next(parts)))


def given(x: Any) -> tuple[list[Tensor], Signature]:
    """Return the tensors of a batch, with the ids of its examples if they are named, and how a model is called."""
    tensors, ids = tensors_of(x), current_example_ids()
    if ids is None:
        return tensors, Signature(x, False)
    if len(ids) != len(tensors[0]):
        raise ValueError(f"example_ids must name each example; got {len(ids)} ids for a batch of {len(tensors[0])}")
    return [*tensors, ids], Signature(x, True)


def opened(task: Task, output: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Return the tensors of what a model returns, and what puts others in their place, as a task is given it."""
    if isinstance(task, Classification | Tokens):
        return [logits_of(output)], lambda tensors: tensors[0]
    plain = isinstance(output, Tensor | tuple | list | Mapping) or not hasattr(output, "__dict__")
    tree = output if plain else vars(output)

    def build(tensors: Sequence[Tensor]) -> Any:
        new = iter(tensors)
        built = with_each_tensor(tree, lambda _: next(new))
        if plain:
            return built
        other = copy.copy(output)
        vars(other).update(built)
        return other

    return tensors_of(tree), build


class Judged(NamedTuple):
    """What outputs are worth.

    Attributes:
        loss: Of each example: ``[*]``.
        right: Whether it is right, likewise, bool.
        predicted: Class with the largest logit, likewise, int64; None for other tasks than classification.
    """

    loss: Tensor
    right: Tensor
    predicted: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Judged:
        """Return the same with each tensor changed."""
        loss, right, predicted = self
        return Judged(change(loss), change(right), None if predicted is None else change(predicted))

    @staticmethod
    def joined(parts: Sequence[Judged], dim: int = 0, join: Callable[..., Tensor] = torch.cat) -> Judged:
        """Concatenate, or stack, along a dimension."""
        losses, right, predicted = zip(*parts, strict=True)
        return Judged(join(losses, dim), join(right, dim), None if predicted[0] is None else join(predicted, dim))


def judge(task: Task, output: Any, y: Tensor) -> Judged:
    """Return what an output is worth, ``[batch]``."""
    loss = example_losses(task, output, y, len(y))
    if isinstance(task, Classification):
        predicted = logits_of(output).argmax(1)
        return Judged(loss, predicted == y, predicted)
    return Judged(loss, right_examples(task, output, y, len(y)), None)


def check_examples(name: str, task: Task, x: Any, y: Tensor) -> None:
    """Raise unless there is a label for each of at least one example."""
    if isinstance(task, Classification | Tokens) and y.dtype != torch.int64:
        raise TypeError(f"{name}: y must have dtype int64, got {y.dtype}")
    tensors = tensors_of(x)
    if not tensors:
        raise ValueError(f"{name}: x must be a tensor, or a tuple or mapping that holds some, got {type(x).__name__}")
    wrong = y.dim() == 0 or (isinstance(task, Classification) and y.dim() != 1)
    if wrong or len(y) == 0 or any(t.dim() == 0 or len(t) != len(y) for t in tensors):
        shapes = " and ".join(str(list(t.shape)) for t in (*tensors, y))
        raise ValueError(f"{name}: x and y must have the same number of examples, at least one; got shapes {shapes}")


def check_output(task: Task, output: Any, y: Tensor) -> Judged:
    """Return what the unchanged model's output is worth.

    Raises:
        ValueError: If it does not fit the task, is not finite, or a label is of no class.
    """
    right_examples(task, output, y, len(y))
    if isinstance(task, Classification | Tokens):
        logits = logits_of(output)
        if not bool(logits.isfinite().all()):
            raise ValueError("the model's logits must be finite, got NaN or infinity in the unchanged network")
        check_classes("y", task, y, logits.shape[-1])
    judged = judge(task, output, y)
    if not bool(judged.loss.isfinite().all()):
        raise ValueError("task: losses must be finite, got NaN or infinity in the unchanged network")
    return judged


def check_classes(name: str, task: Task, y: Tensor, classes: int) -> None:
    """Raise unless labels are of the classes of the logits, tokens without label apart."""
    labels = y[y != IGNORED] if isinstance(task, Tokens) else y
    if isinstance(task, Classification | Tokens) and bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"{name} must be in [0, {classes}), got values from {int(y.min())} to {int(y.max())}")
