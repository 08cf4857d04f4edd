"""Rankings of units that are made once: what the search is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memloc_ext.ablation.network import Network
from memloc_ext.ablation.unit_sets import Switched, first_order
from memloc_ext.tasks import Classification, logits_of

METHODS = ("search", "activation", "gradient_activation", "integrated_gradients", "random")
_STEPS = 16  # of the path that gradients are integrated along


def rank(
    network: Network,
    baselines: Sequence[Tensor],
    inputs: Sequence[Tensor],
    y: Tensor,
    method: str,
    seeds: Sequence[int],
) -> Tensor:
    """Return a score for every unit and example, ``[examples, units]``; the largest is switched off first.

    ``activation``: mean absolute activation; ``gradient_activation``: activation less baseline, times the gradient of
    the label's logit (of minus the loss for other tasks than classification), summed over positions;
    ``integrated_gradients``: the same with the mean gradient along the straight line of the site's activations from
    the baseline (Sundararajan et al., ICML 2017); ``random``: a permutation per example's seed, the control.
    """
    if method == "random":
        units = sum(map(len, baselines))
        draws = [torch.rand(units, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(draws).to(y.device)
    step = network.gradients_at_once
    parts = [slice(begin, begin + step) for begin in range(0, len(y), step)]
    return torch.cat([_rank(network, baselines, [t[part] for t in inputs], y[part], method) for part in parts])


def _rank(network: Network, baselines: Sequence[Tensor], inputs: Sequence[Tensor], y: Tensor, method: str) -> Tensor:
    empty = Switched.none(network, baselines, len(y))

    def logit(output: Any) -> Tensor:
        if isinstance(network.task, Classification):
            return logits_of(output).gather(1, y[:, None]).sum()
        return -network.task.loss(output, y).sum()

    if method == "gradient_activation":
        return -torch.cat(first_order(inputs, empty, logit), 1)
    if method == "integrated_gradients":
        scales = [(step + 0.5) / _STEPS for step in range(_STEPS)]
        sites = range(len(baselines))
        parts = [[first_order(inputs, empty, logit, i, scale)[0] for scale in scales] for i in sites]
        return -torch.cat([torch.stack(part).mean(0) for part in parts], 1)
    with torch.no_grad():
        values = network.graph.examples(inputs, {v for place in network.places for v in place.values})
    places = ([values[v].abs().movedim(place.dim + 1, 1) for v in place.values] for place in network.places)
    return torch.cat([torch.stack([t.flatten(2).mean(2) for t in calls]).sum(0) for calls in places], 1)
