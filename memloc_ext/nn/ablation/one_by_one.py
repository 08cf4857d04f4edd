"""The slow way: the model itself, once for every unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.nn.ablation.recorder import evaluating
from memloc_ext.nn.ablation.sites import HEADS
from memloc_ext.nn.ablation.switch import apply_ablation, channel_dim


def one_by_one(
    model: nn.Module, x: Tensor, sites: Sequence[str] | None, how: str, reference: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of the unchanged model, ``[batch, classes]``, and those with each unit switched off.

    Args:
        model: To run.
        x: ``[batch, *]``.
        sites: Names of modules.
        how: ``zero`` or ``mean``.
        reference: Examples for ``mean``.

    Returns:
        Logits, and site to logits ``[units, batch, classes]``.

    Raises:
        ValueError: If ``sites`` is None or ``how`` is ``filter``: both need a recording.
    """
    if sites is None or how == "filter":
        raise ValueError("sites must be given, and how must be zero or mean, for a model that cannot be recorded")
    with evaluating(model), torch.no_grad():
        logits, found = model(x), {}
        for site in sites:
            baseline = _mean(model, site, reference)
            baseline = baseline if how == "mean" else torch.zeros_like(baseline)
            rows = []
            for unit in range(len(baseline)):
                with apply_ablation(model, [(site, unit)], baselines={site: baseline}):
                    rows.append(model(x))
            found[site] = torch.stack(rows)
        return logits, found


def _mean(model: nn.Module, site: str, reference: Tensor) -> Tensor:
    """Return the mean of each channel of a site, ``[units]``."""
    modules, means = dict(model.named_modules()), []
    if site not in modules or not site:
        others = ", and attention heads need a model that can be recorded" if site.endswith(HEADS) else ""
        raise ValueError(f"sites must be names of the model's modules, got {site!r}{others}")

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(f"sites: {site} must return a tensor, got {type(output).__name__}")
        means.append(output.movedim(channel_dim(module, output), 0).flatten(1).mean(1))

    handle = modules[site].register_forward_hook(after)
    try:
        model(reference)
    finally:
        handle.remove()
    if not means:
        raise ValueError(f"sites: {site} is not called when the model is")
    return torch.stack(means).mean(0)
