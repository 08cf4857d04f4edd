"""A training step with example-tied dropout that skips: over the same that computes all, and over plain training.

Bound: the multiply-adds of the channels that are kept. Peers: the dropout's operator, and a table of masks with a row
for each example, as in the code of MemSinks; both compute everything. The ViT is `bench.workloads.VisionTransformer`
with an MLP of four times its width, as in its paper.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memloc_ext
from bench.measure import interleaved, ratios
from bench.workloads import VisionTransformer
from memloc_ext.models import ResNet9
from memloc_ext.models.vit import Block
from memloc_ext.nn import insert_after, insert_example_tied_dropout
from memloc_ext.reference.example_tied_dropout import keep_mask

P_GEN, P_MEM, EXAMPLES = 0.2, 0.1, 4096


class Masked(nn.Module):
    """Multiplies each example's channels by its row of a table."""

    def __init__(self, site: int, channel_dim: int) -> None:
        super().__init__()
        self.site, self.channel_dim, self.table = site, channel_dim, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        channels, ids = x.shape[self.channel_dim], memloc_ext.nn.current_example_ids()
        assert ids is not None
        if not len(self.table):
            self.table = keep_mask(torch.arange(EXAMPLES), channels, int(P_GEN * channels), P_MEM, 0, self.site).float()
        shape = [len(x), *[1] * (x.dim() - 1)]
        shape[self.channel_dim] = channels
        return x * self.table[ids].reshape(shape)


class Gpt2Block(nn.Module):
    """A block of GPT-2's size: causal attention and an MLP, of 768 channels, 12 heads and 3072 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layer, self.mask = layer, nn.Transformer.generate_square_subsequent_mask(256)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``, ``[batch, 256, 768]``."""
        return self.layer(x, self.mask, is_causal=True)


def vit() -> nn.Module:
    model = VisionTransformer()
    model.blocks = nn.Sequential(*(Block(256, 8, 1024, dropout=0.0) for _ in range(6)))
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, ...], int]] = {
    "resnet9-64x32x32": (ResNet9, list(ResNet9.layout.sites), (64, 3, 32, 32), 1),
    "vit-32x64-256-1024": (vit, [f"blocks.{i}.mlp.act" for i in range(6)], (32, 3, 32, 32), -1),
    "gpt2-block-8x256-768": (Gpt2Block, ["layer.linear1"], (8, 256, 768), -1),
}


@pytest.mark.parametrize("name", CASES)
def test_tied_training(name: str, benchmark: Any) -> None:
    torch.manual_seed(0)
    make, sites, shape, channel_dim = CASES[name]
    model, x, ids = make().train(), torch.randn(shape), torch.randperm(EXAMPLES)[: shape[0]]
    settings = {"p_gen": P_GEN, "p_mem": P_MEM, "channel_dim": channel_dim}
    models = {
        "ours": insert_example_tied_dropout(copy.deepcopy(model), sites, **settings, skip=True),
        "dropout, all computed": insert_example_tied_dropout(copy.deepcopy(model), sites, **settings),
        "a table of masks, all computed": insert_after(
            copy.deepcopy(model), sites, lambda site: Masked(site, channel_dim)
        ),
        "plain training": model,
    }

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with memloc_ext.example_ids(ids):
            output = model(x).flatten(1)
        F.cross_entropy(output, ids % output.shape[1]).backward()
        optimizer.step()

    gradients = []
    for model in list(models.values())[:3]:
        step(model, torch.optim.SGD(model.parameters(), lr=0.0))  # the first pass finds out what can skip
        step(model, torch.optim.SGD(model.parameters(), lr=0.0))
        gradients.append([p.grad for p in model.parameters()])
    for others in gradients[1:]:
        torch.testing.assert_close(gradients[0], others, rtol=1e-2, atol=1e-4)
    steps = {
        key: lambda m=m, o=torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9): step(m, o)  # noqa: B008
        for key, m in models.items()
    }
    benchmark.extra_info["time over"] = ratios(interleaved(steps, rounds=9), "ours")
    benchmark.pedantic(steps["ours"], rounds=3)
