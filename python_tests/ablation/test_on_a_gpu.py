"""What scan and search do otherwise on a GPU, with what they ask of it mocked."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import ablation_losses
from memloc_ext.ablation import layers, unit_sets
from memloc_ext.ablation.network import memory_budget

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "expected"),
    [(40 << 30, 0, 0, 10 << 30), (139 << 30, 0, 0, 16 << 30), (2 << 30, 6 << 30, 4 << 30, 1 << 30)],
)
def test_the_memory_budget_follows_the_free_memory(
    free: int, reserved: int, allocated: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    assert memory_budget(None, GPU) == expected
    assert memory_budget(12345, GPU) == 12345
    assert memory_budget(None, torch.device("cpu")) == 1 << 30


@pytest.mark.parametrize(("shape", "dim"), [((7, 1, 5, 3, 3), 1), ((7, 1, 4, 5), 2), ((7, 1, 5), 1)])
def test_masks_replace_what_offsets_do(shape: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    t, mask, baseline = torch.randn(shape, dtype=torch.float64), torch.rand(4, 5) < 0.4, torch.randn(5)
    rows = torch.tensor([0, 0, 1, 2, 2, 3, 3])
    mask[1] = False
    expected = unit_sets._edit(mask, baseline, dim)(t, rows, lambda _: t)
    assert torch.equal(unit_sets.masked_edit(mask, baseline, dim)(t, rows, lambda _: t), expected)
    assert not torch.equal(expected, t)


class Residual(nn.Module):
    """Convolutions with a ReLU behind them, with and without a residual, and one without a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.first = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.third = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.site(x).relu()).relu()
        x = (self.norm(self.second(x)) + x).relu()
        return self.third(self.third.weight.new_ones(1) * x).relu().flatten(2).mean(2)


def test_convolutions_end_in_cudnns_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, y = Residual().eval(), torch.randn(5, 2, 7, 6), torch.arange(5) % 3
    expected = ablation_losses(model, x, y, ["site"])["site"].loss
    used: list[str] = []

    def fused(x: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        used.append("relu")
        assert not torch.is_grad_enabled()
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def added(x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: Any) -> Tensor:
        used.append("add")
        return (F.conv2d(x, weight, bias, *geometry) + alpha * z).relu()

    monkeypatch.setattr(layers, "has_fused", lambda x: True)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", added)
    torch.testing.assert_close(ablation_losses(model, x, y, ["site"])["site"].loss, expected)
    assert {"relu", "add"} == set(used)


def test_a_convolution_that_cudnn_has_no_kernel_for_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, y = Residual().eval(), torch.randn(5, 2, 7, 6), torch.arange(5) % 3
    expected = ablation_losses(model, x, y, ["site"])["site"].loss
    asked: list[tuple[int, ...]] = []

    def refused(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        asked.append(tuple(weight.shape))
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(layers, "has_fused", lambda x: True)
    monkeypatch.setattr(layers, "_WITHOUT", set())
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch, name, refused)
    for _ in range(2):
        assert torch.equal(ablation_losses(model, x, y, ["site"])["site"].loss, expected)
    assert asked
    assert len(asked) == len(set(asked))


def test_fused_convolutions_are_for_gpus_without_gradients() -> None:
    assert not layers.has_fused(torch.ones(1))
