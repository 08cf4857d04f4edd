"""Memorized and clean examples side by side: who is searched, what is counted, what an edit does to others."""

import math
import statistics
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memloc_ext import models
from memloc_ext.ablation import apply_ablation
from memloc_ext.data import Dataset, digits, with_label_noise
from memloc_ext.nn import dropout_mode, example_ids, insert_example_tied_dropout
from memloc_ext.probes import DatasetLocalization, accuracy, localize_dataset
from memloc_ext.probes.accuracy import Evaluation
from memloc_ext.probes.localization import dataset as localizing
from memloc_ext.probes.localization.edited_accuracy import edited_accuracy
from memloc_ext.reference.example_tied_dropout import keep_mask

SETTINGS = {"localized": 8, "max_units": 20, "edited": 3}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """60 digits, 12 of them with a wrong label, whose numbers in the data set are not their rows."""
    whole = with_label_noise(digits(), 0.2)
    kept = whole.train.memorized[:800].nonzero()[:12, 0], (~whole.train.memorized[:800]).nonzero()[:48, 0]
    train = whole.train.subset(torch.cat(kept).flip(0))
    return replace(whole, train=train, test=whole.test.subset(torch.arange(40)))


def lenet(*, tied: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.build("lenet", in_channels=1, image_size=8)
    if tied:
        insert_example_tied_dropout(model, ["fc1", "fc2"], p_gen=0.3, p_mem=0.4, seed=3)
    return model


def fit(model: nn.Module, dataset: Dataset) -> nn.Module:
    x, y, ids = dataset.train.batch(torch.arange(len(dataset.train)))
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(120):
        optimizer.zero_grad()
        with example_ids(ids):
            F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def plain(dataset: Dataset) -> nn.Module:
    return fit(lenet(), dataset)


@pytest.fixture(scope="module")
def tied(dataset: Dataset) -> nn.Module:
    return fit(lenet(tied=True), dataset)


def found_in(model: nn.Module, dataset: Dataset, **settings: Any) -> DatasetLocalization:
    return localize_dataset(model, dataset.train, test=dataset.test, **{**SETTINGS, **settings})


def prediction(model: nn.Module, dataset: Dataset, number: int) -> tuple[int, int, float]:
    """Return what the model makes of a training example of that number, the example's label and its loss."""
    x, y, ids = dataset.train.batch((dataset.train.indices == number).nonzero()[:, 0])
    with torch.no_grad(), example_ids(ids):
        logits = model(x)
    return int(logits.argmax()), int(y), float(F.cross_entropy(logits, y))


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_every_flip_is_one(name: str, dataset: Dataset, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    result = found_in(model, dataset)
    assert Counter(row.kind for row in result.examples) == {"memorized": 8, "clean": 8}
    memorized = dict(zip(dataset.train.indices.tolist(), dataset.train.memorized.tolist(), strict=True))
    for row in result.examples:
        assert memorized[row.example] == (row.kind == "memorized")
        with dropout_mode(model, "train"):
            predicted, label, _ = prediction(model, dataset, row.example)
            assert predicted == label
            with apply_ablation(model, row.units):
                predicted, label, loss = prediction(model, dataset, row.example)
        assert (predicted != label) == (row.status == "flipped")
        assert loss == pytest.approx(row.loss, rel=1e-4)
    assert any(row.status == "flipped" for row in result.examples)


def test_the_summary_counts_the_examples(plain: nn.Module, dataset: Dataset) -> None:
    result = found_in(plain, dataset, max_units=1)
    for kind, summary in result.kinds.items():
        rows = [row for row in result.examples if row.kind == kind]
        assert (summary.total, summary.fitted) == ({"memorized": 12, "clean": 48}[kind],) * 2
        assert summary.localized == 8
        assert {status: n for status, n in summary.statuses.items() if n} == Counter(row.status for row in rows)
        units = [len(row.units) if row.status == "flipped" else math.inf for row in rows]
        assert (summary.mean or math.inf) == statistics.mean(units)
        assert (summary.median or math.inf) == statistics.median(units)
        assert (summary.searched, summary.flipped) == (8, 8 - units.count(math.inf))
        flips = Counter(len(row.units) for row in rows if row.status == "flipped")
        assert {number: count for number, count in enumerate(summary.histogram) if count} == flips
        sites = Counter(site for row in rows for site, _ in row.units)
        assert {site: count for site, count in summary.sites.items() if count} == sites
        assert list(summary.sites) == [site.name for site in result.sites]
        assert summary.units == sum(sites.values())
        assert summary.memorization == 0
    assert any(summary.mean is None for summary in result.kinds.values()), "all flipped: the test is empty"
    assert (result.memorization_share, result.kept_share) == (0, 0)
    assert result.seconds > 0


def test_the_curve_is_the_accuracy_after_each_unit(plain: nn.Module, dataset: Dataset) -> None:
    result = found_in(plain, dataset)
    for kind, summary in result.kinds.items():
        edits = [row.units for row in result.examples if row.kind == kind][:3]
        assert [point.units for point in summary.curve] == list(range(max(map(len, edits)) + 1))
        assert (summary.curve[0].examples, summary.edited.examples) == (3, 3)
        assert summary.edited.units == statistics.mean(map(len, edits))
        after = {"first": [], "last": []}
        for units in edits:
            for when, part in (("first", units[:1]), ("last", units)):
                with apply_ablation(plain, part):
                    after[when].append(accuracy(plain, dataset.train, test=dataset.test))
        for name in ("clean", "memorized", "test"):
            assert getattr(summary.curve[0], name) == getattr(accuracy(plain, dataset.train, test=dataset.test), name)
            for point, when in ((summary.curve[1], "first"), (summary.edited, "last")):
                mean = statistics.mean(getattr(value, name) for value in after[when])
                assert getattr(point, name) == pytest.approx(mean)


def test_points_of_a_curve_are_means_over_those_who_have_so_many_units(plain: nn.Module, dataset: Dataset) -> None:
    units = [("fc1", 3), ("fc2", 5), ("fc2", 7)]
    edited, curve = edited_accuracy(
        plain, Evaluation("t", plain, dataset.train), [units, [], units[:1]], {"fc1": 1, "fc2": 1}
    )
    assert [point.examples for point in curve] == [3, 2, 1, 1]
    assert (edited.units, edited.examples) == (4 / 3, 3)
    assert {point.test for point in (*curve, edited)} == {None}


@pytest.mark.parametrize(("limit", "sizes"), [(5, (10, 5, 5)), (20, (32, 12, 20)), (512, (60, 12, 40))])
def test_the_sample_has_at_most_so_many_of_each_kind(dataset: Dataset, limit: int, sizes: tuple[int, ...]) -> None:
    whole = Evaluation("t", lenet(), dataset.train, test=dataset.test)
    memorized, generator = dataset.train.memorized, torch.Generator().manual_seed(0)
    small = localizing._sampled(lenet(), whole, memorized, limit, generator)
    assert (len(small.train), int(small.memorized(small.train.indices).sum()), len(small.test)) == sizes
    assert set(small.train.indices.tolist()) <= set(dataset.train.indices.tolist())


def test_the_draw_depends_on_the_seed_alone(plain: nn.Module, dataset: Dataset) -> None:
    state = torch.get_rng_state()
    first, again = (replace(found_in(plain, dataset, seed=1), seconds=0.0) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    other = found_in(plain, dataset, seed=2)
    assert [row.example for row in first.examples] != [row.example for row in other.examples]


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_the_model_is_left_as_it_was(name: str, dataset: Dataset, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found_in(model, dataset)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_wrong_already_comes_last_and_is_said(dataset: Dataset) -> None:
    result = found_in(lenet().eval(), dataset, localized=100)
    for kind, summary in result.kinds.items():
        assert summary.localized == summary.total
        assert 0 < summary.statuses["already_wrong"] == summary.total - summary.fitted
        statuses = [row.status for row in result.examples if row.kind == kind]
        assert statuses[summary.fitted :] == ["already_wrong"] * (summary.total - summary.fitted)
        assert "already_wrong" not in statuses[: summary.fitted]


def test_nothing_is_counted_where_all_are_wrong(plain: nn.Module, dataset: Dataset) -> None:
    wrong = replace(dataset.train, labels=(dataset.train.labels + 1) % 10)
    result = found_in(plain, replace(dataset, train=wrong))
    for summary in result.kinds.values():
        assert (summary.fitted, summary.statuses["already_wrong"]) == (0, 8)
        assert (summary.mean, summary.median, summary.histogram) == (None, None, [])
        assert (summary.edited, summary.curve, summary.units) == (None, [], 0)


@pytest.mark.parametrize("kind", ["memorized", "clean"])
def test_one_kind_is_enough(plain: nn.Module, dataset: Dataset, kind: str) -> None:
    train = dataset.train.subset(dataset.train.memorized == (kind == "memorized"))
    result = found_in(plain, replace(dataset, train=train))
    assert list(result.kinds) == [kind]
    assert len(result.examples) == 8


def test_no_edit_is_evaluated_if_none_is_asked_for(plain: nn.Module, dataset: Dataset) -> None:
    result = found_in(plain, dataset, edited=0)
    assert {(summary.edited, len(summary.curve)) for summary in result.kinds.values()} == {(None, 0)}


def test_a_tied_model_is_searched_after_its_dropouts(tied: nn.Module, dataset: Dataset) -> None:
    result = found_in(tied, dataset)
    sizes = {"fc1": (120, 36), "fc2": (84, 25)}
    assert {site.name: (site.units, site.units - site.memorization) for site in result.sites} == sizes
    assert result.memorization_share == (84 + 59) / 204
    assert result.kept_share == pytest.approx(0.4 * 143 / (0.4 * 143 + 61))
    for kind, summary in result.kinds.items():
        units = [unit for row in result.examples if row.kind == kind for unit in row.units]
        assert summary.memorization == sum(unit >= sizes[site][1] for site, unit in units)
        assert summary.curve[0].test is None
        assert summary.curve[0].memorized == 1
    flips = [row for row in result.examples if row.status == "flipped"]
    assert flips
    for row in flips:  # with a unit that the example keeps: any other is 0 anyway
        site, unit = row.units[-1]
        number = list(sizes).index(site)
        assert keep_mask(torch.tensor([row.example]), *sizes[site], 0.4, 3, number)[0, unit]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"localized": 0}, ValueError, "localized must be at least 1, got 0"),
        ({"max_units": 0}, ValueError, "max_units must be at least 1, got 0"),
        ({"edited": -1}, ValueError, "edited must be at least 0, got -1"),
        ({"localized": 1.5}, TypeError, "localized must be int, got float"),
        ({"edited": True}, TypeError, "edited must be int, got bool"),
    ],
)
def test_wrong_settings_are_named(
    settings: dict, error: type[Exception], message: str, plain: nn.Module, dataset: Dataset
) -> None:
    with pytest.raises(error, match=message):
        found_in(plain, dataset, **settings)


# data and tasks of users


class Reader(nn.Module):
    """Gives logits for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 9)

    def forward(self, tokens: torch.Tensor, weight: float = 1.0) -> dict[str, torch.Tensor]:
        return {"logits": weight * self.head(torch.relu(self.mix(self.embed(tokens).cumsum(1))))}


def test_tokens_from_a_loader_of_dictionaries() -> None:
    torch.manual_seed(0)
    model, tokens = Reader(), torch.randint(9, (12, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens)["logits"][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    items = [{"tokens": t, "labels": t, "index": 100 + i} for i, t in enumerate(tokens)]
    loader = torch.utils.data.DataLoader(items, batch_size=5, shuffle=True)
    result = localize_dataset(
        model, loader, memorized=[103, 107], test=loader, task="tokens", localized=3, edited=2, seed=1
    )
    rows = result.rows()
    assert [list(row) for row in rows] == [["index", "memorized", "status", "units", "sites"]] * 5
    assert {row["index"] for row in rows if row["memorized"]} == {103, 107}
    assert all(100 <= row["index"] < 112 for row in rows)
    assert any(row["status"] == "flipped" for row in rows)

    def right(units: list[tuple[str, int]], number: int) -> bool:
        one = tokens[number - 100]
        with torch.no_grad():
            hidden = model.mix(model.embed(one).cumsum(0))
            hidden[:, [unit for _, unit in units]] = 0
            logits = model.head(hidden.relu())
        return all(int(logits[i].argmax()) == int(one[i + 1]) for i in range(3))

    for row, example in zip(rows, result.examples, strict=True):
        assert (row["units"], row["sites"]) == (len(example.units), " ".join(["mix"] * len(example.units)))
        for k in range(len(example.units) + 1):
            wrong = row["status"] == "already_wrong" or (row["status"] == "flipped" and k == len(example.units))
            assert right(example.units[:k], example.example) != wrong
    memorized = [example for example in result.examples if example.kind == "memorized"]
    edits = [example.units for example in memorized if example.status != "already_wrong"]
    shares = [sum(right(units, number) for number in (103, 107)) / 2 for units in edits]
    assert result.kinds["memorized"].edited.memorized == pytest.approx(statistics.mean(shares))
    everybody = [sum(right(units, 100 + i) for i in range(12)) / 12 for units in edits]
    assert result.kinds["memorized"].edited.test == pytest.approx(statistics.mean(everybody))


def test_features_without_marks_are_all_clean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(10, 4)
    data = torch.utils.data.TensorDataset(x, model(x).argmax(1))
    result = localize_dataset(model, data, localized=20, edited=0)
    assert sorted(row["index"] for row in result.rows()) == list(range(10))
    assert not any(row["memorized"] for row in result.rows())
    with pytest.raises(ValueError, match="at least one example"):
        localize_dataset(model, torch.utils.data.TensorDataset(x[:0], torch.zeros(0, dtype=torch.int64)))
