"""A convolution behind example-tied dropout against the dropout and the library's convolution, forward and backward.

The bound is arithmetic: the share of the channels that is kept, of the multiply-adds of a pass over all of them. Times
are of a forward pass and the gradients of images and filters. ``GFLOP/s`` count the multiply-adds that each of the two
has to do: all of them for the library, those of kept channels for ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import interleaved, ratios
from memloc_ext.ops import example_tied_conv2d, example_tied_dropout
from memloc_ext.reference.example_tied_dropout import keep_mask

P_GEN, SEED, BATCH = 0.2, 0, 64


@dataclass(frozen=True)
class Case:
    """A square convolution of ``BATCH`` images: channels in and out, kernel, stride, padding and side of the image."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    size: int
    p_mem: float = 0.1

    def __str__(self) -> str:
        return self.name

    @property
    def layer(self) -> tuple[int, int]:
        """Stride and padding."""
        return self.stride, self.padding

    @property
    def settings(self) -> dict[str, Any]:
        """What says which channels are kept."""
        return {"num_generalization": int(P_GEN * self.inputs), "p_mem": self.p_mem, "seed": SEED}

    def make(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return images, ids and filters."""
        make = torch.Generator().manual_seed(0)
        x = torch.randn(BATCH, self.inputs, self.size, self.size, generator=make)
        weight = torch.randn(self.outputs, self.inputs, self.kernel, self.kernel, generator=make)
        return x.requires_grad_(), torch.randint(60_000, (BATCH,), generator=make), weight.requires_grad_()


CASES = [  # those behind sites of a ResNet-9 for images of 32 x 32, then others
    Case("conv2-64x128-5x5-32", 64, 128, 5, 2, 2, 32),
    Case("res1.conv1-128x128-3x3-16", 128, 128, 3, 1, 1, 16),
    Case("conv3-128x256-3x3-16", 128, 256, 3, 1, 1, 16),
    Case("res2.conv1-256x256-3x3-8", 256, 256, 3, 1, 1, 8),
    Case("conv4-256x128-3x3-8", 256, 128, 3, 1, 0, 8),
    Case("half kept-128x128-3x3-16", 128, 128, 3, 1, 1, 16, 0.4),
    Case("256x64-1x1-28", 256, 64, 1, 1, 0, 28),
    Case("512x512-3x3-4", 512, 512, 3, 1, 1, 4),
]


def passes(function: Callable[..., Tensor], x: Tensor, ids: Tensor, weight: Tensor, case: Case) -> list[Tensor]:
    """Return a result, and the gradients for one as large."""
    y = function(x, ids, weight, case)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), y.detach())]


def ours(x: Tensor, ids: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Run the operator."""
    return example_tied_conv2d(x, ids, weight, None, *case.layer, **case.settings)


def dense(x: Tensor, ids: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Run dropout and convolution."""
    return torch.conv2d(example_tied_dropout(x, ids, **case.settings), weight, None, *case.layer)


def plain(x: Tensor, ids: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Run the convolution without a dropout."""
    return torch.conv2d(x, weight, None, *case.layer)


def grouped(x: Tensor, ids: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Gather each example's channels and their filters, and run the library's convolution with a group for each."""
    keep = keep_mask(ids, case.inputs, case.settings["num_generalization"], case.p_mem, SEED)
    most = int(keep.sum(1).max())
    channels = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    there = keep.gather(1, channels)[..., None, None]
    images = x.gather(1, channels[..., None, None].expand(-1, -1, *x.shape[2:])) * there
    filters = weight[:, channels].transpose(0, 1).flatten(0, 1)
    y = torch.conv2d(images.flatten(0, 1)[None], filters, None, *case.layer, groups=BATCH)
    return y.view(BATCH, case.outputs, *y.shape[2:])


def check(case: Case, given: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fail unless the operator gives what dropout and convolution give in float64, to float32's rounding."""
    x, ids, weight = given
    wide = x.detach().double().requires_grad_(), ids, weight.detach().double().requires_grad_()
    for actual, expected in zip(passes(ours, *given, case), passes(dense, *wide, case), strict=True):
        if not torch.allclose(actual.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
            raise AssertionError(f"example_tied_conv2d differs from dropout and convolution on {case}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_example_tied_conv2d(case: Case, benchmark: Any) -> None:
    given = case.make()
    check(case, given)
    peers = {"ours": ours, "dropout and conv2d": dense, "conv2d alone": plain, "a group for each example": grouped}
    times = interleaved({name: lambda f=f: passes(f, *given, case) for name, f in peers.items()}, rounds=11)
    share = (
        keep_mask(given[1], case.inputs, case.settings["num_generalization"], case.p_mem, SEED).double().mean().item()
    )
    flops = 6e-9 * passes(dense, *given, case)[0].numel() * given[2][0].numel()
    benchmark.extra_info["time over"] = ratios(times, "ours")
    benchmark.extra_info["multiply-adds over conv2d's"] = round(share, 3)
    benchmark.extra_info["GFLOP/s"] = {
        "ours": round(share * flops / statistics.median(times["ours"])),
        "dropout and conv2d": round(flops / statistics.median(times["dropout and conv2d"])),
    }
    benchmark.pedantic(passes, (ours, *given, case), rounds=3)
