import copy
from typing import Any

import pytest
import torch
from localizing import SITES, confirm, every_unit, network, network_of, same, trained, without
from torch import Tensor, nn
from torch.nn import functional as F

import memloc_ext
from memloc_ext.probes.localization import localize
from memloc_ext.probes.localization.ranking import METHODS


def run(n: int = 8, **settings: Any) -> Any:
    model, x, y = trained()
    return localize(model, x[:n], y[:n], **{"reference": (x[12:], y[12:]), **settings})


SETTINGS: list[dict[str, Any]] = [
    {},
    {"verify": 1},
    {"verify": "all"},
    {"population": None, "reference": None},
    {"population": "exact", "verify": 4},
    {"refresh": 1},
    {"refresh": 2, "verify": 3},
    {"objective": "first_order"},
    {"sites": ["5"]},
    {"eot": 1, "noise": 0.0},
    {"seed": -3},
    {"memory_budget": 60_000},
    *({"method": method} for method in METHODS),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_flips_are_confirmed_by_plain_forward_passes(settings: dict[str, Any]) -> None:
    model, x, y = trained()
    found = run(**settings)
    confirm(model, x[:8], y[:8], found)
    assert found.sites == ({"5": 6} if "sites" in settings else SITES)
    assert {one.status for one in found} <= {"flipped", "exhausted"}
    assert any(one.status == "flipped" for one in found)


@pytest.mark.parametrize("how", ["mean", "filter"])
def test_other_ways_to_switch_off(how: str) -> None:
    model, x, y = trained()
    found = run(how=how)
    if how == "mean":
        with torch.no_grad():
            two, five, nine = (model[:n](x[12:]).movedim(1, 0).flatten(1).mean(1) for n in (3, 6, 10))
        for site, mean in (("2", two), ("5", five), ("9", nine)):
            torch.testing.assert_close(found.baselines[site], mean)
        confirm(model, x[:8], y[:8], found, found.baselines)
        return
    for i, one in enumerate(found):
        edited = copy.deepcopy(model)
        for site, unit in one.units:
            edited[{"2": 0, "5": 3, "9": 8}[site]].weight.detach()[unit] = 0
        label = edited(x[i : i + 1]).argmax().item()
        assert label == one.predicted[-1]
        assert (label != y[i]) == (one.status == "flipped")


def test_the_way_of_the_authors() -> None:
    found = run(3, objective="authors", max_units=4)
    assert {one.status for one in found} <= {"flipped", "capped"}
    assert all(len(one.population_losses) == len(one.losses) for one in found)


def test_statuses() -> None:
    model, x, y = trained()
    labels = y[:4].clone()
    labels[1] = (labels[1] + 1) % 3
    found = localize(model, x[:4], labels, population=None, max_units=1, method="random")
    confirm(model, x[:4], labels, found)
    assert found[1].status == "already_wrong"
    assert (found[1].units, len(found[1].losses)) == ([], 1)
    assert {one.status for one in found} == {"already_wrong", "capped"}
    constant = network().eval()
    with torch.no_grad():
        constant[10].weight.zero_()
    wins = constant[10].bias.argmax().repeat(2)
    found = localize(constant, x[:2], wins, population=None)
    assert [one.status for one in found] == ["exhausted"] * 2
    assert [sorted(one.units) for one in found] == [sorted(every_unit())] * 2
    found = localize(constant, x[:2], wins, reference=(x, y), max_units=7)
    assert [(one.status, len(one.units)) for one in found] == [("capped", 7)] * 2
    assert len(localize(constant, x[:2], wins, population=None, max_units=20)[0].units) == 20


def test_an_untrained_model() -> None:
    torch.manual_seed(1)
    model, (_, x, y) = network(), trained()
    found = localize(model, x, y, reference=(x, y), max_units=3)
    confirm(model.eval(), x, y, found)
    assert "already_wrong" in {one.status for one in found}


@pytest.mark.parametrize("method", METHODS)
def test_examples_do_not_depend_on_each_other(method: str) -> None:
    model, x, y = trained()
    settings: dict[str, Any] = {"reference": (x[12:], y[12:]), "noise": 0.0, "eot": 1, "method": method}
    together = localize(model, x[:6], y[:6], **settings)
    assert same(together[:3], localize(model, x[:3], y[:3], **settings))
    if method != "random":  # whose draws belong to the position
        alone = [localize(model, x[i : i + 1], y[i : i + 1], **settings)[0] for i in range(6)]
        assert same(together, alone)


def test_nor_does_their_noise() -> None:
    model, x, y = trained()
    settings: dict[str, Any] = {"reference": (x[12:], y[12:]), "noise": 3.0, "eot": 1, "objective": "first_order"}
    alone = [localize(model, x[i : i + 1], y[i : i + 1], **settings)[0] for i in range(6)]
    assert same(localize(model, x[:6], y[:6], **settings), alone)


def test_seeds() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = run(method="random"), run(method="random"), run(method="random", seed=1)
    assert same(first, again)
    assert not same(first, other)
    assert same(run(noise=0.5, seed=2), run(noise=0.5, seed=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "settings", [{}, {"population": "exact", "verify": 4}, {"refresh": 1}, {"method": "activation"}]
)
def test_memory_budgets(settings: dict[str, Any]) -> None:
    plenty = run(noise=0.0, **settings)
    with pytest.raises(ValueError, match=r"memory_budget must be at least \d+ bytes") as error:
        run(memory_budget=1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    for budget in (least, 3 * least):
        assert same(run(noise=0.0, memory_budget=budget, **settings), plenty)


class Nested(nn.Module):
    """Sites of which one is computed channel by channel from another, next to what depends on neither."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other, self.second = (nn.Conv2d(i, 6, 3, padding=1) for i in (2, 2, 12))
        self.relu, self.tanh, self.linear = nn.ReLU(), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        y = torch.cat([y.exp() + self.tanh(y), self.other(x)], 1)
        return self.linear(self.second(y).sin().mean((2, 3)))


def test_sites_within_what_is_computed_from_others() -> None:
    torch.manual_seed(0)
    model, x, y = Nested().eval(), torch.randn(2, 2, 6, 6), torch.zeros(2, dtype=torch.int64)
    nn.init.constant_(model.linear.bias[:1].detach(), 10)  # so that no unit flips and all are switched off
    found = localize(model, x, y, sites=["tanh", "conv", "relu"], population=None, verify="all", noise=0.0, eot=1)
    assert [one.status for one in found] == ["exhausted"] * 2
    confirm(model, x, y, found)


@pytest.mark.parametrize("settings", [{}, {"unit": "weight"}, {"how": "filter"}])
def test_a_site_that_nothing_is_computed_from(settings: dict[str, Any]) -> None:
    class Unused(Nested):
        def forward(self, x: Tensor) -> Tensor:
            self.second(torch.cat([self.conv(x), x.repeat(1, 3, 1, 1)], 1))
            return self.linear(self.other(x).mean((2, 3)))

    model, x = Unused().eval(), torch.randn(4, 2, 6, 6)
    y = model(x).argmax(1)
    found = localize(model, x, y, sites=["second"], reference=(x, y), max_units=3, **settings)
    assert all(one.status == "capped" and len(set(one.losses)) == 1 for one in found)
    assert all(len(set(one.population_losses)) == 1 for one in found)


def test_edited_values_count_as_memory() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(2, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        torch.randn(1, 2, 6, 6),
    )
    suffix = network_of(model, x, ["0", "1"], "zero", 1 << 30, True).suffixes[0]
    assert suffix.bytes_per_row >= 64 * 4 * 4 * 4  # all channels of the ReLU's output, not the one that changes


def test_progress() -> None:
    counts: list[int] = []
    run(8, progress=counts.append)
    assert sum(counts) == 8


def test_the_model_is_left_as_it_was() -> None:
    model, x, y = trained()
    model = copy.deepcopy(model).train()
    model[1].eval()
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    grads, modes = [p.grad.clone() for p in model.parameters()], [m.training for m in model.modules()]
    for population in ("first_order", "exact", None):
        localize(model, x[:2], y[:2], reference=(x[12:], y[12:]), population=population, max_units=2)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_images_with_gradients() -> None:
    model, x, y = trained()
    found = localize(
        model, x[:4].clone().requires_grad_(), y[:4], reference=(x.clone().requires_grad_(), y), how="mean"
    )
    assert not any(t.requires_grad for t in found.baselines.values())


def test_example_tied_dropout() -> None:
    (model, x, y), dropout = trained(), memloc_ext.nn.ExampleTiedDropout(0.3, 0.4)
    dropout.mode = "train"
    tied = nn.Sequential(*model[:3], dropout, *model[3:])
    with memloc_ext.example_ids(torch.arange(6)):
        found = localize(tied, x[:6], y[:6], population=None)
    for i, one in enumerate(found):
        with memloc_ext.example_ids(torch.tensor([i])), torch.no_grad():
            assert tied(x[i : i + 1]).argmax().item() == one.predicted[0]
            with without(tied, [(site, unit) for site, unit in one.units]):
                assert tied(x[i : i + 1]).argmax().item() == one.predicted[-1]
