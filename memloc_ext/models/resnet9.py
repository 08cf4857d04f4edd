"""The ResNet-9 of the paper."""

from __future__ import annotations

import math

from torch import Tensor, nn

from memloc_ext.models.layout import Layout

_LAYERS = ("conv1", "conv2", "res1.conv1", "res1.conv2", "conv3", "res2.conv1", "res2.conv2", "conv4", "head")


class ResNet9(nn.Module):
    """Eight convolutions with batch norm, two of the pairs residual, and a linear head scaled by 0.2.

    The paper's network needs images of 11 pixels: half of them, rounded up, leave its strided convolution, half of
    those, rounded down, leave the pooling, and the last convolution needs 3. For smaller images the strided convolution
    takes stride 1, which changes no parameter and lowers the need to 6 pixels.

    Args:
        num_classes: Number of classes, positive.
        in_channels: Channels of the image, positive.
        image_size: Side of the square image in pixels, at least 6.
        width: Factor on the number of channels of every layer, positive; rounded, at least one channel.

    Shape:
        ``[batch, in_channels, image_size, image_size]`` to logits ``[batch, num_classes]``.

    Raises:
        ValueError: If ``image_size`` is below 6 or ``width`` is not positive.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, and the code of its authors.
    """

    layout = Layout({layer: (layer,) for layer in _LAYERS}, ("conv1", "conv2", "res1", "conv3", "res2", "conv4"))

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0) -> None:
        super().__init__()
        if image_size < 6:
            raise ValueError(f"ResNet9: image_size must be at least 6, got {image_size}")
        if not 0 < width < math.inf:
            raise ValueError(f"ResNet9: width must be positive and finite, got {width}")
        c64, c128, c256 = (max(1, round(channels * width)) for channels in (64, 128, 256))
        self.conv1 = _conv(in_channels, c64)
        self.conv2 = _conv(c64, c128, kernel_size=5, stride=2 if image_size >= 11 else 1, padding=2)
        self.res1 = Residual(c128)
        self.conv3 = _conv(c128, c256)
        self.pool = nn.MaxPool2d(2)
        self.res2 = Residual(c256)
        self.conv4 = _conv(c256, c128, padding=0)
        self.head = nn.Linear(c128, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.res1(self.conv2(self.conv1(x)))
        x = self.res2(self.pool(self.conv3(x)))
        x = self.conv4(x).amax((2, 3))
        return 0.2 * self.head(x)


class Residual(nn.Module):
    """``x + f(x)`` where ``f`` is two convolutions that keep the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.conv2 = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        return x + self.conv2(self.conv1(x))


def _conv(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())
