"""Accuracy on clean, memorized and test examples, and the pass over data that other probes share with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.batches import call, device_of
from memloc_ext.borrowing import kept_training_flags
from memloc_ext.distributed import spread, world_size
from memloc_ext.examples import Data, Examples, digest, examples
from memloc_ext.marks import Lookup, Marks, marked, truth
from memloc_ext.nn import MODES, ExampleTiedDropout, dropout_mode, example_ids
from memloc_ext.parts import fingerprint
from memloc_ext.tasks import Task, TaskName, Tokens, identity, right_examples, task_of

PARTS = ("clean", "memorized", "memorized_true", "test")


@dataclass(frozen=True)
class Accuracy:
    """Shares of examples in ``[0, 1]``; None where there is no such example.

    Attributes:
        clean: Clean training examples about which the model is right.
        memorized: Memorized training examples whose given (perhaps wrong) label is predicted.
        memorized_true: Memorized training examples whose true label is predicted; None where it is not known.
        test: Test examples about which the model is right; None where they were not looked at.
        counts: Part, one of the above, to the number of examples that its share is of.
        tokens: ``clean``, ``memorized`` and ``test`` to the share of right ones among their labelled tokens; empty
            unless the task is one of tokens.
    """

    clean: float | None
    memorized: float | None
    memorized_true: float | None
    test: float | None
    counts: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, share in self.shares().items():
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"Accuracy: {name} must be in [0, 1], got {share}")

    def shares(self, parts: Sequence[str] = PARTS) -> dict[str, float | None]:
        """Return shares by name."""
        return {part: getattr(self, part) for part in parts}

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per part: ``part``, ``share`` in ``[0, 1]`` or None, and ``count``, the examples it is of."""
        return [{"part": p, "share": share, "count": self.counts.get(p, 0)} for p, share in self.shares().items()]


def accuracy(
    model: nn.Module,
    data: Data,
    *,
    memorized: Marks | None = None,
    true_labels: Any | None = None,
    test: Data | None = None,
    task: TaskName | Task = "classification",
    groups: object = None,
    batch_size: int = 512,
    num_workers: int = 0,
) -> Accuracy:
    """Evaluate a model as it stands, in evaluation mode but in the dropout mode it is in; flags are put back.

    Several processes share the work: call it in each of them.

    Args:
        model: Any model.
        data: Training examples: a map-style data set, a ``DataLoader`` or an iterable of batches, each ``(x, y)``,
            ``(x, y, index)`` or a mapping with ``labels``; see `memloc_ext.examples`.
        memorized: Bool ``[N]`` by number, or the numbers; by default what the data set says, or none.
        true_labels: Targets before any noise, ``[N, *]`` by number; by default what the data set says.
        test: Test examples. They are left out in dropout mode ``train``, where they have no masks.
        task: ``classification``, ``tokens``, or an object with ``loss`` and ``right``; see `memloc_ext.tasks`.
        groups: Not read; every probe takes it, so that the same settings go to all.
        batch_size: Examples at a time of a data set; a ``DataLoader`` has its own. Does not change the result.
        num_workers: Processes that read a data set; a ``DataLoader`` has its own.

    Returns:
        The shares.

    Raises:
        ValueError: If an argument breaks the above, or the numbers of the examples cannot be known.
        TypeError: If data can be iterated only once.
    """
    evaluation = Evaluation("accuracy", model, data, memorized, true_labels, test, task, batch_size, num_workers)
    return evaluation.accuracy(model)


def accuracy_by_mode(model: nn.Module, data: Data, **settings: Any) -> dict[str, Accuracy]:
    """Return the accuracy, as by `accuracy`, in each mode of example-tied dropout; the model's own is put back.

    Raises:
        ValueError: If the model has no `ExampleTiedDropout`.
    """
    if not any(isinstance(module, ExampleTiedDropout) for module in model.modules()):
        raise ValueError(f"accuracy_by_mode: model must hold an ExampleTiedDropout, got {type(model).__name__} without")
    result = {}
    for mode in MODES:
        with dropout_mode(model, mode):
            result[mode] = accuracy(model, data, **settings)
    return result


class Evaluation:
    """The examples that models are evaluated on, and how; for the arguments see `memloc_ext.accuracy`.

    Attributes:
        train: Training examples, on the model's device.
        test: Test examples; None if there are none, or they would need masks of their own.
        task: The task.
        memorized: Tells by number which training examples are memorized; None if that is not known.
        batch_size: Examples at a time.
    """

    def __init__(
        self,
        function: str,
        model: nn.Module,
        data: Data,
        memorized: Marks | None = None,
        true_labels: Any | None = None,
        test: Data | None = None,
        task: TaskName | Task = "classification",
        batch_size: int = 512,
        num_workers: int = 0,
    ) -> None:
        device = device_of(model)
        self.task = task_of(task)
        self.train: Examples = examples(function, data, device, num_workers=num_workers)
        self.test: Examples | None = None
        if test is not None and not masks_test_examples(model):
            self.test = examples(function, test, device, num_workers=num_workers, numbered=False)
        self.memorized = marked(function, memorized, data)
        self._truth, self.batch_size = truth(function, true_labels, data), batch_size

    def accuracy(self, model: nn.Module) -> Accuracy:
        """Return the accuracy of a model in evaluation mode; several processes share the work."""
        with kept_training_flags(model):
            model.eval()
            return self.accuracies(lambda x: [call(model, x)], 1)[0]

    def accuracies(self, outputs: Callable[[Any], Sequence[Any]], models: int) -> list[Accuracy]:
        """Return the accuracy of so many models, given what each of them returns for a batch."""
        train = self._outcomes(outputs, models, self.train, self._truth)
        ids, right = train["ids"], train["right"]
        memorized = torch.zeros_like(ids, dtype=torch.bool) if self.memorized is None else self.memorized(ids)
        kinds = {"clean": ~memorized, "memorized": memorized}
        parts = {part: right[:, kind] for part, kind in kinds.items()}
        parts["memorized_true"] = train["truly"][:, memorized] if "truly" in train else right[:, :0]
        tokens = {part: train["tokens"][:, kind] for part, kind in kinds.items() if "tokens" in train}
        if self.test is not None:
            test = self._outcomes(outputs, models, self.test)
            parts["test"] = test["right"]
            tokens |= {"test": test["tokens"]} if "tokens" in test else {}
        counts = {part: parts[part].shape[1] if part in parts else 0 for part in PARTS}
        hits = {part: found.sum(1).tolist() for part, found in parts.items()}
        told = {part: found.sum(1).tolist() for part, found in tokens.items()}
        return [
            Accuracy(
                **{part: _ratio(hits[part][i], counts[part]) if part in hits else None for part in PARTS},
                counts=counts,
                tokens={part: _ratio(*pairs[i]) for part, pairs in told.items()},
            )
            for i in range(models)
        ]

    def right_by_row(self, model: nn.Module) -> Tensor:
        """Return about which training examples a model is right, in the order of their ``indices``, ``[N]``, bool."""
        by_row = self.train.subset(torch.arange(len(self.train)))  # a pass may draw other rows, or leave some out
        with kept_training_flags(model):
            model.eval()
            found = self._outcomes(lambda x: [call(model, x)], 1, by_row)
        right = torch.empty_like(found["right"][0])
        right[self.train.indices.argsort()] = found["right"][0][found["ids"].argsort()]
        return right

    def digest(self) -> str:
        """Return what stands for the examples, by their numbers and targets, and for which are memorized."""
        parts = [digest(data) for data in (self.train, self.test) if data is not None]
        told = [look(self.train.indices) for look in (self.memorized, self._truth) if look is not None]
        return fingerprint(parts, told, identity(self.task))

    @torch.no_grad()
    def _outcomes(
        self, outputs: Callable[[Any], Sequence[Any]], models: int, data: Examples, truth: Lookup | None = None
    ) -> dict[str, Tensor]:
        """Return about which examples models are right, as for `accuracies`; several processes share the batches.

        Under ``ids``, ``[N]``; ``right``, ``[models, N]``, bool; ``truly``, likewise, by the true labels, if these are
        known; ``tokens``, ``[models, N, 2]``, the numbers of right and of labelled tokens, if there are tokens.
        """
        world = world_size()

        def share(k: int) -> list[dict[str, Tensor]]:
            found = []
            for x, y, ids in data.batches(self.batch_size * world, shard=(k, world)):
                with example_ids(ids):
                    found.append(self._outcome(outputs(x), y, ids, None if truth is None else truth(ids)))
            return found if world == 1 else [{name: t.cpu() for name, t in part.items()} for part in found]

        none = {"ids": torch.empty(0, dtype=torch.int64), "right": torch.empty(models, 0, dtype=torch.bool)}
        found = [part for shares in spread(share, range(world)) for part in shares] or [none]
        return {name: torch.cat([part[name] for part in found], 0 if name == "ids" else 1) for name in found[0]}

    def _outcome(self, outputs: Sequence[Any], y: Any, ids: Tensor, truth: Any) -> dict[str, Tensor]:
        def each(judge: Callable[[Any], Tensor]) -> Tensor:
            return torch.stack([judge(output) for output in outputs])

        task, batch = self.task, len(ids)
        found = {"ids": ids, "right": each(lambda output: right_examples(task, output, y, batch))}
        if truth is not None:
            found["truly"] = each(lambda output: right_examples(task, output, truth, batch))
        if isinstance(task, Tokens):
            found["tokens"] = each(lambda output: task.token_counts(output, y))
        return found


def masks_test_examples(model: nn.Module) -> bool:
    """Return whether test examples would get masks in evaluation mode, which are made for training examples only."""
    return any(isinstance(module, ExampleTiedDropout) and module._mode == "train" for module in model.modules())


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
