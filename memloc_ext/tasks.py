"""What a model is asked to do: the loss of each example, and whether it is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The label of a token that does not count, as in `torch.nn.functional.cross_entropy`."""


@runtime_checkable
class Task(Protocol):
    """What every probe asks of a task; a class of your own needs these two methods and no base class."""

    def loss(self, output: Any, y: Any) -> Tensor:
        """Return the loss of each example, ``[batch]``, differentiable.

        Args:
            output: What the model returned, as it returned it; see `logits_of`.
            y: The targets of the batch, on the model's device.
        """
        ...

    def right(self, output: Any, y: Any) -> Tensor:
        """Return whether the model is right about each example, ``[batch]``, bool."""
        ...


@dataclass(frozen=True)
class Classification:
    """One class per example: logits ``[batch, classes]``, labels ``[batch]`` int64, and cross-entropy."""

    def loss(self, output: Any, y: Tensor) -> Tensor:
        """Return the cross-entropy of each example, ``[batch]``."""
        return F.cross_entropy(wide(self._logits(output, y)), y, reduction="none")

    def right(self, output: Any, y: Tensor) -> Tensor:
        """Return whether the class with the largest logit is the label, ``[batch]``."""
        return self._logits(output, y).argmax(1) == y

    def margin(self, output: Any, y: Tensor) -> Tensor:
        """Return the logit of the label less the largest other one, ``[batch]``."""
        return _margins(self._logits(output, y), y)

    def mean_loss(self, output: Any, y: Tensor) -> Tensor:
        """Return the mean of the losses, 0-d, in one call of PyTorch."""
        return F.cross_entropy(wide(self._logits(output, y)), y)

    def _logits(self, output: Any, y: Tensor) -> Tensor:
        logits = logits_of(output)
        if logits.dim() != 2 or y.shape != logits.shape[:1]:
            raise ValueError(
                "task 'classification' needs logits [batch, classes] and labels [batch], got "
                f"{list(logits.shape)} and {list(y.shape)}; for a label per token, give task='tokens'"
            )
        return logits


@dataclass(frozen=True)
class Tokens:
    """One class per token, as language models predict: logits ``[batch, tokens, classes]``, labels ``[batch, tokens]``.

    Labels of -100 do not count. An example without any other label has loss 0 and is right.

    Attributes:
        shift: Whether the logits of a token are for the label of the next, as causal language models have it.
    """

    shift: bool = True

    def loss(self, output: Any, y: Tensor) -> Tensor:
        """Return the cross-entropy of each example, mean over its labelled tokens, ``[batch]``."""
        logits, labels = self._aligned(output, y)
        each = F.cross_entropy(wide(logits).transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        return each.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)

    def right(self, output: Any, y: Tensor) -> Tensor:
        """Return whether every labelled token has the largest logit, ``[batch]``."""
        return self._right_tokens(output, y)[0].all(1)

    def margin(self, output: Any, y: Tensor) -> Tensor:
        """Return the logit of the label less the largest other one, mean over the labelled tokens, ``[batch]``."""
        logits, labels = self._aligned(output, y)
        labelled = labels != IGNORED
        each = torch.where(labelled, _margins(logits, labels.where(labelled, 0)), 0)
        return each.sum(1) / labelled.sum(1).clamp(min=1)

    def token_counts(self, output: Any, y: Tensor) -> Tensor:
        """Return how many labelled tokens have the largest logit, and how many there are, ``[batch, 2]``, int64."""
        right, labelled = self._right_tokens(output, y)
        return torch.stack([(right & labelled).sum(1), labelled.sum(1)], 1)

    def _right_tokens(self, output: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens are right, those without label too, and which have one, ``[batch, tokens]``."""
        logits, labels = self._aligned(output, y)
        labelled = labels != IGNORED
        return (logits.argmax(2) == labels) | ~labelled, labelled

    def _aligned(self, output: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(output)
        if logits.dim() != 3 or y.shape != logits.shape[:2]:
            needed = "logits [batch, tokens, classes] and labels [batch, tokens]"
            raise ValueError(f"task 'tokens' needs {needed}, got {list(logits.shape)} and {list(y.shape)}")
        return (logits[:, :-1], y[:, 1:]) if self.shift else (logits, y)


TaskName = Literal["classification", "tokens"]
_NAMED: dict[str, Task] = {"classification": Classification(), "tokens": Tokens()}


def task_of(task: TaskName | Task) -> Task:
    """Return a task by its name, or one that is given, which needs ``loss`` and ``right``, see `Task`.

    Raises:
        ValueError: If there is no task of that name.
        TypeError: If it is no such object.
    """
    if isinstance(task, str):
        if task not in _NAMED:
            raise ValueError(f"task must be one of {', '.join(_NAMED)} or an object, got {task!r}")
        return _NAMED[task]
    if isinstance(task, type) or not all(callable(getattr(task, name, None)) for name in ("loss", "right")):
        got = f"the class {task.__name__}" if isinstance(task, type) else type(task).__name__
        rule = f"one of {', '.join(_NAMED)} or an object with loss(output, y) and right(output, y)"
        raise TypeError(f"task must be {rule}, got {got}")
    return task


def identity(value: Any, holders: tuple[int, ...] = ()) -> Any:
    """Return what stands for a task in a `memloc_ext.parts.fingerprint`: its class by name, and what it holds.

    It is the same in every process, unless the task holds functions or objects that have no name and no attributes.
    """
    if isinstance(value, Mapping):
        return [(identity(key, holders), identity(held, holders)) for key, held in value.items()]
    if isinstance(value, list | tuple):
        return [identity(held, holders) for held in value]
    if isinstance(value, type) or "<" not in getattr(value, "__qualname__", "<"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Tensor) or hasattr(value, "__code__") or not hasattr(value, "__dict__"):
        return value
    held = None if id(value) in holders else identity(vars(value), (*holders, id(value)))
    return [identity(type(value)), held]


def example_losses(task: Task, output: Any, y: Any, batch: int) -> Tensor:
    """Return the loss of each of ``batch`` examples; ValueError if the task returns something else."""
    losses = task.loss(output, y)
    return _each("loss", losses, batch, "floating point", isinstance(losses, Tensor) and losses.is_floating_point())


def right_examples(task: Task, output: Any, y: Any, batch: int) -> Tensor:
    """Return whether the model is right about each of ``batch`` examples; ValueError if the task returns otherwise."""
    right = task.right(output, y)
    return _each("right", right, batch, "bool", isinstance(right, Tensor) and right.dtype == torch.bool)


def mean_loss(task: Task, output: Any, y: Any, batch: int) -> Tensor:
    """Return the mean of the losses of ``batch`` examples, 0-d."""
    if isinstance(task, Classification):
        return task.mean_loss(output, y)
    return example_losses(task, output, y, batch).mean()


def logits_of(output: Any) -> Tensor:
    """Return the logits among what a model returns.

    Args:
        output: The logits; an object that has, or a mapping that holds, them by the name ``logits``; or a tuple or list
            that begins with them.

    Raises:
        ValueError: If it is none of these.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) and output else None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "the model must return logits [batch, classes]: a tensor, an object or mapping with logits, or a tuple "
            f"that begins with them, got {type(output).__name__}"
        )
    return logits


def wide(t: Tensor) -> Tensor:
    """Return a tensor in the type that losses are computed in: float64 as it is, else float32."""
    return t if t.dtype == torch.float64 else t.float()


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    logits, at = wide(logits), labels.unsqueeze(-1)
    return logits.gather(-1, at).squeeze(-1) - logits.scatter(-1, at, -torch.inf).amax(-1)


def _each(method: str, value: Any, batch: int, kind: str, of_kind: bool) -> Tensor:
    if not of_kind or value.shape != (batch,):
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"task: {method} must return {kind} [{batch}], one per example, got {got}")
    return value
