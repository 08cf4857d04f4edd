"""Convolutions that read the channels which each example keeps."""

from __future__ import annotations

import pytest
import torch
from accounted import check
from torch import Tensor, nn

from memloc_ext import ops


class Net(nn.Module):
    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 24, 3), nn.Conv2d(24, 16, 3, **settings)
        self.settings = settings

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        settings = {"num_generalization": 3, "p_mem": 0.2, "seed": 2, **self.settings}
        return ops.example_tied_conv2d(self.first(x), ids, self.second.weight, self.second.bias, **settings)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"groups": 2}], ids=str)
def test_convolution(settings: dict[str, int]) -> None:
    torch.manual_seed(0)
    check(Net(**settings), (torch.randn(4, 2, 9, 9), torch.tensor([3, 1, 1, 8])))
