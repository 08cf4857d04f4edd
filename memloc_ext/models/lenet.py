"""LeNet-5 with ReLU and max-pooling."""

from __future__ import annotations

from torch import Tensor, nn

from memloc_ext.models.layout import Layout

_LAYERS = ("conv1", "conv2", "fc1", "fc2", "head")


class LeNet(nn.Module):
    """Two convolutions and three linear layers, for small images.

    Both convolutions keep the image size, so that 8x8 digits pass as well.

    Args:
        num_classes: Number of classes, positive.
        in_channels: Channels of the image, positive.
        image_size: Side of the square image in pixels, at least 4.

    Shape:
        ``[batch, in_channels, image_size, image_size]`` to logits ``[batch, num_classes]``.

    Raises:
        ValueError: If ``image_size`` is below 4.

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998.
    """

    # Not the convolutions: of 6 channels one would be left for what all examples share, and the network does not train.
    layout = Layout(groups={layer: (layer,) for layer in _LAYERS}, sites=("fc1", "fc2"))

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"LeNet: image_size must be at least 4, got {image_size}")
        self.conv1 = nn.Sequential(nn.Conv2d(in_channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        self.fc1 = nn.Sequential(nn.Linear(16 * (image_size // 4) ** 2, 120), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(120, 84), nn.ReLU())
        self.head = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.conv2(self.conv1(x))
        return self.head(self.fc2(self.fc1(x.flatten(1))))
