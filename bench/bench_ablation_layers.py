"""A switched-off channel behind the next convolution, against plain PyTorch and a copy of the result.

The bound is traffic: every result is written once; outputs, changes and filters are read from cache by all variants.
Plain PyTorch unfolds the one channel, multiplies with its filters, and adds, scales, shifts and clips in place.
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
from memloc_ext.ops.ablation import conv2d_ablation


@dataclass(frozen=True)
class Case:
    """A convolution over square images, padded to keep their size, and how many variants of how many examples."""

    size: int
    inputs: int
    outputs: int
    variants: int
    batch: int
    kernel: int = 3
    stride: int = 1

    def __str__(self) -> str:
        layer = f"{self.inputs}to{self.outputs}-{self.size}x{self.size}-kernel{self.kernel}-stride{self.stride}"
        return f"{layer}-variants{self.variants}-batch{self.batch}"

    def arguments(self, device: str) -> list[Any]:
        """Return the operator's arguments: evaluation-mode normalisation and ReLU follow the layer."""
        side = (self.size - 1) // self.stride + 1
        output = torch.randn(self.batch, self.outputs, side, side, device=device)
        change = torch.randn(self.variants, self.batch, self.size, self.size, device=device)
        weight = torch.randn(self.outputs, self.inputs, self.kernel, self.kernel, device=device) / self.kernel
        channels = torch.arange(self.variants, device=device) % self.inputs
        geometry = [[self.stride] * 2, [self.kernel // 2] * 2, [1, 1]]
        scale, shift = torch.rand(self.outputs, device=device), torch.randn(self.outputs, device=device)
        return [output, change, weight, channels, *geometry, scale, shift, None, True]


CASES = [
    Case(6, 256, 256, 64, 4),
    Case(8, 256, 256, 64, 4),
    Case(16, 128, 128, 64, 4),
    Case(32, 64, 64, 32, 4),
    Case(32, 64, 128, 64, 4, stride=2),
    Case(32, 64, 64, 32, 4, kernel=5),
    Case(16, 64, 256, 64, 4, kernel=1),
]


def plain(
    output: Tensor,
    change: Tensor,
    weight: Tensor,
    channels: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    scale: Tensor,
    shift: Tensor,
    *_: object,
) -> Tensor:
    """Return the same from PyTorch's own operators."""
    variants, batch = change.shape[:2]
    patches = functional.unfold(change.flatten(0, 1)[:, None], tuple(weight.shape[2:]), dilation, padding, stride)
    filters = weight[:, channels].transpose(0, 1).flatten(2).repeat_interleave(batch, 0)
    delta = torch.bmm(filters, patches).view(variants, *output.shape)
    return delta.add_(output).mul_(scale[:, None, None]).add_(shift[:, None, None]).relu_()


def check(case: Case, arguments: list[Any]) -> Tensor:
    """Return the result; fail unless it is plain PyTorch's up to rounding."""
    actual = conv2d_ablation(*arguments)
    if not torch.allclose(actual, plain(*arguments), rtol=1e-3, atol=1e-3):
        raise AssertionError(f"conv2d_ablation differs from plain PyTorch on {case}")
    return actual


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d_ablation(case: Case, benchmark: Any) -> None:
    torch.manual_seed(0)
    arguments = case.arguments("cpu")
    result = check(case, arguments)
    times = interleaved(
        {
            "ours": lambda: conv2d_ablation(*arguments),
            "plain PyTorch": lambda: plain(*arguments),
            "clone of the result": result.clone,
        }
    )
    benchmark.extra_info["time over"] = ratios(times, "ours")
    benchmark.pedantic(conv2d_ablation, arguments, rounds=5)


def gpu_cases(tiny: bool) -> Iterator[GpuCase]:
    """Yield for `bench.gpu` what to time beside a copy of the result: 8 times as many examples, or little of all."""
    for case in CASES:
        few = {"inputs": 8, "outputs": 8, "variants": 4, "batch": 2}
        large = replace(case, **few) if tiny else replace(case, batch=8 * case.batch)
        yield GpuCase(
            f"conv2d_ablation {large}",
            lambda device, case=large: tuple(case.arguments(device)),
            lambda *given, case=large: check(case, list(given)),
            torch.ops.memloc_ext.conv2d_ablation,
            lambda output, change, *_: output.expand(len(change), *output.shape).contiguous(),
            traffic,
        )


def traffic(output: Tensor, change: Tensor, *_: object) -> tuple[float, float]:
    """Return the bytes of the operator, which reads outputs and changes once, and of writing as large a result."""
    result = len(change) * output.nbytes
    return result + output.nbytes + change.nbytes, result + output.nbytes
