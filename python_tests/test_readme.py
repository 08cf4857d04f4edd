import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import memloc_ext
from memloc_ext.reference.example_tied_dropout import keep_mask

README = (Path(__file__).parents[1] / "README.md").read_text()
OPERATOR, TRAINING = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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
