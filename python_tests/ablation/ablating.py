"""What ablations are held against: the model itself, once per unit, with a hook or a zeroed filter."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accuracy import assert_stable, moved
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import ablation_losses, apply_ablation
from memloc_ext.ablation.recorder import record
from memloc_ext.ablation.recording import Recording
from memloc_ext.ablation.signature import given
from memloc_ext.tasks import Classification, logits_of

Units = Sequence[int]


def recorded(model: nn.Module, x: Tensor, strict: bool = True) -> Recording:
    return record(model, *given(x), Classification(), strict)


class Model(nn.Module):
    """A module whose forward pass is a function of it and of its input."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def settled(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and scales as a trained network has them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return model


@contextlib.contextmanager
def replaced(model: nn.Module, site: str, unit: int, dim: int, value: float | Tensor = 0.0) -> Iterator[None]:
    """Have a hook replace a unit of what a module returns."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.select(dim, unit)[...] = value
        return output

    handle = model.get_submodule(site).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def without_filter(layer: nn.Module, unit: int) -> Iterator[None]:
    """Zero the weights of one output channel."""
    assert isinstance(layer.weight, nn.Parameter)
    kept = layer.weight.detach()[unit].clone()
    layer.weight.detach()[unit] = 0
    try:
        yield
    finally:
        layer.weight.detach()[unit] = kept


def channel_means(model: nn.Module, site: str, x: Tensor, dim: int) -> Tensor:
    """Return the mean of each unit over examples, positions and calls."""
    seen: list[Tensor] = []
    handle = model.get_submodule(site).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    model(x)
    handle.remove()
    return torch.stack([t.movedim(dim, 0).flatten(1).mean(1) for t in seen]).mean(0)


def sample(units: int, count: int) -> list[int]:
    """Return the first, the last and a few more."""
    chosen = torch.randperm(units, generator=torch.Generator().manual_seed(0))[:count].tolist()
    return sorted({0, units - 1, *chosen})


def plain_losses(
    model: nn.Module, x: Tensor, y: Tensor, site: str, units: Units, how: str, dim: int | None, layer: str | None
) -> Tensor:
    """Return the losses with each of some units switched off, ``[units, batch]``."""
    model = copy.deepcopy(model).eval()
    losses = []
    with torch.no_grad():
        if dim is None:
            dim = 1 if _rank(model, site, x) in (4, 5) else -1
        means = channel_means(model, site, x, dim) if how == "mean" else None
        for unit in units:
            if how == "filter":
                context = without_filter(model.get_submodule(layer or site), unit)
            else:
                context = replaced(model, site, unit, dim, 0.0 if means is None else means[unit])
            with context:
                logits = model(x)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses.append(F.cross_entropy(logits, y, reduction="none"))
    return torch.stack(losses)


def _rank(model: nn.Module, site: str, x: Tensor) -> int:
    ranks: list[int] = []
    handle = model.get_submodule(site).register_forward_hook(lambda module, args, output: ranks.append(output.dim()))
    model(x)
    handle.remove()
    return ranks[0]


def wide(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def labels(batch: int, classes: int = 3) -> Tensor:
    return torch.arange(batch) % classes


def check(
    model: nn.Module,
    x: Tensor,
    sites: Sequence[str] | None = None,
    how: str = "zero",
    *,
    count: int = 3,
    dims: dict[str, int] | None = None,
    layers: dict[str, str] | None = None,
    classes: int = 3,
    slow: str | None = None,
    must_matter: bool = True,
    **arguments: Any,
) -> dict[str, Any]:
    """Hold the losses of a sample of units against plain forward passes in float64.

    ``dims``: of the units where they are not those of images or the last; ``layers``: whose filters make up a site;
    ``slow``: what the warning says, if the model is to be run once per unit; ``must_matter``: whether some unit does.
    """
    y = labels(len(x), classes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = ablation_losses(model, x, y, sites, how, **arguments)
    told = [str(w.message) for w in caught]
    assert bool(told) == (slow is not None), told
    assert all(slow in message for message in told if slow), told
    if sites is not None:
        assert set(losses) == set(sites)
    with torch.no_grad():
        modes = {m: m.training for m in model.modules()}
        base = F.cross_entropy(model.eval()(x).float(), y, reduction="none")
        for module, training in modes.items():
            module.training = training
    torch.testing.assert_close(
        losses.base_loss.float(), base, rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-4, atol=1e-4
    )
    changed, dtype = False, next(model.parameters()).dtype
    for site, found in losses.items():
        assert found.loss.shape == found.predicted.shape == (len(found.loss), len(x))
        if site.endswith(".heads"):
            continue
        units = sample(len(found.loss), count)
        dim, layer = (dims or {}).get(site), (layers or {}).get(site)
        x_exact = x.double() if x.is_floating_point() else x
        exact = plain_losses(wide(model), x_exact, y, site, units, how, dim, layer)
        off = plain_losses(*moved((model, x, y), dtype), site, units, how, dim, layer)
        assert_stable(found.loss[units], off, exact)
        changed = changed or bool((found.loss[units] != losses.base_loss).any())
        if how == "zero":
            (plain,) = plain_losses(model, x, y, site, units[-1:], how, dim, layer)
            torch.testing.assert_close(edited_loss(model, x, y, site, units[-1]), plain, rtol=1e-5, atol=1e-5)
    assert changed or not must_matter or all(site.endswith(".heads") for site in losses), (
        "no unit matters: the test is empty"
    )
    return dict(losses)


def edited_loss(model: nn.Module, x: Tensor, y: Tensor, site: str, unit: int) -> Tensor:
    """Return the losses with a unit switched off by `apply_ablation`, which is not told where the units are."""
    model = copy.deepcopy(model).eval()
    with apply_ablation(model, [(site, unit)]), torch.no_grad():
        logits = logits_of(model(x))
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), y, reduction="none")


def plain_heads_losses(model: nn.Module, x: Tensor, y: Tensor, project: nn.Linear, heads: int) -> Tensor:
    """Return the losses with each attention head switched off: the projection behind it reads nothing of it."""
    model.eval()
    width, weight, losses = project.in_features // heads, project.weight.detach(), []
    for head in range(heads):
        part = weight[:, head * width : (head + 1) * width]
        kept = part.clone()
        part.zero_()
        with torch.no_grad():
            losses.append(F.cross_entropy(model(x), y, reduction="none"))
        part.copy_(kept)
    return torch.stack(losses)
