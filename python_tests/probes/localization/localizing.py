"""A small trained network, and what the search in it is held against."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.ablation.interpreter import Graph
from memloc_ext.ablation.network import Network, Query
from memloc_ext.ablation.recorder import record
from memloc_ext.ablation.signature import given
from memloc_ext.probes.localization import Found, Localization
from memloc_ext.tasks import Classification

SITES = {"2": 6, "5": 6, "9": 8}


def network(classes: int = 3) -> nn.Sequential:
    first = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
    second = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    last = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, classes)
    return nn.Sequential(*first, *second, *last)


def network_of(model: nn.Module, x: Tensor, *asked: Any) -> Network:
    """Return the recorded network that a `Query` is asked of."""
    tensors, signature = given(x)
    task = Classification()
    return Network(model, Graph(record(model, tensors, signature, task)), tensors, signature, Query(task, *asked))


@functools.cache
def trained() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a network that knows its examples by heart, the examples and their labels; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = network(), torch.randn(24, 2, 6, 6), torch.arange(24) % 3
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.zero_grad()
        assert bool((model.eval()(x).argmax(1) == y).all())
    return model, x, y


@contextlib.contextmanager
def without(
    model: nn.Module, units: Iterable[tuple[str, int]], values: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """Have hooks replace channels of images, or of vectors."""

    def hook(site: str, unit: int) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, unit] = 0.0 if values is None else values[site][unit]
            return output

        return after

    with contextlib.ExitStack() as stack:
        for site, unit in units:
            stack.callback(model.get_submodule(site).register_forward_hook(hook(site, unit)).remove)
        yield


def judge(
    model: nn.Module, x: Tensor, y: Tensor, units: Iterable[tuple[str, int]], values: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return losses and predictions of a plain forward pass with units switched off."""
    with without(model, units, values), torch.no_grad():
        logits = model.eval()(x)
    return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1)


def confirm(
    model: nn.Module, x: Tensor, y: Tensor, found: Sequence[Found], values: dict[str, Tensor] | None = None
) -> None:
    """Check each step of each search, and how it ended, against plain forward passes."""
    assert len(found) == len(x)
    for i, one in enumerate(found):
        assert len(one.losses) == len(one.predicted) == len(one.units) + 1
        assert len(set(one.units)) == len(one.units)
        for n in range(len(one.units) + 1):
            loss, label = judge(model, x[i : i + 1], y[i : i + 1], one.units[:n], values)
            torch.testing.assert_close(one.losses[n], loss[0].item(), rtol=1e-4, atol=1e-5)
            assert one.predicted[n] == label.item()
            right = one.predicted[n] == y[i]
            assert right or n == len(one.units), "the search went on"
        if one.status == "already_wrong":
            assert not one.units
        assert right == (one.status in ("capped", "exhausted"))


def same(a: Localization | Sequence[Found], b: Localization | Sequence[Found]) -> bool:
    return [(f.units, f.status, f.predicted) for f in a] == [(f.units, f.status, f.predicted) for f in b]


def every_unit() -> list[tuple[str, int]]:
    return [(site, unit) for site, units in SITES.items() for unit in range(units)]
