"""The slow way: the model itself, once for every unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from memloc_ext.ablation.recorder import record
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ablation.running import evaluating
from memloc_ext.ablation.sites import Site, find_sites
from memloc_ext.ablation.switch import SiteHook, apply_ablation, hooked
from memloc_ext.tasks import logits_of


def one_by_one(
    model: nn.Module,
    x: Tensor,
    sites: Sequence[str] | None,
    how: str,
    reference: Tensor,
    reason: UnsupportedError,
    progress: Callable[[int], object],
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Return the logits of the unchanged model, ``[batch, classes]``, and those with each unit switched off.

    Args:
        model: To run.
        x: ``[batch, *]``.
        sites: Names of modules; by default those of `ablation_losses`.
        how: ``zero`` or ``mean``.
        reference: Examples for ``mean``.
        reason: Why the model cannot be recorded.
        progress: Called with 1 for each unit.

    Returns:
        Logits, and site to logits ``[units, batch, classes]``.

    Raises:
        ValueError: If a site is none, or ``how`` is ``filter``, which needs a recording.
    """
    check_how(how, reason)
    with torch.no_grad():
        found = find_sites(model, record(model, x, strict=False), sites)
        with evaluating(model):
            logits = logits_of(model(x))
            baselines = _means(model, found, reference) if how == "mean" else {}
            variants = {}
            for site in found:
                dims = {site.name: site.dim}
                rows = []
                for unit in range(site.units):
                    with apply_ablation(model, [(site.name, unit)], baselines=baselines, channel_dims=dims):
                        rows.append(logits_of(model(x)))
                    progress(1)
                variants[site] = torch.stack(rows)
    return logits, variants


def check_how(how: str, reason: UnsupportedError) -> None:
    """Raise unless units can be switched off without a recording."""
    if how == "filter":
        raise ValueError(
            f"how='filter' and changes of weights need a model that can be recorded, but {reason}; "
            "use how='zero' or how='mean'"
        ) from reason


def _means(model: nn.Module, sites: Sequence[Site], reference: Tensor) -> dict[str, Tensor]:
    """Return the mean of each unit over examples, positions and calls."""
    hooks = [_Mean(site) for site in sites]
    handles = hooked(model, hooks)
    try:
        model(reference)
    finally:
        for handle in handles:
            handle.remove()
    return {hook.site: torch.stack(hook.means).mean(0) for hook in hooks}


class _Mean(SiteHook):
    def __init__(self, site: Site) -> None:
        super().__init__(site.name)
        self.dim, self.means = site.dim, list[Tensor]()

    def change(self, t: Tensor) -> Tensor:
        self.means.append(t.movedim(self.dim, 0).flatten(1).mean(1))
        return t
