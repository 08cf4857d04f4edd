"""ResNet-18 and ResNet-50: torchvision's, with the ImageNet stem."""

from __future__ import annotations

from torch import nn

from memloc_ext._torchvision import import_torchvision
from memloc_ext.models.layout import Layout

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_LAYOUT = Layout(
    groups={"stem": ("conv1", "bn1"), **{stage: (stage,) for stage in _STAGES}, "fc": ("fc",)},
    # A mask per channel commutes with max-pooling, so the first site comes after it, on a quarter of the activations.
    # One site per stage, not per block: the masks of blocks on one residual stream would multiply.
    sites=("maxpool", *_STAGES),
)


def resnet18(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build torchvision's ResNet-18, randomly initialised, with a ``layout``.

    Args:
        num_classes: Number of classes, positive.
        in_channels: Channels of the image, positive.

    Returns:
        ``[batch, in_channels, height, width]``, of any size, to logits ``[batch, num_classes]``.

    Raises:
        ImportError: If torchvision is not installed.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """
    return _resnet("resnet18", num_classes, in_channels)


def resnet50(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build torchvision's ResNet-50, randomly initialised, with a ``layout``: otherwise as `resnet18`."""
    return _resnet("resnet50", num_classes, in_channels)


def _resnet(name: str, num_classes: int, in_channels: int) -> nn.Module:
    model = getattr(import_torchvision("models"), name)(num_classes=num_classes)
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        # torchvision initialises all its convolutions so
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.layout = _LAYOUT
    return model
