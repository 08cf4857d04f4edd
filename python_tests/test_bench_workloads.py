"""The plan of a layer, as the benches ask for it."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.workloads import plan
from memloc_ext.ops import Plan, conv2d_grad_sqnorm, plan_conv2d, plan_linear

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], Plan]] = {
    "linear": (nn.Linear(6, 9), (5, 6), plan_linear(1, 6, 9)),
    "tokens": (nn.Linear(6, 9), (5, 4, 8, 6), plan_linear(32, 6, 9)),
    "conv2d": (
        nn.Conv2d(4, 6, (3, 5), (1, 2), (0, 2), (2, 1), groups=2),
        (1, 4, 9, 8),
        plan_conv2d(4, 6, (9, 8), (3, 5), (1, 2), (0, 2), (2, 1), 2),
    ),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (1, 4, 9, 8), plan_conv2d(4, 6, (9, 8), (3, 3), padding=(1, 1))),
    "uneven": (
        nn.Conv2d(4, 6, (4, 3), padding="same"),
        (1, 4, 9, 8),
        plan_conv2d(4, 6, (12, 8), (4, 3), padding=(0, 1)),
    ),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (1, 4, 9, 8), plan_conv2d(4, 6, (9, 8), (3, 3))),
    "reflect": (
        nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"),
        (1, 4, 9, 8),
        plan_conv2d(4, 6, (11, 12), (3, 3)),
    ),
    "conv1d": (
        nn.Conv1d(4, 6, 5, 2, 3, dilation=2),
        (1, 4, 30),
        plan_conv2d(4, 6, (1, 30), (1, 5), (1, 2), (0, 3), (1, 2)),
    ),
    "circular": (
        nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"),
        (1, 4, 30),
        plan_conv2d(4, 6, (1, 34), (1, 5)),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_plan_of_a_layer(name: str) -> None:
    layer, shape, expected = LAYERS[name]
    assert plan(layer, shape) == expected
    assert plan(layer, torch.Size(shape)) == expected


def test_plan_is_what_the_operator_takes() -> None:
    layer = nn.Conv2d(16, 8, 3, padding=1)
    x = torch.randn(2, 16, 6, 6)
    g = torch.randn(2, 8, 6, 6)
    settings = (layer.kernel_size, layer.stride, (1, 1), layer.dilation, layer.groups)
    method = plan(layer, x.shape).method
    assert torch.equal(conv2d_grad_sqnorm(x, g, *settings), conv2d_grad_sqnorm(x, g, *settings, method=method))


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.Linear(6, 9), (6,), r"input_shape must be \[batch, \*, 6\], got \[6\]"),
        (nn.Linear(6, 9), (2, 5), r"got \[2, 5\]"),
        (nn.Conv2d(4, 6, 3), (4, 9, 8), r"input_shape must be \[batch, 4, height, width\], got \[4, 9, 8\]"),
        (nn.Conv1d(4, 6, 3), (1, 5, 8), r"input_shape must be \[batch, 4, length\], got \[1, 5, 8\]"),
        (nn.Conv2d(4, 6, 3), (1, 4, 2, 8), "plan: "),
        (nn.Conv3d(4, 6, 3), (1, 4, 8, 8, 8), "Conv3d is not covered"),
        (nn.ConvTranspose2d(4, 6, 3), (1, 4, 8, 8), "ConvTranspose2d is not covered"),
    ],
)
def test_plan_refuses(layer: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(layer, shape)
