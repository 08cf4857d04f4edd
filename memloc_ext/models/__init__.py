"""The models of the paper and small ones to try it on, and how to name the parts of any model."""

from __future__ import annotations

from torch import nn

from memloc_ext.models.layout import Layout, channel_dim, dropout_sites, layer_groups
from memloc_ext.models.lenet import LeNet
from memloc_ext.models.resnet import resnet18, resnet50
from memloc_ext.models.resnet9 import ResNet9
from memloc_ext.models.vit import ViT

__all__ = [
    "NAMES",
    "Layout",
    "LeNet",
    "ResNet9",
    "ViT",
    "build",
    "channel_dim",
    "dropout_sites",
    "layer_groups",
    "lenet",
    "resnet9",
    "resnet18",
    "resnet50",
    "vit",
]

NAMES: tuple[str, ...] = ("lenet", "resnet9", "resnet18", "resnet50", "vit")
lenet, resnet9, vit = LeNet, ResNet9, ViT  # so that every one of NAMES can be called, as torchvision's can


def build(
    name: str, *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """Build a model by its name, randomly initialised.

    Args:
        name: One of ``NAMES``.
        num_classes: Number of classes, positive.
        in_channels: Channels of the image, positive.
        image_size: Side of the square image in pixels; resnet18 and resnet50 take any.
        width: Factor on the number of channels of every layer, positive; only resnet9 takes one other than 1.

    Returns:
        ``[batch, in_channels, image_size, image_size]`` to logits ``[batch, num_classes]``, with a ``layout``.

    Raises:
        ValueError: If ``name`` is unknown, or the model cannot have that ``image_size`` or ``width``.
        ImportError: If the model needs torchvision and it is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"build: name must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "resnet9":
        return ResNet9(num_classes, in_channels, image_size, width)
    if width != 1.0:
        raise ValueError(f"build: width must be 1 for {name}, only resnet9 can be scaled, got {width}")
    if name in ("lenet", "vit"):
        return (LeNet if name == "lenet" else ViT)(num_classes, in_channels, image_size)
    return (resnet18 if name == "resnet18" else resnet50)(num_classes, in_channels)
