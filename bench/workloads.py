"""The models that whole training steps are timed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import GradientAccountant, models
from memloc_ext.models.vit import Block
from memloc_ext.ops import Plan, plan_conv2d, plan_linear

Step = Callable[[], dict[str, Any]]
"""A forward and backward pass; returns squared norms ``[batch]`` by the name of a parameter."""


@dataclass(frozen=True)
class Workload:
    """A model, a batch and the loss of each of its examples.

    Attributes:
        model: In evaluation mode.
        inputs: ``[batch, *]``.
        targets: What ``losses`` compares with.
        losses: Outputs and targets to ``[batch]``; the batch's loss is their sum.
        input_grad: Whether the gradient of ``inputs`` is wanted too, as inside of a network.
        autocast: What the forward pass computes in where torch deems that safe; None for the model's own type.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    losses: Callable[[Tensor, Tensor], Tensor]
    input_grad: bool = False
    autocast: torch.dtype | None = None

    def to(self, device: str) -> Workload:
        """Return it with the model, which is moved, and the batch on a device."""
        moved = (self.model.to(device), self.inputs.to(device), self.targets.to(device))
        return replace(self, **dict(zip(("model", "inputs", "targets"), moved, strict=True)))

    def loss(self, model: nn.Module | None = None) -> Tensor:
        """Run the model, or one that wraps it, forward: the sum of the losses."""
        self.model.zero_grad()
        x = self.inputs.detach().requires_grad_(self.input_grad)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            return self.losses((model or self.model)(x), self.targets).sum()

    def floors(self) -> dict[str, float]:
        """Return the least multiply-adds of each kind of accounting, over those of a plain forward and backward pass.

        Norms cost those of the cheapest way, a Gram half of its symmetric products; the sums of groups none, since
        squaring the tiles of a direct pass costs none either.
        """
        layers: list[tuple[nn.Module, torch.Size]] = []
        for module in self.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(lambda m, args, _: layers.append((m, args[0].shape)))
        with torch.no_grad():
            self.model(self.inputs)
        for module in self.model.modules():
            module._forward_hooks.clear()
        plans = [plan(*layer).multiply_adds for layer in layers]
        weights = [counts["direct"] for counts in plans]
        step = 3 * sum(weights) - (0 if self.input_grad else weights[0])
        norms = [
            min(count * (0.5 if way in ("gram", "shifted_gram") else 1) for way, count in counts.items())
            for counts in plans
        ]
        direct = sum(norm if "outer" in counts else 0 for norm, counts in zip(norms, plans, strict=True))
        return {
            "norms + batch gradient": 1 + min(sum(norms), direct) / step,
            "norms only": 1 + (sum(norms) - sum(weights)) / step,
            "norms + two groups": 1 + direct / step,
        }


def plan(layer: nn.Module, input_shape: Sequence[int]) -> Plan:
    """Return the way that ``auto`` takes on the CPU for a layer.

    A `torch.nn.Conv1d` is a convolution over images of one row. Padding other than zeros is thought of as part of the
    input, which then has none.

    Args:
        layer: A linear layer, or a convolution over one or two dimensions.
        input_shape: Shape of what it is given, the batch dimension included.

    Raises:
        ValueError: If the layer is of another kind, or the shape does not go with it.
    """
    shape = tuple(input_shape)
    if isinstance(layer, nn.Linear):
        if len(shape) < 2 or shape[-1] != layer.in_features:
            raise ValueError(f"plan: input_shape must be [batch, *, {layer.in_features}], got {list(shape)}")
        return plan_linear(prod(shape[1:-1]), layer.in_features, layer.out_features)
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        raise ValueError(f"plan: {type(layer).__name__} is not covered; linear layers, Conv1d and Conv2d are")
    axes = len(layer.kernel_size)
    if len(shape) != axes + 2 or shape[1] != layer.in_channels:
        sizes = "length" if axes == 1 else "height, width"
        raise ValueError(f"plan: input_shape must be [batch, {layer.in_channels}, {sizes}], got {list(shape)}")
    sides = layer._reversed_padding_repeated_twice  # low and high of the last axis first, numbers for "same" too
    size, padding = list(shape[2:]), [0] * axes
    for axis, (low, high) in enumerate(zip(sides[-2::-2], sides[::-2], strict=True)):
        if layer.padding_mode == "zeros" and low == high:
            padding[axis] = low
        else:
            size[axis] += low + high
    row = [1] * (2 - axes)
    geometry = (row + list(layer.kernel_size), row + list(layer.stride))
    return plan_conv2d(
        layer.in_channels,
        layer.out_channels,
        row + size,
        *geometry,
        [0] * (2 - axes) + padding,
        row + list(layer.dilation),
        layer.groups,
    )


@dataclass(frozen=True)
class ScanFloor:
    """Multiply-adds per example of switching every unit of some sites off, one at a time.

    Attributes:
        naive: A forward pass per unit.
        prefix: What lies before the site is computed once.
        delta: And the layer behind it is computed anew for the one channel only.
        forward: A forward pass, for comparison.
    """

    naive: int
    prefix: int
    delta: int
    forward: int


def scan_floor(model: nn.Module, x: Tensor, sites: Sequence[str]) -> ScanFloor:
    """Count the multiply-adds of a scan of a network in which each layer depends on the one before it.

    Args:
        model: Whose convolutions and linear layers count.
        x: ``[1, *]``.
        sites: Modules with one of these layers in each.
    """
    layers: list[tuple[nn.Module, int]] = []

    def count(layer: nn.Module, args: Any, output: Tensor) -> None:
        weight = layer.get_parameter("weight")
        layers.append((layer, output.numel() // weight.shape[0] * weight.numel()))

    kinds = (nn.Conv2d, nn.Linear)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    costs, naive, prefix, delta = [cost for _, cost in layers], 0, 0, 0
    for site in sites:
        inside = set(model.get_submodule(site).modules())
        position = next(i for i, (layer, _) in enumerate(layers) if layer in inside)
        units = len(layers[position][0].get_parameter("weight"))
        following, rest = costs[position + 1], sum(costs[position + 2 :])
        naive += units * sum(costs)
        prefix += units * (following + rest)
        delta += following + units * rest  # one input channel of so many, for each of them
    return ScanFloor(naive, prefix + sum(costs), delta + sum(costs), sum(costs))


class VisionTransformer(nn.Module):
    """64 patches of 4 x 4 pixels, depth 6, 8 heads, mlp 512; positions are not trained and outputs averaged.

    Without a class token or trained positions, which some of the peers do not know.

    Args:
        dim: Channels of a token.
    """

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Linear(48, dim)
        self.register_buffer("position", 0.02 * torch.randn(1, 64, dim))
        self.blocks = nn.Sequential(*(Block(dim, 8, 512, dropout=0.0) for _ in range(6)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of ``[batch, 3, 32, 32]``."""
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
        return self.head(self.norm(self.blocks(self.embedding(patches) + self.position)).mean(1))


def workloads() -> dict[str, Callable[[], Workload]]:
    """Return the workloads by name, each built when called."""
    return {
        "resnet9-64x32x32": lambda: classifier(
            models.build("resnet9", num_classes=10, in_channels=3, image_size=32), 64
        ),
        "vit-32x64-256": lambda: classifier(VisionTransformer(), 32),
        "mlp-512x784-512-512-10": lambda: replace(classifier(_mlp(), 512), inputs=torch.randn(512, 784)),
        "conv-64x16x16-128-to-128-k3s1": _convolution,
    }


KINDS: dict[str, dict[str, Any]] = {
    "norms + batch gradient": {},
    "norms only": {"weight_grads": False},
    "norms + two groups": {"num_groups": 2},
}
"""Kinds of accounting, and the arguments of `GradientAccountant.backward` that ask for them."""


def accounted(workload: Workload, **settings: Any) -> Step:
    """Return a step that accounts; with ``num_groups`` a fifth of the examples are in another group."""
    accountant = GradientAccountant(workload.model)
    if "num_groups" in settings:
        settings["group_ids"] = (torch.arange(len(workload.inputs), device=workload.inputs.device) % 5 == 0).long()

    def step() -> dict[str, Tensor]:
        with accountant:
            return accountant.backward(workload.loss(), loss_reduction="sum", **settings).sqnorm

    return step


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def classifier(model: nn.Module, batch: int) -> Workload:
    """Return a model of ten classes on random images of CIFAR-10's shape."""

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    for module in model.modules():
        if (
            isinstance(module, nn.BatchNorm2d) and module.running_var is not None
        ):  # as after training, so that activations keep their scale
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return Workload(model.eval(), torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,)), losses)


def _convolution() -> Workload:
    def losses(output: Tensor, direction: Tensor) -> Tensor:
        return (output * direction).flatten(1).sum(1)

    model = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))
    return Workload(model, torch.randn(64, 128, 16, 16).relu(), 0.01 * torch.randn(64, 128, 16, 16), losses, True)
