"""Models that a recording cannot repeat run once per unit, with a warning, and what is no model or argument raises."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ablating import Model, check, labels, recorded
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import ablation_losses
from memloc_ext.ablation.recording import UnsupportedError

B = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def images(batch: int = B) -> Tensor:
    return torch.randn(batch, 2, 6, 6)


ASKING: dict[str, Callable[[Tensor], Any]] = {  # of the first channel: whether it is switched off
    "item": lambda t: t.abs().sum().item() == 0,
    "bool": lambda t: bool((t == 0).all()),
    "tolist": lambda t: set(t.flatten().tolist()) == {0.0},
    "numpy": lambda t: not t.numpy().any(),
    "array": lambda t: not np.asarray(t).any(),
    "dlpack": lambda t: not np.from_dlpack(t).any(),
    "equal": lambda t: torch.equal(t, torch.zeros_like(t)),
    "nonzero": lambda t: len(t.nonzero()) == 0,
    "mask": lambda t: len(t[t != 0]) == 0,
    "unique": lambda t: len(t.unique()) == 1,
}


@pytest.mark.parametrize("name", ASKING)
def test_reading_an_activation(name: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        x = m.conv(x)
        return m.head(x * 2 if ASKING[name](x[:, 0]) else x + 1)

    check(
        Model(forward, conv=nn.Conv2d(2, 4, 3), head=head()),
        images(1),
        ["conv"],
        slow="index" if name == "mask" else "reads an activation",
    )


def test_reading_the_shape_is_none() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        x = m.conv(x)
        return m.head(x * x.shape[2] + torch.zeros_like(x) + torch.arange(4.0).view(4, 1, 1).to(x))

    check(Model(forward, conv=nn.Conv2d(2, 4, 3), head=head()), images(), ["conv"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_take_no_hooks() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3)))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), scripted, head())
    check(model, images(), ["0"])
    with pytest.raises(ValueError, match="sites: 1 is not called"):
        ablation_losses(model, images(), labels(B), ["1"])


def test_writing_through_a_view() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        x = m.conv(x)
        x[:, 1] *= 3
        return m.head(x)

    check(Model(forward, conv=nn.Conv2d(2, 4, 3), head=head()), images(), ["conv"], slow="through a view")


@pytest.mark.parametrize("batch", [1, B])
def test_a_buffer_that_is_written(batch: int) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        m.memory[0].copy_(m.conv(x)[0])
        return m.head(m.conv(x) + m.memory)

    model = Model(forward, conv=nn.Conv2d(2, 4, 3), head=head())
    model.register_buffer("memory", torch.zeros(1, 4, 4, 4))
    check(model, images(batch), ["conv"], slow="running the model once per unit")


def test_a_part_of_a_buffer_that_is_written() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        own = m.memory[: len(x)]
        own.copy_(m.conv(x))
        return m.head(own.add_(1) + m.other(x))

    model = Model(forward, conv=nn.Conv2d(2, 4, 3), other=nn.Conv2d(2, 4, 3), head=head())
    model.register_buffer("memory", torch.zeros(9, 4, 4, 4))
    check(model, images(), ["conv", "other"])


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_statistics_of_the_batch(how: str) -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), head())
    check(model, images(), ["0", "2"], how, slow="normalises by the statistics of the batch")


def test_examples_that_meet() -> None:
    model = Model(lambda m, x: m.head(m.conv(x) - m.conv(x).mean(0)), conv=nn.Conv2d(2, 4, 3), head=head())
    check(model, images(), ["conv"], slow="examples meet")
    model = Model(lambda m, x: m.head(m.conv(x) * len(x)), conv=nn.Conv2d(2, 4, 3), head=head())
    check(model, images(), ["conv"], slow="examples meet")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(kind: type[nn.RNNBase], how: str, batch_first: bool) -> None:
    parts = {"project": nn.Linear(4, 6), "rnn": kind(6, 5, batch_first=batch_first), "hidden": nn.Linear(5, 7)}

    def forward(m: Model, x: Tensor) -> Tensor:
        x = m.project(x if batch_first else x.transpose(0, 1))
        x = m.rnn(x)[0]
        return m.head(torch.relu(m.hidden(x[:, -1] if batch_first else x[-1])))

    model = Model(forward, **parts, head=nn.Linear(7, 3))
    slow = rf"rnn is a recurrent layer ({kind.__name__})"
    assert set(check(model, torch.randn(B, 5, 4), ["project", "hidden"], how, slow=slow)) == {"project", "hidden"}
    assert "hidden" in check(model, torch.randn(B, 5, 4), None, how, slow=slow)  # by default too


def test_a_constant_output() -> None:
    model = Model(lambda m, x: m.head(m.conv(x)) * 0 + 1, conv=nn.Conv2d(2, 4, 3), head=head())
    found = ablation_losses(model, images(), labels(B))
    assert torch.equal(found["conv"].loss, found.base_loss.expand(4, B))
    assert torch.equal(found["conv"].predicted, torch.zeros(4, B, dtype=torch.int64))
    model = Model(lambda m, x: (m.conv(x), m.bias.expand(len(x), -1))[1], conv=nn.Conv2d(2, 4, 3))
    model.bias = nn.Parameter(torch.randn(3))
    with pytest.warns(UserWarning, match="must return tensors that depend on its input"):
        found = ablation_losses(model, images(), labels(B), ["conv"])
    assert torch.equal(found["conv"].loss, found.base_loss.expand(4, B))


def test_what_comes_after_the_site_but_not_from_it() -> None:
    model = Model(
        lambda m, x: (m.unused(x), m.head(m.conv(x)))[1],
        unused=nn.Conv2d(2, 4, 3),
        conv=nn.Conv2d(2, 4, 3),
        head=head(),
    )
    found = ablation_losses(model, images(), labels(B))
    torch.testing.assert_close(found["unused"].loss, found.base_loss.expand(4, B))


@pytest.mark.parametrize("factor", [2, None])
def test_what_is_computed_from_the_site_but_not_returned(factor: float | None) -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        x = m.conv(x).mean((2, 3))
        logits = m.linear(x)
        m.kept = (m.other(x) if factor is None else logits * factor).sum()
        return logits

    check(
        Model(function, conv=nn.Conv2d(2, 4, 3), linear=nn.Linear(4, 3), other=nn.Linear(4, 3)),
        images(),
        ["conv"],
    )


def test_a_recording_refuses() -> None:
    model = Model(lambda m, x: m.conv(x) * x.sum().item(), conv=nn.Conv2d(2, 4, 3))
    with pytest.raises(UnsupportedError, match="reads an activation into Python"):
        recorded(model, images())
    assert recorded(model, images(), strict=False).returned["conv"] != [None]


# arguments


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"y": labels(B).int()}, TypeError, "y must have dtype int64"),
        ({"y": labels(B) + 1}, ValueError, r"y must be in \[0, 3\), got values from 1 to 3"),
        ({"y": labels(B) - 1}, ValueError, "y must be in"),
        ({"y": labels(B + 1)}, ValueError, "same number of examples"),
        ({"y": labels(B)[:, None]}, ValueError, "same number of examples"),
        ({"x": torch.zeros(0, 2, 6, 6), "y": labels(0)}, ValueError, "at least one"),
        ({"sites": []}, ValueError, "sites must name at least one module"),
        ({"sites": "0"}, ValueError, "sites must be a list"),
        ({"sites": ["0", "0"]}, ValueError, "sites must be a list of different"),
        ({"sites": ["9"]}, ValueError, "sites must be names of the model's modules, got '9'"),
        ({"sites": [""]}, ValueError, "sites must be names of the model's modules"),
        ({"sites": ["0.heads"]}, ValueError, "0 calls no scaled_dot_product_attention"),
        ({"how": "half"}, ValueError, "how must be one of zero, mean, filter, got 'half'"),
        (
            {"how": "filter", "sites": ["2"]},
            ValueError,
            "how='filter' and changes of weights need",
        ),
        ({"how": "filter", "sites": ["3"]}, ValueError, "how='filter' and changes"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be at least"),
        ({"x": torch.full((B, 2, 6, 6), torch.nan)}, ValueError, "logits must be finite"),
        ({"model": nn.Sequential(nn.Conv2d(2, 4, 3))}, ValueError, r"needs logits \[batch, classes\]"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(72, 3))}, ValueError, "no convolution or hidden linear layer"),
    ],
)
def test_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {"model": small(), "x": images(), "y": labels(B), **change}
    if "model" in change and len(arguments["model"]) == 1:
        arguments["sites"] = ["0"]
    with pytest.raises(error, match=match):
        ablation_losses(**arguments)


@pytest.mark.filterwarnings("ignore:ablation_losses")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"sites": ["conv"], "how": "filter"},
            "need a model that can be recorded, but .* reads an activation into Python; use how='zero'",
        ),
        ({"sites": ["none"]}, "sites must be names of the model's modules, got 'none'"),
        ({"sites": ["unused"]}, "sites: unused is not called"),
        ({"sites": ["conv.heads"]}, "conv calls no scaled_dot_product_attention"),
        ({"sites": ["pair"]}, "sites: pair must return one tensor"),
    ],
)
def test_arguments_of_models_that_run_once_per_unit(change: dict[str, Any], match: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        return m.head(F.relu(m.pair(m.conv(x))[0])) * (1 if x.sum() < 1e9 else 2)

    pair = Model(lambda m, x: (x, x))
    model = Model(forward, conv=nn.Conv2d(2, 4, 3), unused=nn.ReLU(), pair=pair, head=head())
    with pytest.raises(ValueError, match=match):
        ablation_losses(model, images(), labels(B), **change)
