"""Operators that switch channels off, or say what that would do, against plain PyTorch.

``channel_saliency`` is bound by traffic: it reads two tensors, where the plain product is written and read again.
``linear_ablation_loss`` is bound by arithmetic, one exp per feature, example and class; plain PyTorch stores as many
logits, or runs the classifier once per feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu_time import GpuCase
from bench.measure import interleaved, ratios
from memloc_ext.ops import channel_saliency
from memloc_ext.ops.ablation import linear_ablation_loss
from memloc_ext.reference import channel_saliency as channel_saliency_reference
from memloc_ext.reference import linear_ablation_loss as linear_ablation_loss_reference


@dataclass(frozen=True)
class Saliency:
    """Inputs of channel_saliency: shape, dtype, and ``nchw``, ``nhwc`` (channels-last memory) or ``tokens``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    form: str

    def __str__(self) -> str:
        return f"channel_saliency-{self.form}-{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def channel_dim(self) -> int:
        """Dimension of the channels."""
        return -1 if self.form == "tokens" else 1

    def inputs(self, device: str) -> tuple[Tensor, Tensor]:
        """Return activation and gradient."""
        activation, grad = (torch.randn(self.shape, device=device).to(self.dtype) for _ in range(2))
        if self.form != "nhwc":
            return activation, grad
        last = torch.channels_last
        return activation.contiguous(memory_format=last), grad.contiguous(memory_format=last)

    def plain(self, activation: Tensor, grad: Tensor) -> Tensor:
        """Compute it from a stored product."""
        product = activation * grad
        return product.sum(1) if self.form == "tokens" else product.flatten(2).sum(2)

    def check(self, activation: Tensor, grad: Tensor) -> None:
        """Fail unless the operator gives what the reference gives in float64."""
        exact = channel_saliency_reference.channel_saliency(activation.double(), grad.double(), self.channel_dim)
        error = (channel_saliency(activation, grad, self.channel_dim).double() - exact).abs().max()
        if error > 1e-5 * exact.abs().max():
            raise AssertionError(f"channel_saliency differs from its reference on {self}")


SALIENCIES = [
    Saliency((128, 256, 16, 16), torch.float32, "nchw"),
    Saliency((128, 256, 16, 16), torch.float32, "nhwc"),
    Saliency((128, 256, 16, 16), torch.bfloat16, "nchw"),
    Saliency((128, 256, 16, 16), torch.bfloat16, "nhwc"),
    Saliency((512, 256, 4, 4), torch.float32, "nchw"),
    Saliency((32, 512, 1024), torch.float32, "tokens"),
]


@pytest.mark.parametrize("case", SALIENCIES, ids=str)
def test_channel_saliency(case: Saliency, benchmark: Any) -> None:
    torch.manual_seed(0)
    activation, grad = case.inputs("cpu")
    case.check(activation, grad)
    times = interleaved(
        {
            "ours": lambda: channel_saliency(activation, grad, case.channel_dim),
            "plain": lambda: case.plain(activation, grad),
            "reading both": lambda: (activation.sum(), grad.sum()),
        }
    )
    benchmark.extra_info["time over"] = ratios(times, "ours")
    benchmark.pedantic(channel_saliency, (activation, grad, case.channel_dim), rounds=5)


@dataclass(frozen=True)
class Loss:
    """Inputs of linear_ablation_loss: examples, features, classes, dtype."""

    batch: int
    features: int
    classes: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.features}x{self.classes}"
        return f"linear_ablation_loss-{sizes}-{str(self.dtype).removeprefix('torch.')}"

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return features, weight, bias, targets and a baseline of zeros."""
        shapes = ((self.batch, self.features), (self.classes, self.features), (self.classes,))
        drawn = [torch.randn(shape, device=device).to(self.dtype) for shape in shapes]
        targets = torch.randint(self.classes, (self.batch,), device=device)
        return drawn[0].relu(), drawn[1] / self.features**0.5, drawn[2], targets, torch.zeros_like(drawn[0][0])

    @staticmethod
    def stored(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, baseline: Tensor) -> Any:
        """Subtract each feature from the logits, and store those of all features."""
        moved = (features - baseline).t()[..., None] * weight.t()[:, None]
        logits = functional.linear(features, weight, bias) - moved
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none")
        return loss.view(logits.shape[:2]), logits.argmax(2)

    def traffic(self, *_: Tensor) -> tuple[float, float]:
        """Return the bytes of the results, and of the logits that are stored."""
        results = self.batch * self.features
        return (self.dtype.itemsize + 8) * results, self.dtype.itemsize * results * self.classes

    def check(self, *inputs: Tensor) -> None:
        """Fail unless the operator's losses are those of the reference in float64."""
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        exact, _ = linear_ablation_loss_reference.linear_ablation_loss(*wide)  # pyright: ignore[reportArgumentType]
        loss, _ = torch.ops.memloc_ext.linear_ablation_loss(*inputs)
        if (loss.double() - exact).abs().max() > 1e-5 * exact.abs().max():
            raise AssertionError(f"linear_ablation_loss differs from its reference on {self}")


LOSSES = [Loss(128, 512, 10), Loss(128, 512, 100), Loss(64, 512, 1000), Loss(128, 512, 10, torch.float64)]


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_linear_ablation_loss(case: Loss, benchmark: Any) -> None:
    torch.manual_seed(0)
    inputs = case.inputs("cpu")
    case.check(*inputs)
    times = interleaved(
        {
            "ours": lambda: linear_ablation_loss(*inputs),
            "all logits stored": lambda: case.stored(*inputs),
            "a forward pass per feature": lambda: linear_ablation_loss_reference.linear_ablation_loss(*inputs),
        },
        rounds=7,
    )
    benchmark.extra_info["time over"] = ratios(times, "ours")
    benchmark.pedantic(linear_ablation_loss, inputs, rounds=5)


def gpu_cases(tiny: bool) -> Iterator[GpuCase]:
    """Yield for `bench.gpu` what to time, on inputs larger than the L2 cache, or on tiny ones."""
    for small in SALIENCIES:
        shape = (2, *(min(n, 16) for n in small.shape[1:])) if tiny else (4 * small.shape[0], *small.shape[1:])
        case = replace(small, shape=shape)
        yield GpuCase(
            str(case),
            case.inputs,
            case.check,
            lambda a, g, dim=case.channel_dim: torch.ops.memloc_ext.channel_saliency(a, g, dim),
            lambda a, g: a.clone(),
            lambda a, g: (2 * a.nbytes, 2 * a.nbytes),
            at_least=0.85,
        )
    for few in LOSSES:
        loss = replace(few, batch=4, features=32) if tiny else few
        yield GpuCase(
            str(loss), loss.inputs, loss.check, torch.ops.memloc_ext.linear_ablation_loss, loss.stored, loss.traffic
        )
