import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memloc_ext
from memloc_ext import data
from memloc_ext.reference.example_tied_dropout import keep_mask
from memloc_ext.training import TrainConfig, train

README = (Path(__file__).parents[1] / "README.md").read_text()
TRAINING, OPERATOR, ACCOUNTING, LOCALIZATION, LAYERS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_operator_and_its_plain_equivalent_agree() -> None:
    ours, plain = OPERATOR.split("\n\n")
    names = {
        "memloc_ext": memloc_ext,
        "x": torch.randn(4, 20, 3, 3),
        "example_ids": torch.tensor([3, 1, 4, 1]),
        "num_generalization": 5,
        "p_mem": 0.3,
        "seed": 0,
        "table": keep_mask(torch.arange(10), 20, 0, 0.3, 0),
    }
    exec(ours, names)
    result = names.pop("y")
    exec(plain, names)
    assert torch.equal(result, names["y"])


def test_the_training_example_runs() -> None:
    model = nn.Sequential()
    for name, layer in (("layer1", nn.Linear(6, 32)), ("layer2", nn.ReLU()), ("head", nn.Linear(32, 3))):
        model.add_module(name, layer)
    x = torch.randn(8, 6)
    names = {
        "F": F,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [(x, torch.arange(8) % 3, torch.arange(8))] * 2,
        "x": x,
    }
    exec(TRAINING, names)
    assert names["logits"].shape == (8, 3)


def test_the_accounting_example_runs() -> None:
    torch.manual_seed(0)
    model = memloc_ext.models.build("resnet9", num_classes=3, in_channels=1, image_size=8, width=0.1).eval()
    x, y, noisy = torch.randn(6, 1, 8, 8), torch.arange(6) % 3, torch.arange(6) % 4 == 0
    names = {"F": F, "memloc_ext": memloc_ext, "model": model, "x": x, "y": y, "noisy": noisy}
    exec(ACCOUNTING, names)
    account, weight = names["account"], model.get_parameter("conv1.0.weight")
    assert account.sqnorm["conv1.0.weight"].shape == (6,)
    torch.testing.assert_close(account.group_grad["conv1.0.weight"].sum(0), weight.grad)


def test_the_example_of_the_layer_probes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = data.with_label_noise(data.digits(), 0.1)
    few = {"train": dataset.train.subset(torch.arange(40)), "test": dataset.test.subset(torch.arange(20))}
    dataset = dataclasses.replace(dataset, **few)
    model = memloc_ext.models.build("resnet9", num_classes=10, in_channels=1, image_size=8, width=0.1)
    train(model, dataset.train, TrainConfig(epochs=1), checkpoints=tmp_path / "checkpoints", progress=False)
    monkeypatch.chdir(tmp_path)
    names = {"memloc_ext": memloc_ext, "model": model, "dataset": dataset}
    exec(LAYERS, names)
    assert list(names["rewound"].groups) == list(names["retrained"].groups) == list(model.layout.groups)


def test_every_picture_is_there() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((Path(__file__).parents[1] / picture).is_file() for picture in pictures)


def test_the_localization_example_runs() -> None:
    torch.manual_seed(0)
    model = memloc_ext.models.build("resnet9", num_classes=3, in_channels=1, image_size=8, width=0.1).eval()
    x, x_ref, x_test = torch.randn(3, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.randn(5, 1, 8, 8)
    y, y_ref = model(x).argmax(1), model(x_ref).argmax(1)
    names = {"memloc_ext": memloc_ext, "model": model, "x_test": x_test}
    exec(LOCALIZATION, names | {"x": x, "y": y, "x_ref": x_ref, "y_ref": y_ref}, names)
    assert names["logits"].shape == (5, 3)
    assert len(names["found"]) == 3
    assert not torch.equal(names["logits"], model(x_test))
