import pytest
import torch
from torch import Tensor, nn

from memloc_ext.data import Dataset, Split
from memloc_ext.nn import MODES, ExampleTiedDropout
from memloc_ext.probes import Accuracy, accuracy, accuracy_by_mode
from memloc_ext.probes.accuracy import Evaluation


class Oracle(nn.Module):
    """Predicts the class that the first pixel names, and records whether it was in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        classes = ((x[:, 0, 0, 0] + 1) / 2 * 4).round().long()
        return nn.functional.one_hot(classes, 5).float()


def split(classes: list[int], labels: list[int], true_labels: list[int]) -> Split:
    inputs = (torch.tensor(classes) / 4).view(-1, 1, 1, 1)
    given, true = torch.tensor(labels, dtype=torch.int64), torch.tensor(true_labels, dtype=torch.int64)
    return Split(inputs, given, true, given != true, torch.arange(len(labels)))


def dataset() -> Dataset:
    # predictions, given labels, true labels: four clean ones, three memorized ones
    train = split([0, 1, 2, 0, 3, 1, 4], [0, 1, 2, 3, 3, 2, 0], [0, 1, 2, 3, 1, 1, 2])
    return Dataset("made", train, split([1, 2, 3], [1, 2, 0], [1, 2, 0]), tuple("abcde"))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_share_counts_its_own_examples(batch_size: int) -> None:
    model = Oracle().train()
    data = dataset()
    result = accuracy(model, data.train, test=data.test, batch_size=batch_size)
    counts = {"clean": 4, "memorized": 3, "memorized_true": 3, "test": 3}
    assert result == Accuracy(clean=3 / 4, memorized=1 / 3, memorized_true=1 / 3, test=2 / 3, counts=counts)
    shares = {"clean": 3 / 4, "memorized": 1 / 3, "memorized_true": 1 / 3, "test": 2 / 3}
    assert result.rows() == [{"part": part, "share": shares[part], "count": counts[part]} for part in counts]
    assert model.training
    assert not any(model.modes)


def test_absent_examples_have_no_share() -> None:
    clean = split([0, 1], [0, 0], [0, 0])
    for result in (accuracy(Oracle(), clean, test=split([], [], [])), accuracy(Oracle(), clean)):
        counts = {"clean": 2, "memorized": 0, "memorized_true": 0, "test": 0}
        assert result == Accuracy(clean=1 / 2, memorized=None, memorized_true=None, test=None, counts=counts)
        assert [row["share"] for row in result.rows()] == [1 / 2, None, None, None]
    assert accuracy(Oracle(), split([], [], [])).clean is None


def test_flags_are_put_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(3, 3)).train()
    model[0].eval()
    with pytest.raises(RuntimeError):
        accuracy(model, dataset().train)
    assert [model.training, model[0].training, model[1].training] == [True, False, True]


def test_every_mode_is_evaluated_as_that_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 64), ExampleTiedDropout(0.5, 0.5), nn.Linear(64, 5))
    model[2].mode = "test"
    examples = dataset()
    results = accuracy_by_mode(model, examples.train, test=examples.test)
    assert list(results) == list(MODES)
    assert results["train"].test is None
    assert all(results[mode].test is not None for mode in MODES if mode != "train")
    for mode in ("test", "drop", "drop_gen"):
        model[2].mode = mode
        assert accuracy(model, examples.train, test=examples.test) == results[mode]
    assert model[2].mode == "drop_gen"
    with pytest.raises(ValueError, match="must hold an ExampleTiedDropout, got Linear"):
        accuracy_by_mode(nn.Linear(1, 1), examples.train)


def test_own_masks_follow_the_dataset_index_not_the_batch_position() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 64), ExampleTiedDropout(0.1, 0.3), nn.Linear(64, 5))
    model[2].mode = "train"
    train = dataset().train
    whole = Evaluation("probe", model, train, batch_size=7).right_by_row(model)
    assert torch.equal(Evaluation("probe", model, train, batch_size=2).right_by_row(model), whole)
    rows = torch.tensor([5, 1, 3])
    assert torch.equal(Evaluation("probe", model, train.subset(rows)).right_by_row(model), whole[rows])


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_are_shares(share):
    with pytest.raises(ValueError, match=rf"Accuracy: test must be in \[0, 1\], got {share}"):
        Accuracy(None, 0.0, 1, share)
