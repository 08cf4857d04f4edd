"""Time of a training step with each query of the accountant, over plain forward and backward.

The bound is arithmetic. In multiply-adds of a plain step, of which the weight gradients are a third: a direction and a
noise scale add next to nothing; clipping computes norms and weight gradients one after the other; pairs form every
example's weight gradient once more and multiply them with each other; a projection shrinks both factors first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import interleaved, ratios
from bench.peers import opacus_clipping, per_example_gradients
from bench.workloads import Workload, workloads
from memloc_ext import GradientAccountant, Projection
from memloc_ext.accounting import Account

WORKLOADS = ["resnet9-64x32x32", "vit-32x64-256", "mlp-512x784-512-512-10"]
PROJECTION = Projection(16, seed=0)
MAX_NORM, SIDES = 1, ("left", "right")


def queries(workload: Workload) -> dict[str, dict[str, Any]]:
    """Return the arguments of `GradientAccountant.backward` for each query."""
    direction = {name: torch.randn_like(p) for name, p in workload.model.named_parameters()}
    return {
        "norms + gradient": {},
        "one direction": {"directions": {"d": direction}},
        "clipped gradient": {"max_norm": MAX_NORM},
        "pairs": {"pairwise": True},
        "projection, 16 x 16": {"project": PROJECTION},
        "positions": {"per_position": True},
    }


def asked(workload: Workload, **arguments: Any) -> Callable[[], Account]:
    """Return a step that asks this."""
    accountant = GradientAccountant(workload.model)

    def step() -> Account:
        workload.model.zero_grad()
        with accountant:
            return accountant.backward(workload.loss(), loss_reduction="sum", **arguments)

    return step


def check(workload: Workload) -> None:
    """Hold the answers for a few examples against their gradients."""
    small = replace(workload, inputs=workload.inputs[:4], targets=workload.targets[:4])
    exact, asks = {name: g.double() for name, g in per_example_gradients(small).items()}, queries(small)
    flat = torch.cat([g.flatten(1) for g in exact.values()], 1)
    line = torch.cat([asks["one direction"]["directions"]["d"][name].double().flatten() for name in exact])
    scale = float(flat.square().sum(1).max())
    account = asked(small, **asks["one direction"])()
    close(sum(account.dot["d"].values()), flat @ line, scale**0.5 * float(line.norm()))
    noise = account.noise_scale
    account = asked(small, **asks["pairs"])()
    close(account.inner, flat @ flat.t(), scale)
    torch.testing.assert_close(account.noise_scale, noise, rtol=1e-2, atol=0)
    account = asked(small, **asks["projection, 16 x 16"])()
    for name, g in exact.items():
        rows = g.reshape(4, len(g[0]), -1)
        left, right = (PROJECTION.matrix(name, side, n, g) for side, n in zip(SIDES, rows.shape[1:], strict=True))
        close(account.projected[name], left @ rows @ right.t(), scale**0.5)
    asked(small, **asks["clipped gradient"])()
    factors = (MAX_NORM / flat.norm(dim=1)).clamp(max=1)
    for name, p in small.model.named_parameters():
        close(p.grad, torch.tensordot(factors, exact[name], 1), scale**0.5)


def close(actual: Any, expected: Tensor, scale: float) -> None:
    """Hold an answer against the truth, relative to the size of the gradients."""
    assert (actual - expected).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("name", WORKLOADS)
def test_queries(name: str, benchmark: Any) -> None:
    torch.manual_seed(0)
    workload = workloads()[name]()
    check(workload)
    steps: dict[str, Callable[[], object]] = {
        query: asked(workload, **arguments) for query, arguments in queries(workload).items()
    }
    if (ghost := opacus_clipping(workload, MAX_NORM)) is not None:
        steps["Opacus ghost clipping"] = ghost
    plain = "plain forward + backward"
    times = interleaved({plain: lambda: workload.loss().backward(), **steps}, rounds=7, before=1)
    benchmark.extra_info["time over"] = {
        f"{query} / {plain}": ratio
        for query in steps
        for ratio in ratios({query: times[query], plain: times[plain]}, query).values()
    }
    benchmark.pedantic(steps["norms + gradient"], rounds=3)
