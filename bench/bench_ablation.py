"""Operators that switch channels off, or say what that would do, against plain PyTorch.

``channel_saliency`` is bound by traffic: it reads two tensors, where the plain product is written and read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import interleaved, ratios
from memloc_ext.ops import channel_saliency
from memloc_ext.reference import channel_saliency as channel_saliency_reference


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
        generator = torch.Generator().manual_seed(0)
        activation, grad = (torch.randn(self.shape, generator=generator).to(device, self.dtype) for _ in range(2))
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


def gpu_cases() -> Iterator[tuple[str, Callable[[], object], int, Callable[[], object], int]]:
    """Yield for `bench.gpu`: name, what to time and its bytes, what to compare with and its bytes; checked first."""
    for small in SALIENCIES:
        case = Saliency((4 * small.shape[0], *small.shape[1:]), small.dtype, small.form)  # larger than the L2 cache
        activation, grad = case.inputs("cuda")
        case.check(activation, grad)
        dim = case.channel_dim
        yield (
            str(case),
            lambda a=activation, g=grad, dim=dim: torch.ops.memloc_ext.channel_saliency(a, g, dim),
            2 * activation.nbytes,
            lambda a=activation: a.clone(),
            2 * activation.nbytes,
        )
