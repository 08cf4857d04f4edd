"""Single weights and gradient steps, against a search that changes a copy of the model and runs it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from localizing import network_of
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.ablation.unit_sets import Candidates
from memloc_ext.ablation.weight_sets import ChangedWeights
from memloc_ext.ablation.weights import find_filters
from memloc_ext.probes.localization import localize

WAYS = [("weight", "zero"), ("weight", "step"), ("channel", "step")]


class Residual(nn.Module):
    """Convolutions of every geometry, one of them beside a shortcut, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.beside = nn.Sequential(nn.Conv2d(3, 3, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(3))
        self.down = nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1)), nn.ReLU())
        self.hidden = nn.Linear(4 * 2 * 6, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.down(torch.relu(x + self.beside(x)))
        return self.last(torch.relu(self.hidden(x.flatten(1))))


class Tokens(nn.Module):
    """Linear layers that see several positions of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)[:, :, :4]
        return self.last(torch.tanh(self.two(torch.tanh(self.one(x)))).mean(1))


LAYERS = {Residual: ["first.0", "beside.0", "down.0", "hidden"], Tokens: ["one", "two"]}


def _model(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model: Any = kind().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = torch.randn(3).double() / 4, torch.rand(3).double() + 0.5
    logits = model(torch.randn(64, 2, 5, 5, dtype=torch.float64))
    model.last.bias.data -= logits.mean(0)  # so that no class is the label of all
    return model


def _examples(model: nn.Module, n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 2, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, model(x).argmax(1)


def _gradients(model: nn.Module, names: list[str], x: Tensor, y: Tensor) -> list[Tensor]:
    weights = [model.get_submodule(name).weight for name in names]
    return list(torch.autograd.grad(F.cross_entropy(model(x), y), weights))


def _by_unit(t: Tensor, unit: str) -> Tensor:
    return t.reshape(-1, 1) if unit == "weight" else t.flatten(1)


def _scores(
    model: nn.Module, names: list[str], unit: str, step: float | None, own: list[Tensor], others: list[Tensor]
) -> tuple[list[tuple[str, int]], Tensor, list[Tensor], Tensor]:
    """Return units, their scores, what is added to their weights, and the effect on the population."""
    units, scores, changes, effects = [], [], [], []
    for name, mine, theirs in zip(names, own, others, strict=True):
        weight = model.get_submodule(name).weight.detach()
        change = -weight if step is None else step * (mine - theirs)
        units += [(name, i) for i in range(len(_by_unit(weight, unit)))]
        scores.append(_by_unit(change * (mine - theirs), unit).sum(1))
        effects.append(_by_unit(change * theirs, unit).sum(1))
        changes += list(_by_unit(change, unit))
    return units, torch.cat(scores), changes, torch.cat(effects)


def _changed(model: nn.Module, name: str, unit: int, change: Tensor, kind: str) -> nn.Module:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        _by_unit(changed.get_submodule(name).weight, kind)[unit] += change
    return changed


def _naive(
    model: nn.Module, names: list[str], x: Tensor, y: Tensor, reference: tuple[Tensor, Tensor], **settings: Any
) -> tuple[list[tuple[str, int]], list[float], list[float]]:
    """Search for one example; return units, losses and population losses."""
    unit, step, population = settings["unit"], settings["step"], settings["population"]
    none = [torch.zeros_like(model.get_submodule(name).weight) for name in names]
    shared = none if population is None else _gradients(model, names, *reference)
    losses, found = [F.cross_entropy(model(x), y).item()], []
    populations = [F.cross_entropy(model(reference[0]), reference[1]).item()]
    while len(found) < settings["max_units"]:
        refreshed = settings["refresh"] and found and len(found) % settings["refresh"] == 0
        others = _gradients(model, names, *reference) if refreshed else shared
        units, scores, changes, effects = _scores(model, names, unit, step, _gradients(model, names, x, y), others)
        for i, one in enumerate(units):
            if one in found:
                scores[i] = -torch.inf
        tried = []
        for i in scores.topk(settings["verify"]).indices.tolist():
            edited = _changed(model, *units[i], changes[i], unit)
            logits, effect = edited(x), effects[i].item()
            if population == "exact":
                effect = F.cross_entropy(edited(reference[0]), reference[1]).item() - populations[-1]
            loss, flipped = F.cross_entropy(logits, y).item(), bool((logits.argmax(1) != y).all())
            tried.append((flipped, loss - losses[-1] - effect, i, loss, effect, edited))
        flipped, _, i, loss, effect, model = max(tried, key=lambda row: row[:2])
        found.append(units[i])
        losses.append(loss)
        populations.append(populations[-1] + effect)
        if flipped:
            break
    return found, losses, populations if population else []


@pytest.mark.parametrize("kind", [Residual, Tokens])
@pytest.mark.parametrize(("unit", "action"), WAYS)
@pytest.mark.parametrize(("population", "refresh"), [("first_order", 0), ("first_order", 2), ("exact", 0), (None, 0)])
def test_search_finds_what_changing_a_copy_finds(
    kind: Any, unit: str, action: str, population: str | None, refresh: int
) -> None:
    model = _model(kind)
    (x, y), reference, step = _examples(model, 3), _examples(model, 6, seed=2), 0.3
    settings = {"unit": unit, "population": population, "refresh": refresh, "max_units": 5, "verify": 4}
    found = localize(
        model,
        x,
        y,
        sites=LAYERS[kind],
        reference=reference,
        action=action,
        step_size=step,
        eot=1,
        noise=0.0,
        **settings,
    )
    for i, one in enumerate(found):
        units, losses, populations = _naive(
            model,
            LAYERS[kind],
            x[i : i + 1],
            y[i : i + 1],
            reference,
            step=step if action == "step" else None,
            **settings,
        )
        assert one.units == units
        assert one.losses == pytest.approx(losses, rel=1e-9, abs=1e-12)
        assert one.population_losses == pytest.approx(populations, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", [Residual, Tokens])
@pytest.mark.parametrize(("unit", "action"), WAYS)
def test_scores_are_those_of_autograd(kind: Any, unit: str, action: str) -> None:
    model, names, step = _model(kind), LAYERS[kind], 0.3 if action == "step" else None
    x, y = _examples(model, 2)
    network = network_of(model, x, names, "filter", 1 << 26, True, True)
    sites = [site.name for site in network.sites]
    filters = find_filters(model, network.graph, network.sites, unit == "weight")
    sets = ChangedWeights.none(network, filters, step, 2)
    others = _gradients(model, sites, *_examples(model, 6, seed=2))
    population = torch.cat([grad.flatten() for grad in others])
    models = [model, model]

    def screen(count: int) -> Candidates:
        rows = torch.arange(2).repeat_interleave(2)
        noisy = x[rows] + 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(-1, 1, 1, 1)
        seen.append(noisy)
        return sets.of(rows).screen([noisy], _mean_of_two(y), 2, population, count)

    for done in range(3):
        seen: list[Tensor] = []
        screened = screen(sets.starts[-1] - done)
        for i in range(2):
            copies = seen[0][2 * i : 2 * i + 2]
            weights = [models[i].get_submodule(name).weight for name in sites]
            loss = _mean_of_two(y[i : i + 1])(models[i](copies))
            own = list(torch.autograd.grad(loss, weights))
            units, scores, changes, effects = _scores(models[i], sites, unit, step, own, others)
            order = screened.units[i]
            torch.testing.assert_close(screened.scores[i], scores[order], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(screened.effects[i], effects[order], rtol=1e-9, atol=1e-12)
            best = int(order[0])
            assert screened.changes is not None
            own_change = screened.changes[i, 0, : len(changes[best])]
            torch.testing.assert_close(own_change, changes[best], rtol=1e-9, atol=1e-12)
            models[i] = _changed(models[i], *units[best], changes[best], unit)
        sets.add(torch.arange(2), screened.pick(torch.zeros(2, 1, dtype=torch.int64)))


def _mean_of_two(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits.unflatten(0, (-1, 2)).mean(1), y, reduction="sum")


@pytest.mark.parametrize(
    "settings",
    [{"unit": unit, "action": action, "step_size": 2.0} for unit, action in WAYS]
    + [{"how": how} for how in ("zero", "mean", "filter")],
)
def test_every_flip_is_confirmed_and_the_model_put_back(settings: dict[str, Any]) -> None:
    model = _model(Residual)
    x, y = _examples(model, 8)
    before = copy.deepcopy(model.state_dict())
    found = localize(model, x, y, reference=(x, y), max_units=30, **settings)
    assert "flipped" in {one.status for one in found}
    for i, one in enumerate(found):
        with found.edited(model, i) as edited, torch.no_grad():
            logits = edited(x[i : i + 1])
        assert int(logits.argmax()) == one.predicted[-1]
        assert F.cross_entropy(logits, y[i : i + 1]).item() == pytest.approx(one.losses[-1], rel=1e-9)
        assert (int(logits.argmax()) != int(y[i])) == (one.status == "flipped")
        torch.testing.assert_close(found.edited(model, i).copy()(x[i : i + 1]), logits, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="stop"), found.edited(model, 0):
        raise RuntimeError("stop")
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


@pytest.mark.parametrize(("unit", "action"), WAYS)
def test_examples_and_budgets_do_not_meet(unit: str, action: str) -> None:
    model = _model(Residual)
    (x, y), reference = _examples(model, 4), _examples(model, 6, seed=2)
    settings: dict[str, Any] = {"reference": reference, "unit": unit, "action": action, "max_units": 3, "noise": 0.0}
    together = localize(model, x, y, **settings)
    tight = localize(model, x, y, memory_budget=40_000, **settings)
    for i in range(4):
        (alone,) = localize(model, x[i : i + 1], y[i : i + 1], **settings)
        for other in (alone, tight[i]):
            assert together[i].units == other.units
            assert together[i].status == other.status
            assert together[i].losses == pytest.approx(other.losses, rel=1e-9)


def test_statuses() -> None:
    model = _model(Tokens)
    x, y = _examples(model, 2)
    settings: dict[str, Any] = {"population": None, "unit": "weight", "action": "step", "step_size": 1e-9}
    wrong = localize(model, x, (y + 1) % 3, **settings)
    assert [one.status for one in wrong] == ["already_wrong"] * 2
    assert [one.status for one in localize(model, x, y, max_units=2, **settings)] == ["capped"] * 2
    (one,) = localize(model, x[:1], y[:1], sites=["two"], max_units=99, **settings)
    assert one.status == "exhausted"
    assert sorted(unit for _, unit in one.units) == list(range(24))


def test_verifying_all_tells_the_recall() -> None:
    model = _model(Tokens)
    x, y = _examples(model, 2)
    found = localize(model, x, y, population=None, unit="weight", verify="all", max_units=3)
    assert 0 <= found.recall[1] <= found.recall[8] <= found.recall[32] <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "neuron"}, "unit must be one of channel, weight"),
        ({"action": "double"}, "action must be one of zero, step"),
        ({"action": "step", "step_size": 0.0}, "step_size must be positive"),
        ({"action": "step", "step_size": float("nan")}, "step_size must be positive"),
        ({"unit": "weight", "method": "random"}, "method must be 'search'"),
        ({"unit": "weight", "how": "mean"}, "how must be 'zero'"),
        ({"action": "step", "objective": "authors"}, "objective='authors'"),
        ({"unit": "weight", "sites": [""]}, "names of the model's modules"),
        ({"unit": "weight", "memory_budget": 9_000}, "memory_budget must"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    model = _model(Residual)
    x, y = _examples(model, 2)
    with pytest.raises(ValueError, match=message):
        localize(model, x, y, reference=(x, y), **settings)


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x[:, 0, 0]).relu()).relu())


class _Computed(_Shared):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.a(x[:, 0, 0]).relu())


class _Grouped(nn.Module):
    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.a, self.last = kind(2, 4, 3, **settings), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.a(x).relu().flatten(1))


@pytest.mark.parametrize(
    ("model", "sites", "message"),
    [
        (_Shared, ["a"], "serve one call alone"),
        (_Computed, ["a"], "no parameter of the model"),
        (lambda: _Grouped(nn.Conv2d, groups=2), None, "without groups"),
        (lambda: _Grouped(nn.ConvTranspose2d), None, "plain 2-D"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Softmax(1), nn.Linear(50, 3)), ["1"], "one convolution or linear"),
    ],
)
def test_layers_without_weights_of_their_own_are_refused(model: Any, sites: Any, message: str) -> None:
    net = model().double().eval()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        localize(net, x, net(x).argmax(1), sites=sites, population=None, unit="weight")
