"""Where the channels of a site are: in the recording and in a model that is edited, of every kind of network."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from ablating import Model, edited_loss, labels, recorded, settled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import ablation_losses, apply_ablation
from memloc_ext._torchvision import import_torchvision

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# what moves, merges or drops dimensions; of a tensor whose channels are at a dimension other than the first
MOVES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "relu": lambda t, dim: F.relu(t),
    "last": lambda t, dim: t.movedim(dim, -1),
    "second": lambda t, dim: t.movedim(dim, 1),
    "gelu": lambda t, dim: F.gelu(t.contiguous()),
    "transpose": lambda t, dim: t.transpose(1, -1),
    "mean": lambda t, dim: t.mean(_other(t, dim)) if t.dim() > 2 else t,
    "select": lambda t, dim: t.select(_other(t, dim), 0) if t.dim() > 2 else t,
    "merge": lambda t, dim: t.flatten(dim + 1) if dim < t.dim() - 2 else t,
    "unsqueeze": lambda t, dim: t.unsqueeze(-1) if t.dim() < 5 else t,
    "halves": lambda t, dim: torch.cat(t.chunk(2, 0), 0) if len(t) > 1 else t,
    "twice": lambda t, dim: torch.cat([t, t], _other(t, dim)) if t.dim() > 2 else t,
    "residual": lambda t, dim: t + 0.5 * F.relu(t),
    "roll": lambda t, dim: t.roll(1, -1) if dim != t.dim() - 1 else t,
    "split": lambda t, dim: t.unflatten(_other(t, dim), (1, -1)) if 2 < t.dim() < 5 else t,
}


def _other(t: Tensor, dim: int) -> int:
    """Return a dimension that is neither the batch's nor the channels'."""
    return 1 if dim != 1 else t.dim() - 1


def varying(t: Tensor) -> list[int]:
    """Return the dimensions along which a tensor varies: where a convolution of bias alone put its channels."""
    return [d for d in range(t.dim()) if t.shape[d] > 1 and bool((t != t.narrow(d, 0, 1)).any())]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(MOVES)), max_size=5), st.integers(1, 3), st.integers(2, 3), st.integers(1, 3))
def test_channels_are_where_the_convolution_puts_them(moves: list[str], rank: int, size: int, batch: int) -> None:
    """The sizes of channels, positions and batch coincide; the edited model is run with a batch, the recording not."""
    conv = CONVOLUTIONS[rank](2, size, 1)
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.copy_(torch.arange(1.0, size + 1))

    def forward(m: Model, x: Tensor) -> Tensor:
        x = m.conv(x)
        for move in moves:
            (dim,) = varying(x.detach())
            x = MOVES[move](x, dim)
        seen.append(m.site(x).detach())
        return seen[-1].flatten(1).sum(1, keepdim=True) * torch.ones(3)

    model, seen = Model(forward, conv=conv, site=nn.Identity()).eval(), list[Tensor]()
    x = torch.randn(batch, 2, *[size] * rank)
    model(x)
    (dim,) = varying(seen[0])
    for given_x in (x, x[:1]):
        with apply_ablation(model, [("site", 1)]) as edited:
            edited(given_x)
        assert not seen[-1].select(dim, 1).any()
        assert seen[-1].select(dim, 0).all()
    assert recorded(model, x, strict=False).dims["site"] == dim


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 3), st.integers(2, 4), st.integers(1, 4))
def test_networks_of_signals_images_and_volumes(data: st.DataObject, rank: int, channels: int, batch: int) -> None:
    """As many positions as channels, or as examples."""
    size = data.draw(st.sampled_from([channels, batch, 5]))
    kinds: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: CONVOLUTIONS[rank](channels, channels, 1),
        "norm": lambda: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](channels),
        "instances": lambda: (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1](channels, affine=True),
        "groups": lambda: nn.GroupNorm(1, channels),
        "relu": lambda: nn.ReLU(inplace=True),
        "pool": lambda: (nn.MaxPool1d, nn.AvgPool2d, nn.MaxPool3d)[rank - 1](3, 1, 1),
        "last": lambda: Last(channels),
    }
    drawn = data.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=5))
    layers = [CONVOLUTIONS[rank](2, channels, 1), *(kinds[kind]() for kind in drawn)]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1](1)
    model = settled(nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(channels, 3))).double().eval()
    x, y = torch.randn(batch, 2, *[size] * rank).double(), labels(batch)
    site, unit = str(data.draw(st.integers(0, len(drawn)))), data.draw(st.integers(0, channels - 1))
    found = ablation_losses(model, x, y, [site])
    assert found.channel_dims == {site: 1}
    expected = found[site].loss[unit]
    torch.testing.assert_close(edited_loss(model, x, y, site, unit), expected)
    with apply_ablation(model, [(site, unit)], channel_dims=found.channel_dims):
        torch.testing.assert_close(F.cross_entropy(model(x), y, reduction="none"), expected)


class Last(nn.Module):
    """A layer norm and linear layer of the channels, as in ConvNeXt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.linear, self.act = nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.linear(self.norm(x.movedim(1, -1)))).movedim(-1, 1)


FAMILIES: dict[str, Callable[[Any], nn.Module]] = {
    "alexnet": lambda models: models.alexnet(num_classes=3),
    "convnext": lambda models: models.ConvNeXt(
        [models.convnext.CNBlockConfig(8, 8, 1), models.convnext.CNBlockConfig(8, None, 1)], num_classes=3
    ),
    "densenet": lambda models: models.DenseNet(4, (2, 2), 8, num_classes=3),
    "efficientnet": lambda models: models.EfficientNet(
        [models.efficientnet.MBConvConfig(4, 3, 2, 8, 8, 2), models.efficientnet.FusedMBConvConfig(2, 3, 1, 8, 8, 1)],
        0.0,
        num_classes=3,
        last_channel=16,
    ),
    "googlenet": lambda models: models.googlenet(num_classes=3, init_weights=False, aux_logits=False),
    "inception": lambda models: nn.Sequential(
        models.inception.InceptionA(3, 8, models.inception.BasicConv2d),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(232, 3),
    ),
    "maxvit": lambda models: models.MaxVit((32, 32), 8, 2, [8, 8], [1, 1], 4, 0.0, num_classes=3),
    "mnasnet": lambda models: models.MNASNet(0.1, num_classes=3),
    "mobilenetv2": lambda models: models.MobileNetV2(3, 0.1, [[2, 8, 2, 1]]),
    "mobilenetv3": lambda models: models.mobilenet_v3_small(num_classes=3, width_mult=0.2),
    "regnet": lambda models: models.RegNet(
        models.regnet.BlockParams.from_init_params(depth=3, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25), 3
    ),
    "resnet": lambda models: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 3, groups=2, width_per_group=8),
    "shufflenetv2": lambda models: models.ShuffleNetV2([2, 1, 1], [8, 8, 16, 16, 32], num_classes=3),
    "squeezenet": lambda models: models.squeezenet1_1(num_classes=3),
    "swin": lambda models: models.SwinTransformer([4, 4], 8, [1, 2], [2, 2], [4, 4], num_classes=3),
    "swin_v2": lambda models: models.SwinTransformer(
        [4, 4],
        8,
        [2, 1],
        [2, 2],
        [4, 4],
        num_classes=3,
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2,
    ),
    "vgg": lambda models: nn.Sequential(
        models.vgg.make_layers([8, "M", 8, "M"], True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ),
    "vit": lambda models: models.VisionTransformer(32, 8, 2, 4, 16, 24, num_classes=3),
}


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    return import_torchvision("models")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_torchvision(torchvision: ModuleType, family: str) -> None:
    model, x, y = settled(FAMILIES[family](torchvision)).eval(), torch.randn(2, 3, 64, 64), labels(2)
    if family not in ("alexnet", "squeezenet", "googlenet"):
        x = x[..., ::2, ::2]
    recording = recorded(model, x)
    units: dict[str, int] = {}
    for name, values in recording.returned.items():
        shapes = [None if value is None else recording.shapes[value] for value in values]
        if name and shapes[0] is not None and len(shapes[0]) > 1 and len(set(shapes)) == 1:
            module, dim = model.get_submodule(name), recording.dims[name]
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                assert dim == 1
            elif isinstance(module, nn.Linear):
                assert dim == len(shapes[0]) - 1
            if shapes[0][dim] <= 32:
                units[name] = shapes[0][dim]
    names = sorted(units)
    sites = [names[i] for i in torch.randperm(len(names))[:5].tolist()]
    found = ablation_losses(model, x, y, sites)
    for site in sites:
        unit = int(torch.randint(units[site], ()))
        torch.testing.assert_close(edited_loss(model, x, y, site, unit), found[site].loss[unit], rtol=1e-4, atol=1e-5)
