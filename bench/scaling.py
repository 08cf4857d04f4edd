"""What the probes cost as networks grow, in units that carry over to another machine: ``python bench/scaling.py``.

Gradient accounting is timed against a plain forward and backward pass, step about; beside it stand the multiply-adds
that it adds at the least. A step of the flip search is given in forward passes of one example. Both are over random
weights, on which neither depends. Writes ``results/<machine>/scaling.json``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, also where bench is not installed

import torch
from torch import nn
from torch.nn import functional as F

from bench.measure import folder, interleaved, machine, ratios
from bench.workloads import KINDS, Workload, accounted
from memloc_ext import localize, models
from memloc_ext.files import write_json

ACCOUNTED: list[tuple[str, float, int, int]] = [
    ("resnet9", 0.25, 32, 32),
    ("resnet9", 0.5, 32, 8),
    ("resnet9", 0.5, 32, 32),
    ("resnet9", 0.5, 32, 128),
    ("resnet9", 1.0, 32, 32),
    ("resnet18", 1.0, 64, 16),
    ("resnet50", 1.0, 64, 16),
    ("resnet50", 1.0, 224, 4),
]
"""Model, width, side of the image and batch size."""

SEARCHED: list[tuple[str, float, int, int]] = [
    ("resnet9", 0.5, 8, 16),
    ("resnet9", 0.25, 32, 8),
    ("resnet9", 0.5, 32, 8),
    ("resnet9", 1.0, 32, 8),
    ("resnet18", 1.0, 64, 4),
    ("resnet50", 1.0, 64, 2),
]
"""The same; so many examples at a time."""


def build(name: str, width: float, size: int) -> nn.Module:
    """Return a model in evaluation mode, its statistics away from those of the initialisation."""
    model = models.build(name, in_channels=3, image_size=size, width=width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def accounting(name: str, width: float, size: int, batch: int) -> dict[str, Any]:
    """Time the kinds of accounting against a plain step, in evaluation mode."""
    model = build(name, width, size)
    inputs, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    work = Workload(model, inputs, labels, lambda logits, y: F.cross_entropy(logits, y, reduction="none"))
    steps: dict[str, Callable[[], object]] = {"plain": lambda: work.loss().backward()}
    steps |= {kind: accounted(work, **settings) for kind, settings in KINDS.items()}
    times = interleaved(steps, rounds=15, before=1)
    over = {kind: ratios({kind: times[kind], "plain": times["plain"]}, kind)["plain"] for kind in KINDS}
    floors = {kind: round(floor, 3) for kind, floor in work.floors().items()}
    return {"case": f"{name}-{width:g}-{batch}x{size}x{size}", "time over plain": over, "multiply-adds": floors}


@torch.no_grad()
def normalized(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Give batch norms the statistics of some inputs, so that activations keep their scale through all layers."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()(x)
    return model.eval()


def search(name: str, width: float, size: int, examples: int) -> dict[str, Any]:
    """Time a step of the flip search: the difference of a long and a short search, over that of their steps."""
    model = normalized(build(name, width, size), torch.randn(16, 3, size, size))
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    margin = 30 / (0.2 if name == "resnet9" else 1)  # nothing flips the prediction, and its gradient is not 0 yet
    head.bias = nn.Parameter(margin * F.one_hot(torch.tensor(0), 10).float())
    x, y = torch.randn(examples, 3, size, size), torch.zeros(examples, dtype=torch.int64)
    quotients = []
    for _ in range(5):
        forward = (
            statistics.median(interleaved({"forward": lambda: _forward(model, x)}, rounds=5)["forward"]) / examples
        )
        seconds, steps = zip(*(_search(model, x, y, most) for most in (1, 4)), strict=True)
        quotients.append((seconds[1] - seconds[0]) / (steps[1] - steps[0]) / forward)
    median = round(statistics.median(quotients), 1)
    units = sum(_search_result(model, x, y, 1).sites.values())
    return {"case": f"{name}-{width:g}-{examples}x{size}x{size}", "units": units, "forward passes per step": median}


@torch.no_grad()
def _forward(model: nn.Module, x: torch.Tensor) -> None:
    model(x)


def _search(model: nn.Module, x: torch.Tensor, y: torch.Tensor, most: int) -> tuple[float, int]:
    start = time.perf_counter()
    found = _search_result(model, x, y, most)
    return time.perf_counter() - start, sum(len(example.units) for example in found)


def _search_result(model: nn.Module, x: torch.Tensor, y: torch.Tensor, most: int) -> Any:
    return localize(model, x, y, population=None, max_units=most)


def checkpoint_bytes() -> int:
    """Return what a ResNet-50 of 1,000 classes and its momentum take, without the container of the file."""
    model = models.build("resnet50", num_classes=1000)
    parameters = sum(p.nbytes for p in model.parameters())
    return 2 * parameters + sum(b.nbytes for b in model.buffers())


def main() -> None:
    """Measure all cases, print them and write the result."""
    torch.manual_seed(0)
    result: dict[str, Any] = {"command": "python bench/scaling.py", "machine": machine()}
    for key, function, cases in (("accounting", accounting, ACCOUNTED), ("search", search, SEARCHED)):
        result[key] = []
        for case in cases:
            result[key].append(function(*case))
            print(result[key][-1], flush=True)
    result["resnet50 checkpoint bytes"] = checkpoint_bytes()
    path = folder() / "scaling.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"written: {path.relative_to(Path(__file__).parents[1])}")


if __name__ == "__main__":
    main()
