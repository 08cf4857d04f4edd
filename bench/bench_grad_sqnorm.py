"""Per-example gradient norms, and the sums of the gradients over two groups of examples.

Of one layer against the layer's own weight gradient and against materialising every example's; of whole training steps
against plain forward + backward, where peers are timed too (`bench.peers`).

The bound is arithmetic: multiply-adds of the way over those of the weight gradient, at the same rate. A Gram computes
a little over half of its products, which are symmetric.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from bench.gpu_time import GpuCase
from bench.measure import interleaved, ratios
from bench.peak import peak
from bench.peers import PEERS
from bench.workloads import KINDS, Step, accounted, workloads
from memloc_ext.ops import (
    Plan,
    conv2d_grad_sqnorm,
    conv2d_grad_sqnorm_groups,
    linear_grad_sqnorm,
    linear_grad_sqnorm_groups,
    plan_conv2d,
    plan_linear,
)
from memloc_ext.reference import grad_sqnorm as reference


@dataclass(frozen=True)
class Linear:
    """A linear layer: batch, positions, inputs, outputs."""

    batch: int
    positions: int
    inputs: int
    outputs: int
    gram = "gram"

    def __str__(self) -> str:
        return f"linear-{self.batch}x{self.positions}-{self.inputs}-to-{self.outputs}"

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return the input and the gradient of the output."""
        x = torch.randn(self.batch, self.positions, self.inputs, device=device)
        return x.relu(), torch.randn(self.batch, self.positions, self.outputs, device=device)

    def plan(self) -> Plan:
        """Return the way that is taken."""
        return plan_linear(self.positions, self.inputs, self.outputs)

    def norms(self, x: Tensor, g: Tensor, method: str = "auto") -> Tensor:
        """Compute the norms."""
        return linear_grad_sqnorm(x, g, method=method)

    def groups(self, x: Tensor, g: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the norms and the gradients of two groups."""
        return linear_grad_sqnorm_groups(x, g, ids, 2)

    def materialised(self, x: Tensor, g: Tensor) -> Tensor:
        """Compute them from one example's gradient beside the other."""
        return reference.linear_grad_sqnorm(x, g)

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Compute the gradient of the batch."""
        return g.flatten(0, 1).t() @ x.flatten(0, 1)


@dataclass(frozen=True)
class Conv2d:
    """A convolution: batch, inputs, outputs, image side, kernel side, stride, padding."""

    batch: int
    inputs: int
    outputs: int
    size: int
    kernel: int
    stride: int
    padding: int
    gram = "shifted_gram"

    def __str__(self) -> str:
        return f"conv-{self.batch}x{self.size}x{self.size}-{self.inputs}-to-{self.outputs}-k{self.kernel}s{self.stride}"

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Kernel size, stride, padding, dilation."""
        k, s, p = self.kernel, self.stride, self.padding
        return (k, k), (s, s), (p, p), (1, 1)

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return the input and the gradient of the output."""
        x = torch.randn(self.batch, self.inputs, self.size, self.size, device=device).relu()
        side = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return x, torch.randn(self.batch, self.outputs, side, side, device=device)

    def plan(self) -> Plan:
        """Return the way that is taken."""
        return plan_conv2d(self.inputs, self.outputs, (self.size, self.size), *self.geometry)

    def norms(self, x: Tensor, g: Tensor, method: str = "auto") -> Tensor:
        """Compute the norms."""
        return conv2d_grad_sqnorm(x, g, *self.geometry, 1, method=method)

    def groups(self, x: Tensor, g: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the norms and the gradients of two groups."""
        return conv2d_grad_sqnorm_groups(x, g, ids, 2, *self.geometry, 1)

    def materialised(self, x: Tensor, g: Tensor) -> Tensor:
        """Compute them from one example's gradient beside the other."""
        patches = torch.nn.functional.unfold(x, self.kernel, 1, self.padding, self.stride)
        return (g.flatten(2) @ patches.transpose(1, 2)).square().sum((1, 2))

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Compute the gradient of the batch."""
        shape = (self.outputs, self.inputs, self.kernel, self.kernel)
        return conv2d_weight(x, shape, g, self.stride, self.padding)


CASES = [
    Linear(32, 64, 256, 768),
    Linear(64, 256, 768, 3072),
    Conv2d(64, 3, 64, 32, 3, 1, 1),
    Conv2d(64, 64, 128, 32, 5, 2, 2),
    Conv2d(64, 128, 128, 16, 3, 1, 1),
    Conv2d(64, 128, 256, 16, 3, 1, 1),
    Conv2d(64, 256, 256, 8, 3, 1, 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grad_sqnorm(case: Linear | Conv2d, benchmark: Any) -> None:
    torch.manual_seed(0)
    x, g = case.tensors()
    ids = torch.arange(case.batch) % 2
    torch.testing.assert_close(case.norms(x[:3], g[:3]), case.materialised(x[:3], g[:3]), rtol=1e-4, atol=0)
    total = case.weight_gradient(x, g)
    error = (case.groups(x, g, ids)[1].sum(0) - total).abs().max() / total.abs().max()
    assert error < 1e-4
    times = interleaved(
        {
            "ours": lambda: case.norms(x, g),
            "norms and two groups": lambda: case.groups(x, g, ids),
            "weight gradient": lambda: case.weight_gradient(x, g),
            "materialised": lambda: case.materialised(x, g),
        },
        rounds=9,
    )
    plan = case.plan()
    benchmark.extra_info["time over"] = ratios(
        {name: taken for name, taken in times.items() if name != "norms and two groups"}, "ours"
    )
    both = {name: times[name] for name in ("norms and two groups", "weight gradient")}
    benchmark.extra_info["norms and two groups: time over"] = ratios(both, "norms and two groups")
    benchmark.extra_info["method"] = plan.method
    floor = min(plan.multiply_adds.values()) / plan.multiply_adds["direct"]
    benchmark.extra_info["multiply-adds (whole products) over the weight gradient's"] = round(floor, 3)
    benchmark.pedantic(case.norms, (x, g), rounds=3)


@pytest.mark.parametrize("name", workloads())
def test_training_step(name: str, benchmark: Any) -> None:
    torch.manual_seed(0)
    workload = workloads()[name]()
    steps: dict[str, Step] = {kind: accounted(workload, **settings) for kind, settings in KINDS.items()}
    steps |= {peer: step for peer, build in PEERS.items() if (step := build(workload)) is not None}
    exact = steps["torch.func vmap(grad)"]()
    for step in steps.values():
        for parameter, norms in step().items():
            assert (norms - exact[parameter]).abs().max() < 0.01 * exact[parameter].max(), parameter
    plain = "plain forward + backward"
    times = interleaved({plain: lambda: workload.loss().backward(), **steps}, rounds=7, before=1)
    benchmark.extra_info["time over"] = {
        f"{kind} / {plain}": ratio
        for kind in steps
        for ratio in ratios({kind: times[kind], plain: times[plain]}, kind).values()
    }
    benchmark.extra_info["multiply-adds over plain, at least"] = {
        kind: round(floor, 3) for kind, floor in workload.floors().items()
    }
    peaks = {kind: peak(name, kind) for kind in ("plain", *KINDS)}
    base = peaks.pop("plain")
    if base is not None:
        benchmark.extra_info["peak memory over plain"] = {
            kind: round(value / base, 3) for kind, value in peaks.items() if value is not None
        }
    benchmark.pedantic(steps["norms + batch gradient"], rounds=3)


def gpu_cases(tiny: bool) -> Iterator[GpuCase]:
    """Yield for `bench.gpu` every way beside the layer's own weight gradient, and `auto` beside materialising.

    In float32, library products follow torch's precision setting, exact by default; cuDNN's convolutions take TF32 by
    default.
    """
    for case, dtype in itertools.product(CASES, (torch.bfloat16, torch.float32)):
        channels = {"inputs": min(case.inputs, 8), "outputs": min(case.outputs, 8)}
        large = replace(case, batch=4, **channels) if tiny else replace(case, batch=8 * case.batch)
        counts = large.plan().multiply_adds
        for method in ("auto", "direct", case.gram):
            operations = 2.0 * large.batch * counts.get(method, 0)  # of whole products: half a Gram matrix is enough
            yield GpuCase(
                f"grad_sqnorm {large}-{str(dtype).removeprefix('torch.')} {method}",
                functools.partial(drawn, large, dtype),
                functools.partial(check, large, method),
                lambda x, g, case=large, method=method: case.norms(x, g, method),
                large.weight_gradient,
                lambda x, g: (x.nbytes + g.nbytes,) * 2,
                lambda *_, count=operations: count,
            )
        yield GpuCase(
            f"grad_sqnorm {large}-{str(dtype).removeprefix('torch.')} auto, peer: materialised",
            functools.partial(drawn, large, dtype),
            functools.partial(check, large, "auto"),
            large.norms,
            large.materialised,
            lambda x, g: (x.nbytes + g.nbytes,) * 2,
        )


def drawn(case: Linear | Conv2d, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return the input and the gradient of the output in a type."""
    x, g = case.tensors(device)
    return x.to(dtype), g.to(dtype)


def check(case: Linear | Conv2d, method: str, x: Tensor, g: Tensor) -> None:
    """Fail unless the norms of three examples are those that materialising them in float64 gives."""
    exact = case.materialised(x[:3].double(), g[:3].double())
    torch.testing.assert_close(case.norms(x[:3], g[:3], method).double(), exact, rtol=1e-4, atol=0)
