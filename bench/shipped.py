"""What a model costs without its memorization channels, beside the full one: ``python -m bench.shipped``.

    python -m bench.shipped --result bench/results/shipped.json

The networks are untrained, which changes no cost; their outputs are compared first. A pass is in mode ``drop`` and in
``memloc_ext.nn.without_memorization``, without gradients.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import QUIET
from bench.measure import interleaved, machine, ratios
from memloc_ext.files import write_json
from memloc_ext.models import ResNet9, ViT, channel_dim, dropout_sites
from memloc_ext.nn import insert_example_tied_dropout, without_memorization


@dataclass(frozen=True)
class Options:
    """Where to put the numbers, and how many rounds are timed."""

    result: Path | None = None
    """JSON file of the numbers."""
    rounds: int = 15
    """Passes of each model."""


class Gpt2(nn.Module):
    """Blocks of GPT-2 small."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        self.gpt2 = GPT2Model(
            GPT2Config(n_layer=layers, vocab_size=256, use_cache=False, bos_token_id=0, eos_token_id=0)
        )
        self.sites = [f"gpt2.h.{i}.mlp.act" for i in range(layers)]

    def forward(self, ids: Tensor) -> Tensor:
        """Return the last hidden states, ``[batch, tokens, 768]``."""
        return self.gpt2(ids).last_hidden_state


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ResNet-9 of the digits run, 8 x 8, B = 64": (
        lambda: ResNet9(in_channels=1, image_size=8, width=0.5),
        lambda: torch.randn(64, 1, 8, 8),
    ),
    "ResNet-9, 32 x 32, B = 32": (ResNet9, lambda: torch.randn(32, 3, 32, 32)),
    "ViT, 64 tokens, dim 256, depth 6, MLP 1024, B = 32": (
        lambda: ViT(patch=4, dim=256, depth=6, mlp=1024),
        lambda: torch.randn(32, 3, 32, 32),
    ),
    "GPT-2, two blocks, 256 tokens, B = 4": (Gpt2, lambda: torch.randint(256, (4, 256))),
}
"""A model, and a batch for it."""


def measured(name: str, rounds: int) -> dict[str, Any]:
    """Return the costs of both models of a case."""
    torch.manual_seed(0)
    make, batch = CASES[name]
    full, x = make().eval(), batch()
    tokens = isinstance(full, Gpt2)
    sites = full.sites if tokens else dropout_sites(full)
    insert_example_tied_dropout(full, sites, channel_dim=-1 if tokens else channel_dim(full))
    models = {"full": full, "shipped": without_memorization(full, x)}
    with torch.no_grad():
        torch.testing.assert_close(models["shipped"](x), full(x), rtol=1e-3, atol=1e-4)
        times = interleaved({kind: lambda model=model: model(x) for kind, model in models.items()}, rounds)
        costs = {kind: cost(model, x) for kind, model in models.items()}
    return {"case": name, "p_gen": 0.2, **costs, "time of shipped over full": ratios(times, "shipped")["full"]}


def cost(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Return the parameters of a model, and its multiply-adds per example."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() / 2 / len(x)}


def main() -> None:
    """Measure every case, and print the shares."""
    if any(os.environ.get(name) != value for name, value in QUIET.items()):  # read when torch loads
        os.execve(sys.executable, [sys.executable, "-m", "bench.shipped", *sys.argv[1:]], os.environ | QUIET)
    options = tyro.cli(Options, description=__doc__)
    cases = []
    for name in CASES:
        case = measured(name, options.rounds)
        cases.append(case)
        shares = [case["shipped"][what] / case["full"][what] for what in ("parameters", "multiply_adds")]
        time = case["time of shipped over full"]["median"]
        print(f"{name}: parameters {shares[0]:.3f}x, multiply-adds {shares[1]:.3f}x, time {time}x", flush=True)
    if options.result is not None:
        write_json(options.result, {"command": "python -m bench.shipped", "machine": machine(), "cases": cases})


if __name__ == "__main__":
    main()
