"""Small models and data for the probes of single layer groups."""

import json
from typing import Any

import torch
from torch import nn

from memloc_ext import models
from memloc_ext.data import Dataset, Split

CLASSES = tuple("abcd")


def made_split(num: int, side: int, noisy: int = 0, first: int = 0) -> Split:
    """Random images with a label each, the first so many of them wrong; numbered from ``first``."""
    true = torch.randint(len(CLASSES), (num,))
    labels, memorized = true.clone(), torch.zeros(num, dtype=torch.bool)
    memorized[:noisy] = True
    labels[memorized] = (labels[memorized] + 1) % len(CLASSES)
    return Split(torch.rand(num, 3, side, side), labels, true, memorized, torch.arange(first, first + num))


def made_dataset(side: int = 8, train: int = 11, noisy: int = 4, test: int = 6) -> Dataset:
    return Dataset("made", made_split(train, side, noisy), made_split(test, side), CLASSES)


def small_model(name: str) -> nn.Module:
    if name == "vit":
        return models.ViT(len(CLASSES), 3, 8, dim=16, depth=2, heads=2, mlp=8)
    width = 0.1 if name == "resnet9" else 1.0
    return models.build(name, num_classes=len(CLASSES), image_size=8, width=width)


def changed_state(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Return a state dict as of another epoch."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t * (0.5 + torch.rand(t.shape, generator=generator)) + 0.3 * torch.rand(t.shape, generator=generator)
        if t.is_floating_point()
        else t.clone()
        for name, t in model.state_dict().items()
    }


class Everything:
    """What a model must have again after it was borrowed."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._before = model, self._now(model)

    def check(self) -> None:
        names, values = zip(*self._now(self._model).items(), strict=True)
        for name, now, before in zip(names, values, self._before.values(), strict=True):
            same = torch.equal(now, before) if isinstance(now, torch.Tensor) else now == before
            assert same, name

    @staticmethod
    def _now(model: nn.Module) -> dict[str, object]:
        state: dict[str, object] = {name: t.detach().clone() for name, t in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            state[f"{name} grad"] = None if grad is None else grad.clone()
            state[f"{name} id"], state[f"{name} needs"] = id(parameter), parameter.requires_grad
        for name, module in model.named_modules():
            hooks = [*module._forward_hooks, *module._forward_pre_hooks]
            state[f"{name} module"] = module.training, hooks, getattr(module, "_mode", None)
        state["generator"] = torch.get_rng_state()
        return state


class Store(dict[str, Any]):
    """Parts in memory; the process is interrupted after so many."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = limit

    def put(self, name: str, result: Any) -> None:
        self[name] = json.loads(json.dumps(result))
        if len(self) == self.limit:
            raise KeyboardInterrupt
