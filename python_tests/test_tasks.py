"""Losses and predictions are held against loops over examples and tokens, in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.parts import fingerprint
from memloc_ext.tasks import (
    Classification,
    Task,
    Tokens,
    example_losses,
    identity,
    logits_of,
    mean_loss,
    right_examples,
    task_of,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def looped(logits: Tensor, y: Tensor, shift: bool) -> tuple[list[float], list[bool], list[list[int]]]:
    """Loss, whether right, and the counts of right and labelled tokens of each example, token by token."""
    losses, right, counts = [], [], []
    for row, labels in zip(logits.double(), y, strict=True):
        told = [(row[t - shift], labels[t]) for t in range(int(shift), len(labels)) if labels[t] != -100]
        hits = [bool(scores.argmax() == label) for scores, label in told]
        each = [float(scores.logsumexp(0) - scores[label]) for scores, label in told]
        losses.append(sum(each) / max(len(each), 1))
        right.append(all(hits))
        counts.append([sum(hits), len(hits)])
    return losses, right, counts


@pytest.mark.parametrize("shift", [True, False])
def test_tokens_are_those_of_a_loop(shift: bool) -> None:
    logits, y = torch.randn(6, 5, 3), torch.randint(3, (6, 5))
    y[torch.rand(6, 5) < 0.3] = -100
    y[1], y[2, 1:] = -100, -100  # without labels; with one that the shift drops
    for row in (3, 4):  # right about all that has a label
        labels = y[row, 1:] if shift else y[row]
        places = torch.arange(5 - shift)
        logits[row, places, labels.clamp(min=0)] = 9
    task = Tokens(shift)
    losses, right, counts = looped(logits, y, shift)
    torch.testing.assert_close(task.loss(logits.double(), y), torch.tensor(losses, dtype=torch.float64))
    assert task.right(logits, y).tolist() == right
    assert task.token_counts(logits, y).tolist() == counts
    assert losses[1] == 0
    assert right[1]
    assert True in right[3:]
    assert False in right
    assert task.loss(logits.bfloat16(), y).dtype == torch.float32


def test_an_example_without_labels_has_no_gradient() -> None:
    logits = torch.randn(2, 4, 3, requires_grad=True)
    Tokens().loss(logits, torch.tensor([[-100] * 4, [0, 1, 2, 0]])).sum().backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1, :3].any()
    assert not logits.grad[1, 3].any()  # predicts what comes after the last token


def test_classification_is_cross_entropy() -> None:
    logits, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(4, (7,))
    losses = [float(row.logsumexp(0) - row[label]) for row, label in zip(logits, y, strict=True)]
    task = task_of("classification")
    torch.testing.assert_close(task.loss(logits, y), torch.tensor(losses, dtype=torch.float64))
    assert task.right(logits, y).tolist() == [
        int(row.argmax()) == int(label) for row, label in zip(logits, y, strict=True)
    ]
    torch.testing.assert_close(mean_loss(task, logits, y, 7), torch.tensor(losses, dtype=torch.float64).mean())
    assert torch.equal(mean_loss(task, logits.float(), y, 7), F.cross_entropy(logits.float(), y))


@pytest.mark.parametrize(
    "output",
    [
        lambda t: t,
        lambda t: SimpleNamespace(logits=t, loss=None),
        lambda t: {"logits": t, "other": 1},
        lambda t: (t, "hidden"),
        lambda t: [t],
    ],
)
def test_logits_are_found(output: Any) -> None:
    logits = torch.zeros(2, 3)
    assert logits_of(output(logits)) is logits
    assert Classification().right(output(logits), torch.tensor([0, 1])).tolist() == [True, False]


@pytest.mark.parametrize("output", [None, "logits", (), ({},), {"scores": torch.zeros(1)}, SimpleNamespace(logits=1)])
def test_what_holds_no_logits_is_refused(output: Any) -> None:
    with pytest.raises(ValueError, match=f"the model must return logits .*, got {type(output).__name__}"):
        logits_of(output)


def test_tasks_by_name_or_of_ones_own() -> None:
    class Regression:
        def loss(self, output: Tensor, y: Tensor) -> Tensor:
            return (output[:, 0] - y) ** 2

        def right(self, output: Tensor, y: Tensor) -> Tensor:
            return (output[:, 0] - y).abs() < 0.5

    own = Regression()
    assert task_of("tokens") == Tokens()
    assert task_of(own) is own
    assert isinstance(own, Task)
    output, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 3.0])
    assert example_losses(own, output, y, 2).tolist() == [0, 1]
    assert right_examples(own, output, y, 2).tolist() == [True, False]
    assert mean_loss(own, output, y, 2) == 0.5


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("regression", ValueError, "one of classification, tokens or an object, got 'regression'"),
        (None, TypeError, "got NoneType"),
        (Tokens, TypeError, "got the class Tokens"),
        (SimpleNamespace(loss=lambda output, y: output), TypeError, "with loss.* and right.*, got SimpleNamespace"),
    ],
)
def test_what_is_no_task_is_refused(task: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        task_of(task)


def test_shapes_are_named() -> None:
    logits, y = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got \[2, 4, 3\] and \[2, 4\]; .*give task='tokens'"):
        Classification().loss(logits, y)
    with pytest.raises(ValueError, match=r"labels \[batch\], got \[2, 3\] and \[3\]"):
        Classification().right(logits[:, 0], y[0, :3])
    with pytest.raises(ValueError, match=r"task 'tokens' needs .* got \[2, 3\] and \[2, 4\]"):
        Tokens().right(logits[:, 0], y)
    own: Any = SimpleNamespace(loss=lambda output, y: output.sum(), right=lambda output, y: output[:, 0])
    with pytest.raises(ValueError, match=r"loss must return floating point \[2\].*, got torch.float32 \[\]"):
        example_losses(own, logits, y, 2)
    with pytest.raises(ValueError, match=r"right must return bool \[2\].*, got torch.float32 \[2, 3\]"):
        right_examples(own, logits, y, 2)


class Weighted:
    """A task of a user that holds numbers, a tensor and a module."""

    def __init__(self, scale: float = 1.0, weight: float = 2.0) -> None:
        self.scale, self.weight, self.criterion = scale, torch.full((3,), weight), torch.nn.HuberLoss(delta=scale)
        self.own, self.function = self, F.relu


def test_equal_tasks_have_one_fingerprint_and_others_another() -> None:
    makers = [
        Weighted,
        lambda: Weighted(2.0),
        lambda: Weighted(weight=3.0),
        Classification,
        Tokens,
        lambda: Tokens(False),
    ]
    found = [fingerprint(identity(make())) for make in makers]
    assert found == [fingerprint(identity(make())) for make in makers]
    assert len({*found}) == len(makers)
