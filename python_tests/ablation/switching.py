"""A small network and some units of it to switch off."""

import torch
from ablating import replaced
from torch import Tensor, nn

B = 3


def small() -> nn.Sequential:
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def images() -> Tensor:
    return torch.randn(B, 2, 6, 6)


UNITS = [("2", 1), ("7", 4), ("2", 3), ("2", 1)]


def expected(model: nn.Module, x: Tensor, values: dict[str, Tensor] | None = None) -> Tensor:
    values = values or {}
    two, seven = values.get("2", torch.zeros(4)), values.get("7", torch.zeros(6))
    with replaced(model, "2", 1, 1, two[1]), replaced(model, "2", 3, 1, two[3]), replaced(model, "7", 4, 1, seven[4]):
        return model(x)


def hooks(model: nn.Module) -> int:
    return sum(len(h) for m in model.modules() for name, h in vars(m).items() if name.endswith("_hooks"))


def without_head(project: nn.Linear, head: int, width: int) -> None:
    with torch.no_grad():
        project.weight[:, head * width : (head + 1) * width] = 0
