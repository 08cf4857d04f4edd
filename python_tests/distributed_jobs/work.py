"""What is done once by one process, and once by several that torchrun started.

Each process saves what it has seen as ``<folder>/rank<number>.pt``; the test compares.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import distributed, models
from memloc_ext.data import Dataset, digits, with_label_noise
from memloc_ext.models.vit import ViT
from memloc_ext.nn import example_ids, insert_example_tied_dropout
from memloc_ext.nn.example_ids import current_example_ids
from memloc_ext.parts import PartFiles
from memloc_ext.probes import accuracy, localize_dataset
from memloc_ext.probes.localization import chunks
from memloc_ext.study import accounting
from memloc_ext.study.accounting import AccountedBackward, accounting_cost
from memloc_ext.training import TrainConfig, train
from memloc_ext.training.epoch import epoch_rng

CONFIG = TrainConfig(epochs=2, batch_size=16, learning_rate=0.05)
LOCALIZATION = {"localized": 8, "max_units": 5, "edited": 3}
BAD = 1203
"""Number of an example on which `Spoilt` fails."""


def make_data() -> Dataset:
    """51 digits: three batches of 16, which two processes halve, and one of 3, of which one gets 2."""
    whole = with_label_noise(digits(), 0.3)
    train_split = whole.train.subset(torch.arange(1250, 1199, -1))
    return replace(whole, train=train_split, test=whole.test.subset(torch.arange(30)))


def make(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def lenet() -> nn.Module:
    return models.lenet(10, 1, 8)


def tied() -> nn.Module:
    return insert_example_tied_dropout(lenet(), ["fc1", "fc2"], p_gen=0.3, p_mem=0.4, seed=3)


def vit() -> nn.Module:
    return ViT(10, 1, 8, patch=4, dim=16, depth=2, heads=2, mlp=16, dropout=0.0)


class Spoilt(nn.Module):
    """A LeNet whose logits for example `BAD`, or only their gradients, are infinite."""

    def __init__(self, overflow: bool) -> None:
        super().__init__()
        self.lenet, self.overflow = lenet(), overflow

    def forward(self, x: Tensor) -> Tensor:
        logits, ids = self.lenet(x), current_example_ids()
        assert ids is not None
        bad = (ids == BAD)[:, None]
        if not self.overflow:
            return logits.masked_fill(bad, float("inf"))
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient.masked_fill(bad, float("inf")))
        return logits


def fit(dataset: Dataset) -> nn.Module:
    model = make(lenet)
    x, y, ids = dataset.train.batch(torch.arange(len(dataset.train)))
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(80):
        optimizer.zero_grad()
        with example_ids(ids):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


def attempt(function: Callable[[], object]) -> str:
    try:
        function()
    except (ValueError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def work(folder: Path) -> None:
    chunks.CHUNK, accounting._SECONDS = 3, 0
    dataset, out = make_data(), {}
    split = dataset.train

    def trained(name: str, model: nn.Module, config: TrainConfig = CONFIG, **how: Any) -> None:
        original = getattr(model, "_orig_mod", model)
        if how.pop("account", False):
            how["backward"] = AccountedBackward(model, split, folder / name / "accounting")
        history = train(model, split, config, checkpoints=folder / name, progress=False, **how)
        out[name] = {"history": history, "state": original.state_dict()}

    short = replace(CONFIG, epochs=1)
    other = distributed.rank() + 5  # the first process gives its weights to all
    evaluate = lambda model: {"clean": accuracy(model, dataset.train, test=dataset.test, batch_size=7).clean}  # noqa: E731
    trained("plain", make(lenet, seed=other), evaluate=evaluate)
    trained("compiled", torch.compile(make(lenet), backend="eager"), short)
    trained("tied", make(tied), short)
    trained("batch_norm", make(partial(models.resnet9, 10, 1, 8, width=0.05)), short)
    trained("accounted", make(lenet), account=True)
    trained("accounted_vit", make(vit), short, account=True)
    trained("overflow", make(lambda: Spoilt(True)), replace(short, precision="float16"), account=True)
    if (folder / "from_one").is_dir():
        trained("from_one", make(lenet, seed=other), evaluate=evaluate)
    out["infinite"] = attempt(lambda: trained("infinite", make(lambda: Spoilt(False))))
    few = replace(CONFIG, batch_size=10)  # leaves 1
    out["few"] = attempt(lambda: trained("few", make(lenet), few))
    with epoch_rng(0, 1, split.device) as generator:
        out["order"], out["draws"] = torch.randperm(9, generator=generator), torch.rand(4)
    out["cost"] = accounting_cost(make(lenet), split, CONFIG)

    parts = PartFiles(folder / "parts")
    found = localize_dataset(fit(dataset), dataset.train, test=dataset.test, **LOCALIZATION, parts=parts)
    out["localization"] = asdict(replace(found, seconds=0.0))
    distributed.once(lambda: shutil.copytree(folder / "parts", folder / "copied"))
    again = localize_dataset(
        fit(dataset), dataset.train, test=dataset.test, **LOCALIZATION, parts=PartFiles(folder / "copied")
    )
    out["again"] = again == found  # the time too: nothing was searched
    torch.save(out, folder / f"rank{distributed.rank()}.pt")


def main(folder: Path) -> None:
    with distributed.process_group(torch.device("cpu")):
        work(folder)
