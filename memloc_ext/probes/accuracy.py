"""Accuracy on clean, memorized and test examples, in every mode of example-tied dropout."""

from __future__ import annotations

from typing import Any

from torch import nn

from memloc_ext.examples import Data
from memloc_ext.marks import Marks
from memloc_ext.nn import MODES, ExampleTiedDropout, dropout_mode
from memloc_ext.probes.evaluation import Accuracy, Evaluation
from memloc_ext.tasks import Task, TaskName


def accuracy(
    model: nn.Module,
    data: Data,
    *,
    memorized: Marks | None = None,
    true_labels: Any | None = None,
    test: Data | None = None,
    task: TaskName | Task = "classification",
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
        batch_size: Examples at a time of a data set; a ``DataLoader`` has its own. Does not change the result.
        num_workers: Processes that read a data set; a ``DataLoader`` has its own.

    Returns:
        The shares.

    Raises:
        ValueError: If an argument breaks the above, or the numbers of the examples cannot be known.
        TypeError: If data can be iterated only once.
    """
    settings = {"memorized": memorized, "true_labels": true_labels, "test": test, "task": task}
    evaluation = Evaluation("accuracy", model, data, **settings, batch_size=batch_size, num_workers=num_workers)
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
