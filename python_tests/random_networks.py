"""Random small networks with residuals and concatenations."""

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("conv", "residual", "concatenation", "depthwise", "norm", "pool", "gate", "in place", "norms", "same")


class RandomNetwork(nn.Module):
    """Blocks of the given kinds, one after the other; a residual goes back by any number of blocks."""

    def __init__(self, blocks: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.blocks, self.layers, channels = blocks, nn.ModuleList(), [2]
        for kind, width, back in blocks:
            inputs = channels[-1]
            source = channels[max(0, len(channels) - 1 - back)]
            outputs = {"conv": width, "residual": source, "concatenation": width + source, "norms": width}
            channels.append(outputs.get(kind, inputs))
            self.layers.append(_layer(kind, inputs, source if kind == "residual" else width))
        self.head = nn.Linear(channels[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for (kind, _, back), layer in zip(self.blocks, self.layers, strict=True):
            x, source = values[-1], values[max(0, len(values) - 1 - back)]
            y = layer(x)
            if kind == "residual":
                y = F.relu(y + F.interpolate(source, y.shape[2:]))
            elif kind == "concatenation":
                y = torch.cat([F.interpolate(source, y.shape[2:]), y], 1)
            elif kind == "gate":
                y = x * y
            elif kind == "in place":
                y = y.mul_(0.5).relu_() + 0.1 * x
            elif kind == "same":
                y = y + F.leaky_relu(x)
            values.append(y)
        return self.head(values[-1].flatten(2).amax(2))


def _layer(kind: str, inputs: int, width: int) -> nn.Module:
    if kind in ("conv", "residual", "concatenation"):
        return nn.Conv2d(inputs, width, 3, padding=1)
    if kind == "depthwise":
        return nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
    if kind == "norm":
        return nn.Sequential(nn.GroupNorm(1, inputs), nn.ReLU())
    if kind == "norms":
        return nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    if kind == "gate":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, inputs, 1), nn.Sigmoid())
    if kind == "pool":
        return nn.MaxPool2d(3, 1, 1)
    return nn.Conv2d(inputs, inputs, 1) if kind == "in place" else nn.Identity()


blocks = st.tuples(st.sampled_from(KINDS), st.integers(1, 4), st.integers(0, 4))
