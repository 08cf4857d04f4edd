"""What the bench of audits says of cleanlab, and of what it costs."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import audit as bench
from memloc_ext.data import Split
from memloc_ext.study import load_data


class Seen(nn.Module):
    """Predicts class 1 for the inputs that are in a training set, else class 0."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.inputs = split.batch(torch.arange(len(split))).x.flatten()

    def forward(self, x: Tensor) -> Tensor:
        seen = (x.flatten()[:, None] == self.inputs).any(1).float()
        return torch.stack([1 - seen, seen], 1)


def test_predictions_are_of_networks_without_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    config = bench.study("digits", 0)
    split = Split.clean(torch.arange(23.0).div(23).view(-1, 1, 1, 1), torch.arange(23) % 2)
    dataset = bench.Dataset("made", split, split, ("a", "b"))
    sizes = []

    def trained(_config: Any, _dataset: Any, part: Split, variant: str, folder: Path) -> nn.Module:
        sizes.append(len(part))
        assert (variant, folder) == ("plain", Path("folds", str(len(sizes) - 1)))
        return Seen(part)

    monkeypatch.setattr(bench, "trained", trained)
    found = bench.cross_validated(config, dataset, Path("folds"))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]).softmax(0).expand(23, 2))
    assert sum(sizes) == (bench.FOLDS - 1) * len(split)


def test_confident_learning_ranks_issues_first() -> None:
    pytest.importorskip("cleanlab")
    labels = torch.arange(12) % 3
    probable = torch.full((12, 3), 0.1).scatter(1, labels[:, None], 0.8)
    probable[0] = torch.tensor([0.02, 0.49, 0.49])  # hard, but no other class is likely enough
    probable[1] = torch.tensor([0.9, 0.05, 0.05])  # labelled 1, truly 0
    split = Split.clean(torch.zeros(12, 1, 1, 1), labels)
    true, wrong = labels.index_fill(0, torch.tensor([1]), 0), torch.arange(12) == 1
    found = bench.cleanlab_quality(dataclasses.replace(split, true_labels=true, memorized=wrong), probable)
    assert found == [
        {"score": "self_confidence", "auc": pytest.approx(10 / 11), "precision": 0, "restored": 0},
        {"score": "normalized_margin", "auc": 1, "precision": 1, "restored": 1},
        {"score": "confident_learning", "auc": 1, "precision": 1, "restored": 1},
    ]


def test_every_method_is_measured_with_its_passes(tmp_path: Path) -> None:
    pytest.importorskip("cleanlab")
    config = bench.study("digits", 0)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, examples=100, test_examples=20),
        model=dataclasses.replace(config.model, width=0.05),
        train=dataclasses.replace(config.train, epochs=4),
    )
    dataset = load_data(config)
    runs = {method: run(config, dataset, tmp_path) for method, run in bench.METHODS.items()}
    assert {method: (run.training_passes, run.gradient_passes) for method, run in runs.items()} == {
        "audit": (4, 3),
        "example-tied dropout": (4, 2),
        "cleanlab, same budget": (4, 0),
        "cleanlab, 5 folds": (16, 0),
    }
    assert [row["score"] for row in runs["example-tied dropout"].quality] == ["score_drop"]


def test_audits_are_not_told_which_labels_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split.clean(torch.rand(10, 1, 8, 8), torch.arange(10))
    split = dataclasses.replace(split, memorized=torch.arange(10) < 4)
    told = []

    def audit(*_: Any, memorized: Any, **__: Any) -> bench.Audit:
        told.append(memorized)
        right, none = [float(i < 4) for i in range(10)], [False] * 10
        return bench.Audit("score_a", list(range(10)), split.labels.tolist(), list(range(10)), {"score_a": right}, none)

    monkeypatch.setattr(bench, "audit", audit)
    (row,) = bench.audited(nn.Identity(), split, tmp_path)
    assert told == [[]]
    assert row == {"score": "score_a", "auc": 1, "precision": 1, "restored": None}


def test_same_budget_is_exact() -> None:
    assert all(epochs % (bench.FOLDS - 1) == 0 for epochs in bench.EPOCHS.values())


def test_table() -> None:
    def run(seed: int, method: str, value: float) -> dict[str, Any]:
        quality = [{"score": "score_s", "auc": value, "precision": 1 - value, "restored": value}]
        return {"seed": seed, "method": method, "training_passes": 4, "gradient_passes": 1, "quality": quality}

    one, other = bench.summary([run(0, "a", 0.5), run(0, "b", 1), run(1, "a", 0.75)])
    assert {key: one[key] for key in ("method", "score", "seeds")} == {"method": "a", "score": "score_s", "seeds": 2}
    assert one["auc"] == one["restored"] == {"mean": 0.625, "min": 0.5, "max": 0.75}
    assert one["precision"] == {"mean": 0.375, "min": 0.25, "max": 0.5}
    assert (other["method"], other["seeds"], other["auc"]["mean"]) == ("b", 1, 1)
    table = bench.markdown([{"dataset": "x", "summary": [one]}, {"dataset": "y", "summary": [one, other]}])
    cell = "0.625 (0.500 to 0.750)<br>38 % (25 to 50)<br>62 % (50 to 75)"
    assert table.splitlines()[2:] == [
        f"| a | s | 4, 4 | {cell} | {cell} |",
        "| b | s | -, 4 | not run | 1.000 (1.000 to 1.000)<br>0 % (0 to 0)<br>100 % (100 to 100)<br>seeds: 1 |",
    ]
