"""Accuracy on clean, memorized and test examples, in every mode of example-tied dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memloc_ext import distributed
from memloc_ext.borrowing import kept_training_flags
from memloc_ext.data import Dataset, Split
from memloc_ext.nn import MODES, ExampleTiedDropout, dropout_mode, example_ids


@dataclass(frozen=True)
class Accuracy:
    """Shares of examples in ``[0, 1]``; None where there is no such example.

    Attributes:
        clean: Clean training examples predicted as their label.
        noisy: Memorized training examples predicted as the (wrong) label they were given.
        noisy_true: Memorized training examples predicted as their true label.
        test: Test examples predicted as their label; None in mode ``train``, where they have no mask.
    """

    clean: float | None
    noisy: float | None
    noisy_true: float | None
    test: float | None

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"Accuracy: {name} must be in [0, 1], got {share}")


def accuracy(model: nn.Module, dataset: Dataset, *, test: bool = True, batch_size: int = 512) -> Accuracy:
    """Evaluate a model as it stands, in evaluation mode but in the dropout mode it is in; flags are put back.

    Several processes share the work, see `predict`.

    Args:
        model: Inputs ``[B, C, H, W]`` to logits ``[B, classes]``, on the device of ``dataset``.
        dataset: Training and test examples.
        test: Whether to look at the test examples.
        batch_size: Examples at a time; does not change the result.

    Returns:
        The shares.
    """
    predicted = predict(model, dataset.train, batch_size=batch_size)
    return accuracy_of(dataset, predicted, predict(model, dataset.test, batch_size=batch_size) if test else None)


def accuracy_of(dataset: Dataset, train: Tensor, test: Tensor | None) -> Accuracy:
    """Return the shares of predictions that are right.

    Args:
        dataset: Training and test examples.
        train: Predicted class of each training example, ``[N]``, int64.
        test: Likewise of each test example; None if they were not looked at.
    """
    split = dataset.train
    right, memorized = train == split.labels, split.memorized
    return Accuracy(
        clean=_share(right[~memorized]),
        noisy=_share(right[memorized]),
        noisy_true=_share((train == split.true_labels)[memorized]),
        test=None if test is None else _share(test == dataset.test.labels),
    )


def masks_test_examples(model: nn.Module) -> bool:
    """Return whether test examples would get masks in evaluation mode, which are made for training examples only."""
    return any(isinstance(module, ExampleTiedDropout) and module._mode == "train" for module in model.modules())


def accuracy_by_mode(model: nn.Module, dataset: Dataset, *, batch_size: int = 512) -> dict[str, Accuracy]:
    """Evaluate a model with example-tied dropout in each of its modes; its own mode is put back.

    Args:
        model: As for `accuracy`.
        dataset: Training and test examples.
        batch_size: Examples at a time; does not change the result.

    Returns:
        Mode to `Accuracy`.

    Raises:
        ValueError: If the model has no `ExampleTiedDropout`.
    """
    if not any(isinstance(module, ExampleTiedDropout) for module in model.modules()):
        raise ValueError(f"accuracy_by_mode: model must hold an ExampleTiedDropout, got {type(model).__name__} without")
    result = {}
    for mode in MODES:
        with dropout_mode(model, mode):
            result[mode] = accuracy(model, dataset, test=mode != "train", batch_size=batch_size)
    return result


@torch.no_grad()
def predict(model: nn.Module, split: Split, *, batch_size: int = 512) -> Tensor:
    """Return the predicted class of each example of a split, ``[N]``, in evaluation mode; flags are put back.

    Of several processes each runs some of the batches: call it in all, or inside of `memloc_ext.distributed.alone`.
    """
    classes = torch.zeros_like(split.labels)
    with kept_training_flags(model):
        model.eval()
        for begin in range(distributed.rank() * batch_size, len(split), distributed.world_size() * batch_size):
            rows = torch.arange(begin, min(begin + batch_size, len(split)))
            inputs, _, indices = split.batch(rows)
            with example_ids(indices):
                classes[begin : begin + batch_size] = model(inputs).argmax(1)
    return distributed.summed([classes])[0]


def _share(right: Tensor) -> float | None:
    return right.double().mean().item() if right.numel() else None
