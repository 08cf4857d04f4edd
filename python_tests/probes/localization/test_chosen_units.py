"""Which unit is chosen in a step: against scores from plain forward and backward passes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from localizing import SITES, every_unit, judge, trained, without
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.probes.localization import Localization, localize

LAYERS = {"2": 0, "5": 3, "9": 8}  # whose filters make up the sites
Units = list[tuple[str, int]]


def run(n: int, **settings: Any) -> Localization:
    model, x, y = trained()
    return localize(model, x[:n], y[:n], **{"reference": (x[12:], y[12:]), "noise": 0.0, "eot": 1, **settings})


def effects(units: list[tuple[str, int]], x: Tensor, y: Tensor) -> Tensor:
    """Return each unit's exact loss per example with some units off, ``[units, examples]``."""
    model = trained()[0]
    return torch.stack([judge(model, x, y, [*units, unit])[0] for unit in every_unit()])


@pytest.mark.parametrize("population", [None, "exact"])
def test_the_exhaustive_search_against_naive(population: str | None) -> None:
    model, x, y = trained()
    found = run(6, verify="all", population=population, max_units=3, noise=0.0, eot=1)
    for i, one in enumerate(found):
        for n, unit in enumerate(one.units):
            off = one.units[:n]
            own = effects(off, x[i : i + 1], y[i : i + 1])[:, 0] - one.losses[n]
            if population is not None:
                torch.testing.assert_close(
                    one.population_losses[n], judge(model, x[12:], y[12:], off)[0].mean().item(), rtol=1e-4, atol=1e-5
                )
                own = own - (effects(off, x[12:], y[12:]).mean(1) - one.population_losses[n])
            flips = torch.tensor(
                [
                    u not in off and bool(judge(model, x[i : i + 1], y[i : i + 1], [*off, u])[1] != y[i])
                    for u in every_unit()
                ]
            )
            allowed = flips if flips.any() else torch.tensor([u not in off for u in every_unit()])
            best = own[allowed].max()
            assert allowed[every_unit().index(unit)]
            assert own[every_unit().index(unit)] >= best - 1e-5


def activations(x: Tensor, units: Units) -> tuple[dict[str, Tensor], Tensor]:
    """Return what the sites return, with some units switched off, and the logits."""
    model, seen = trained()[0], {}
    with without(model, units):
        handles = [
            model.get_submodule(site).register_forward_hook(lambda module, args, t, site=site: seen.update({site: t}))
            for site in SITES
        ]
        logits = model(x)
        for handle in handles:
            handle.remove()
    return seen, logits


def first_order(loss: Callable[[Tensor], Tensor], x: Tensor, units: Units) -> Tensor:
    """Return what switching each unit off does to a loss of the logits, to first order, ``[units]``."""
    seen, logits = activations(x, units)
    grads = torch.autograd.grad(loss(logits), list(seen.values()))
    changes = [-(t * g).movedim(1, 0).flatten(1).sum(1) for t, g in zip(seen.values(), grads, strict=True)]
    return torch.cat(changes).detach()


def assert_best(unit: tuple[str, int], scores: Tensor, off: Units) -> None:
    """Check that a unit has the largest score of those that are not off, but for rounding."""
    left = torch.tensor([u not in off for u in every_unit()])
    assert unit not in off
    assert scores[every_unit().index(unit)] >= scores[left].max() - 1e-5


@pytest.mark.parametrize("population", [None, "first_order"])
@pytest.mark.parametrize("refresh", [0, 1, 2])
def test_the_screen(population: str | None, refresh: int) -> None:
    _, x, y = trained()
    found = run(4, objective="first_order", population=population, refresh=refresh, max_units=5)
    for i, one in enumerate(found):
        for n, unit in enumerate(one.units):
            off = one.units[:n]
            own = first_order(lambda logits, i=i: F.cross_entropy(logits, y[i : i + 1]), x[i : i + 1], off)
            if population is None:
                assert one.population_losses == []
                assert_best(unit, own, off)
                continue
            measured_at = n if refresh and n % refresh == 0 else 0
            at = one.units[:measured_at]
            all_of_them = first_order(lambda logits: F.cross_entropy(logits, y[12:]), x[12:], at)
            assert_best(unit, own - all_of_them, off)
            step = one.population_losses[n + 1] - one.population_losses[n]
            assert step == pytest.approx(all_of_them[every_unit().index(unit)].item(), abs=1e-5)
        if population is not None:
            assert one.population_losses[0] == pytest.approx(
                judge(trained()[0], x[12:], y[12:], [])[0].mean().item(), abs=1e-5
            )


def test_the_score_of_the_authors() -> None:
    """The example is one of the reference here: it is left out."""
    model, x, y = trained()
    found = run(3, objective="authors", reference=(x, y), max_units=4)
    for i, one in enumerate(found):
        others = torch.arange(len(x)) != i
        for n, unit in enumerate(one.units):
            edited = copy.deepcopy(model)
            for site, off in one.units[:n]:
                edited[LAYERS[site]].weight.detach()[off] = 0
            weights = [edited[layer].weight for layer in LAYERS.values()]
            population = F.cross_entropy(edited(x[others]), y[others], reduction="sum") / len(x)
            scores = torch.autograd.grad(population - F.cross_entropy(edited(x[i : i + 1]), y[i : i + 1]), weights)
            score = torch.cat([(w * g).flatten(1).sum(1) for w, g in zip(weights, scores, strict=True)]).detach()
            assert_best(unit, score, one.units[:n])


def test_recall_of_the_screen() -> None:
    _, x, y = trained()
    found = run(8, verify="all", population=None)
    ranks = []
    for i, one in enumerate(found):
        for n, unit in enumerate(one.units):
            off = one.units[:n]
            screen = first_order(lambda logits, i=i: F.cross_entropy(logits, y[i : i + 1]), x[i : i + 1], off)
            screen[[every_unit().index(u) for u in off]] = -torch.inf
            ranks.append(int((screen > screen[every_unit().index(unit)]).sum()))
    assert found.recall == {k: sum(rank < k for rank in ranks) / len(ranks) for k in (1, 8, 32, 128)}
    assert found.recall[32] == 1
    assert run(2, verify=20).recall == {}
    for unseen in ({"objective": "first_order"}, {"objective": "authors"}, {"method": "random"}):
        assert run(2, verify="all", **unseen).recall == {}


@pytest.mark.parametrize("method", ["activation", "gradient_activation", "integrated_gradients"])
def test_rankings(method: str) -> None:
    model, x, y = trained()
    for i, one in enumerate(run(4, method=method)):
        some, label = x[i : i + 1], y[i]
        seen, _ = activations(some, [])
        if method == "activation":
            scores = torch.cat([t.abs().movedim(1, 0).flatten(1).mean(1) for t in seen.values()]).detach()
        elif method == "gradient_activation":
            scores = -first_order(lambda logits, label=label: logits[0, label], some, [])
        else:
            parts = []
            for site, t in seen.items():
                grads = []
                for step in range(16):
                    scaled = ((step + 0.5) / 16 * t).detach().requires_grad_()
                    logits = model[int(site) + 1 :](scaled)
                    grads.append(torch.autograd.grad(logits[0, label], scaled)[0])
                parts.append((torch.stack(grads).mean(0) * t).movedim(1, 0).flatten(1).sum(1))
            scores = torch.cat(parts).detach()
        for n, unit in enumerate(one.units):
            assert_best(unit, scores, one.units[:n])


def test_random_rankings_differ_between_examples() -> None:
    assert len({tuple(one.units[:1]) for one in run(12, method="random")}) > 2
