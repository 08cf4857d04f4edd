from typing import Any

import pytest
import torch
from localizing import network, trained
from torch import Tensor, nn

import memloc_ext
from memloc_ext.probes.localization import localize


def arguments(**change: Any) -> dict[str, Any]:
    model, x, y = trained()
    return {"model": model, "x": x[:4], "y": y[:4], "reference": (x[12:], y[12:]), "max_units": 2, **change}


X, Y = trained()[1:]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"y": Y[:4].int()}, TypeError, "localize: y must have dtype int64"),
        ({"y": Y[:4].float()}, TypeError, "localize: y must have dtype int64"),
        ({"y": Y[:4] + 1}, ValueError, r"y must be in \[0, 3\), got values from 1 to 3"),
        ({"y": Y[:4] - 1}, ValueError, r"y must be in \[0, 3\)"),
        ({"y": Y[:3]}, ValueError, "localize: x and y must have the same number of examples"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "localize: x and y must have .* at least one"),
        ({"reference": (X[:0], Y[:0])}, ValueError, "localize: reference: .* at least one"),
        ({"reference": (X[:2], Y[:3])}, ValueError, "localize: reference: .* same number"),
        ({"reference": (X[:2], Y[:2].int())}, TypeError, "localize: reference: y must have dtype int64"),
        ({"reference": None}, ValueError, "reference must be given for a population or how='mean', got None"),
        ({"reference": None, "population": None, "how": "mean"}, ValueError, "reference must be given"),
        ({"max_units": 0}, ValueError, "max_units must be at least 1, got 0"),
        ({"eot": 0}, ValueError, "eot must be at least 1, got 0"),
        ({"noise": -0.1}, ValueError, "noise must be at least 0, got -0.1"),
        ({"noise": float("nan")}, ValueError, "noise must be at least 0, got nan"),
        ({"noise": float("inf")}, ValueError, "noise must be finite, .* got inf"),
        ({"eot": 1.5}, TypeError, "eot must be an integer, got 1.5"),
        ({"max_units": 1.5}, TypeError, "max_units must be an integer, got 1.5"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"reference": (X[:2],)}, ValueError, "reference must be examples and labels, got 1 tensors"),
        ({"refresh": -1}, ValueError, "refresh must be at least 0, got -1"),
        ({"verify": 0}, ValueError, "verify must be a positive number or 'all', got 0"),
        ({"verify": "most"}, ValueError, "verify must be a positive number or 'all', got 'most'"),
        ({"verify": True}, ValueError, "verify must be a positive number or 'all', got True"),
        ({"objective": "best"}, ValueError, "objective must be one of exact, first_order, authors, got 'best'"),
        ({"population": "some"}, ValueError, "population must be one of first_order, exact, None, got 'some'"),
        ({"method": "guess"}, ValueError, "method must be one of search, .*, got 'guess'"),
        ({"how": "half"}, ValueError, "how must be one of zero, mean, filter, got 'half'"),
        ({"objective": "authors", "how": "mean"}, ValueError, "objective='authors' switches filters off"),
        ({"sites": ["nowhere"]}, ValueError, "sites must be names of the model's modules, got 'nowhere'"),
        ({"sites": []}, ValueError, "sites must name at least one module"),
        ({"memory_budget": 10}, ValueError, "memory_budget must be at least"),
        ({"x": torch.full_like(X[:4], torch.nan)}, ValueError, "logits must be finite"),
    ],
)
def test_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        localize(**arguments(**change))


def test_weights_that_are_not_numbers() -> None:
    for value in (torch.nan, torch.inf):
        model = network()
        with torch.no_grad():
            model[3].weight[0, 0] = value
        for change in ({}, {"population": None}, {"population": "exact"}, {"how": "mean"}, {"objective": "authors"}):
            with pytest.raises(ValueError, match="logits must be finite, got NaN or infinity in the unchanged network"):
                localize(**arguments(model=model, **change))


def test_labels_of_the_reference() -> None:
    with pytest.raises(ValueError, match="reference"):
        localize(**arguments(reference=(X[12:], Y[12:] + 1)))


def test_a_reference_where_the_model_needs_example_ids() -> None:
    dropout = memloc_ext.nn.ExampleTiedDropout(0.3, 0.4)
    dropout.mode = "train"
    tied = nn.Sequential(*trained()[0][:3], dropout, *trained()[0][3:])
    with memloc_ext.example_ids(torch.arange(4)), pytest.raises(ValueError, match="reference"):
        localize(**arguments(model=tied))


def test_tokens() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 3))
    tokens = torch.randint(0, 9, (4, 5))
    y = model(tokens).argmax(1)
    localize(model, tokens, y, sites=["2"], population=None, noise=0.0)
    with pytest.raises(ValueError, match=r"0 unless x is floating, got 0\.01 for torch\.int64"):
        localize(model, tokens, y, sites=["2"], population=None)


def test_units_without_which_nothing_is_predicted() -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().mean((2, 3)).log()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), Logarithm(), nn.Linear(4, 3))
    x = torch.randn(4, 2, 6, 6)
    y = model(x).argmax(1)
    found = localize(model, x, y, sites=["1", "2"], population=None, verify="all", max_units=1)
    assert all(one.units[0][0] == "1" and one.losses[-1] < float("inf") for one in found)


@pytest.mark.parametrize("how", ["zero", "filter"])
def test_sites_that_are_the_same_units(how: str) -> None:
    model = nn.Sequential(trained()[0][:3], trained()[0][3:])
    with pytest.raises(ValueError, match="same"):
        localize(**arguments(model=model, sites=["0", "0.2"], how=how))
