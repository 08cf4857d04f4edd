from types import ModuleType

import pytest
import torch
from ablating import check, labels, plain_heads_losses, sample, settled
from torch import Tensor, nn

from memloc_ext import ablation_losses
from memloc_ext._torchvision import import_torchvision
from memloc_ext.ablation.network import HOWS
from memloc_ext.models.lenet import LeNet
from memloc_ext.models.resnet9 import ResNet9
from memloc_ext.models.vit import ViT


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    return import_torchvision("models")


@pytest.mark.parametrize("how", HOWS)
def test_lenet(how: str) -> None:
    layers = {f"{block}{end}": f"{block}.0" for block in ("conv1", "conv2", "fc1", "fc2") for end in ("", ".1")}
    found = check(LeNet(3, 1, 8).train(), torch.randn(4, 1, 8, 8), how=how, layers=layers)
    assert {name: len(site.loss) for name, site in found.items()} == {
        "conv1.1": 6,
        "conv2.1": 16,
        "fc1": 120,
        "fc2": 84,
    }


@pytest.mark.parametrize("how", HOWS)
def test_resnet9(how: str) -> None:
    blocks = ["conv1", "conv2", "res1.conv1", "res1.conv2", "conv3", "res2.conv1", "res2.conv2", "conv4"]
    model, x = settled(ResNet9(3, image_size=11, width=0.125)), torch.randn(3, 3, 11, 11)
    assert list(check(model, x, how=how, layers={block: block + ".0" for block in blocks})) == blocks


def small_vit() -> ViT:
    return ViT(3, 3, 8, dim=16, heads=2, depth=2, mlp=12, patch=4)


@pytest.mark.parametrize("how", HOWS)
def test_vit(how: str) -> None:
    sites = ["blocks.0.mlp.fc1", "blocks.1.mlp.act"]
    check(small_vit(), torch.randn(3, 3, 8, 8), sites, how, layers={"blocks.1.mlp.act": "blocks.1.mlp.fc1"})


def test_heads() -> None:
    model, x, y = small_vit(), torch.randn(3, 3, 8, 8), labels(3)
    found = ablation_losses(model, x, y)
    assert list(found) == [
        "embedding.patches",
        *(
            f"blocks.{i}.{end}"
            for i in range(2)
            for end in ("attention.qkv", "attention.heads", "attention", "mlp.act", "mlp")
        ),
    ]
    for i in range(2):
        expected = plain_heads_losses(model, x, y, model.blocks[i].attention.proj, 2)
        torch.testing.assert_close(found[f"blocks.{i}.attention.heads"].loss, expected)


def test_residual_network_of_torchvision(torchvision: ModuleType) -> None:
    sites = ["layer1.0.bn1", "layer2.0", "layer2.0.downsample", "layer4.1.conv2"]
    check(settled(torchvision.resnet18(num_classes=3)), torch.randn(2, 3, 32, 32), sites, count=1)


def test_concatenating_network_of_torchvision(torchvision: ModuleType) -> None:
    sites = ["features.denseblock1.denselayer2.conv2", "features.denseblock4.denselayer15.norm2"]
    check(settled(torchvision.densenet121(num_classes=3)), torch.randn(2, 3, 64, 64), sites, count=1)


def test_branches_of_torchvision(torchvision: ModuleType) -> None:
    model = settled(torchvision.googlenet(num_classes=3, init_weights=False, aux_logits=False))
    check(model, torch.randn(2, 3, 32, 32), ["inception3a.branch3", "inception5b.branch1.bn"], count=1)


def test_depthwise_convolutions_of_torchvision(torchvision: ModuleType) -> None:
    model = settled(torchvision.mobilenet_v3_small(num_classes=3))
    check(model, torch.randn(2, 3, 32, 32), ["features.3", "features.8.block.2"], count=1)


def test_transformers_of_torchvision(torchvision: ModuleType) -> None:
    vit = torchvision.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=3)
    nn.init.normal_(vit.heads.head.weight)
    x, y, layer = torch.randn(2, 3, 32, 32), labels(2), "encoder.layers.encoder_layer_0"
    found = check(
        vit, x, [f"{layer}.mlp.1", "encoder.layers.encoder_layer_1.mlp", f"{layer}.self_attention.heads", "conv_proj"]
    )
    expected = plain_heads_losses(vit, x, y, vit.get_submodule(f"{layer}.self_attention").out_proj, 4)
    torch.testing.assert_close(found[f"{layer}.self_attention.heads"].loss, expected)
    swin = torchvision.SwinTransformer([4, 4], 16, [1, 2], [2, 4], [4, 4], num_classes=3)
    sites = ["features.1.0.mlp.1", "features.3.1.mlp.1", "features.2.reduction"]
    check(swin, x, sites, dims=dict.fromkeys(sites, 3))
    block = torchvision.convnext.CNBlockConfig
    convnext = torchvision.ConvNeXt([block(16, 32, 1), block(32, None, 1)], num_classes=3)
    check(convnext, x, ["features.0", "features.1.0.block.0"])


def pooled(layer: nn.TransformerEncoderLayer, batch_first: bool) -> nn.Module:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1) if batch_first else self.layer(x.transpose(0, 1)).mean(0))

    return Pooled()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer(batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=norm_first)
    model, x, y = pooled(layer, batch_first), torch.randn(3, 5, 8), labels(3)
    found = check(model, x, ["layer.linear1", "layer.norm1", "layer.self_attn.heads"])
    heads = plain_heads_losses(model, x, y, layer.self_attn.out_proj, 2)
    torch.testing.assert_close(found["layer.self_attn.heads"].loss, heads)
    assert set(check(model, x)) == {"layer.linear1", "layer.linear2", "layer.self_attn.heads"}


def test_learned_queries() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.project = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(4, 8)
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x, query = self.project(x), self.query.expand(len(x), -1, -1)
            return self.head(self.attention(query, x, x, need_weights=False)[0][:, 0])

    model, x = Pool(), torch.randn(3, 5, 4)
    found = check(model, x, ["project", "attention.heads"])
    expected = plain_heads_losses(model, x, labels(3), model.attention.out_proj, 2)
    torch.testing.assert_close(found["attention.heads"].loss, expected)


def test_sample() -> None:
    assert sample(1, 3) == [0]
    assert {0, 9} <= set(sample(10, 2))
