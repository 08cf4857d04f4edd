"""The search in models that cannot be recorded: the model itself, once per unit and example."""

import warnings
from typing import Any

import pytest
import torch
from localizing import confirm, same, trained
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import apply_ablation, example_ids
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.models.vit import ViT
from memloc_ext.nn import ExampleTiedDropout
from memloc_ext.probes.localization import Localization, localize


class Asking(nn.Module):
    """A model that looks at its input, and is otherwise another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x if x.isfinite().all() else torch.zeros_like(x))


def localized(model: nn.Module, x: Tensor, y: Tensor, slow: str | None, **arguments: Any) -> Localization:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = localize(model, x, y, **arguments)
    told = [str(w.message) for w in caught]
    assert [slow in message for message in told] == [True] if slow else told == [], told
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"population": None, "verify": "all"},
        {"population": "exact", "verify": 3},
        {"how": "mean", "population": None},
        {"refresh": 1, "eot": 2},
        {"objective": "first_order"},
        {"method": "activation"},
        {"method": "integrated_gradients"},
        {"memory_budget": 1 << 14},
    ],
)
def test_the_search_is_that_of_the_recorded_model(arguments: dict[str, Any]) -> None:
    model, x, y = trained()
    arguments = {"reference": (x[8:12], y[8:12]), "max_units": 3, **arguments}
    sites = ["2", "9"]
    budget = {} if "memory_budget" not in arguments else {"memory_budget": 1 << 30}
    expected = localize(model, x[:4], y[:4], sites=sites, **(arguments | budget))
    slow = localized(
        Asking(model), x[:4], y[:4], "into Python; running the model once per unit and example",
        sites=[f"inner.{site}" for site in sites], **arguments,
    )  # fmt: skip
    assert [[(f"inner.{site}", unit) for site, unit in one.units] for one in expected] == [one.units for one in slow]
    for one, other in zip(expected, slow, strict=True):
        assert (one.status, one.predicted) == (other.status, other.predicted)
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.population_losses, other.population_losses, rtol=1e-4, atol=1e-5)
    assert slow.channel_dims == {"inner.2": 1, "inner.9": 1}


def test_heads() -> None:
    torch.manual_seed(0)
    model, x = ViT(3, 3, 8, dim=16, heads=4, depth=2, mlp=12, patch=4).eval(), torch.randn(3, 3, 8, 8)
    y, arguments = model(x).argmax(1), {"population": None, "max_units": 3}
    expected, slow = localize(model, x, y, **arguments), localized(Asking(model), x, y, "Python", **arguments)
    assert list(slow.sites) == [f"inner.{site}" for site in expected.sites]
    assert [[unit for _, unit in one.units] for one in expected] == [[unit for _, unit in one.units] for one in slow]


def test_example_tied_dropout() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 8, 3), nn.ReLU(), ExampleTiedDropout(0.3, 0.4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model, x, ids = nn.Sequential(*layers, nn.Linear(8, 3)), torch.randn(3, 2, 6, 6), torch.tensor([5, 1, 7])
    model[2].mode = "train"
    with example_ids(ids):
        y = model.eval()(x).argmax(1)
        expected = localize(model, x, y, sites=["2"], population=None)
        slow = localized(Asking(model), x, y, "Python", sites=["inner.2"], population=None)
    assert [[u for _, u in one.units] for one in expected] == [[u for _, u in one.units] for one in slow]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.project, self.rnn = nn.Linear(4, 5), kind(5, 6, 2, batch_first=batch_first, bidirectional=True)
        self.hidden, self.head, self.batch_first = nn.Linear(12, 7), nn.Linear(7, 3), batch_first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.project(x if self.batch_first else x.transpose(0, 1))
        x, state = self.rnn(x)
        return self.head(torch.relu(self.hidden(x.mean(1 if self.batch_first else 0)))), state[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(kind: type[nn.RNNBase], batch_first: bool) -> None:
    """As many examples as steps, layers times directions, or channels: it does not matter where the batch is."""
    torch.manual_seed(0)
    model, x = Recurrent(kind, batch_first).eval(), torch.randn(4, 4, 4)
    y = model(x)[0].argmax(1)
    arguments = {"sites": ["project", "hidden"], "population": None, "max_units": 3, "verify": 4}
    found = localized(model, x, y, f"rnn is a recurrent layer ({kind.__name__})", **arguments)
    assert found.channel_dims == {"project": 2, "hidden": 1}
    for i, one in enumerate(found):
        units = list[tuple[str, int]]()
        for unit, loss, predicted in zip(one.units, one.losses[1:], one.predicted[1:], strict=True):
            units.append(unit)
            with apply_ablation(model, units), torch.no_grad():
                logits = model(x[i : i + 1])[0]
            torch.testing.assert_close(loss, float(F.cross_entropy(logits, y[i : i + 1])), rtol=1e-4, atol=1e-5)
            assert predicted == int(logits.argmax())
        assert one.status in ("flipped", "capped")
        with found.edited(model, i), torch.no_grad():
            assert (int(model(x[i : i + 1])[0].argmax()) != int(y[i])) == (one.status == "flipped")


def test_instance_norm_keeps_examples_apart() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model, x = nn.Sequential(*layers, nn.Linear(6, 3)).eval(), torch.randn(4, 2, 6, 6)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    nn.init.normal_(model[1].bias)
    y = model(x).argmax(1)
    found = localized(model, x, y, None, population=None)
    confirm(model, x, y, found)
    assert same(localized(model, x[1:2], y[1:2], None, population=None), found[1:2])


class Meeting(Asking):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x - x.mean(0)


@pytest.mark.filterwarnings("ignore:localize")
def test_examples_that_meet_are_refused() -> None:
    model, x, y = trained()
    batch_norm = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), *model[6:])
    for meeting, why in ((Meeting(model), ""), (batch_norm, ": 1 normalises by the statistics of the batch")):
        with pytest.raises(UnsupportedError, match=f"examples meet in evaluation mode{why}"):
            localize(meeting, x[:4], y[:4], population=None)


@pytest.mark.parametrize("change", [{"how": "filter"}, {"unit": "weight"}, {"objective": "authors"}])
def test_filters_and_weights_need_a_recording(change: dict[str, Any]) -> None:
    model, x, y = trained()
    with pytest.raises(ValueError, match=r"need a model that can be recorded, but .* into Python; use how='zero' or"):
        localize(Asking(model), x[:4], y[:4], reference=(x[8:], y[8:]), **change)
