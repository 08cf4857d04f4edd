"""The sites of models that name none, and models that return more than their logits."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ablating import Model, check, labels, settled
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import ablation_losses
from memloc_ext._torchvision import import_torchvision
from memloc_ext.probes.localization import localize

B = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp(**parts: nn.Module) -> dict[str, nn.Module]:
    return {"up": nn.Linear(5, 7), "gate": nn.Linear(5, 7), "down": nn.Linear(7, 4), "head": nn.Linear(4, 3), **parts}


def gelu(x: Tensor) -> Tensor:
    """Compute GELU as GPT-2 has it, of several operators."""
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x.pow(3))))


def hidden(name: str) -> Callable[[Model, Tensor], Tensor]:
    forms: dict[str, Callable[[Model, Tensor], Tensor]] = {
        "relu": lambda m, x: F.relu(m.up(x)),
        "dropout": lambda m, x: m.dropout(F.relu(m.up(x))),
        "activation and dropout": lambda m, x: m.dropout(m.act(m.up(x))),
        "gpt": lambda m, x: gelu(m.up(x)),
        "gated": lambda m, x: F.silu(m.gate(x)) * m.up(x),
        "gated by a module": lambda m, x: m.act(m.gate(x)) * m.up(x),
        "gated by itself": lambda m, x: m.up(x) * m.up(x).sigmoid(),
        "sum": lambda m, x: F.relu(m.gate(x) + m.up(x)),
    }
    return forms[name]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("relu", "up"),
        ("dropout", "up"),
        ("activation and dropout", "act"),
        ("gpt", "up"),
        ("gated", "gate"),
        ("gated by a module", "act"),
        ("gated by itself", "up"),
        ("sum", "up"),
    ],
)
@pytest.mark.parametrize("positions", [False, True])
def test_hidden_units(form: str, expected: str, positions: bool) -> None:
    """Whatever names them, the loss is that without the units in what the next layer is given."""
    model = Model(
        lambda m, x: m.head(torch.tanh(m.down(hidden(form)(m, x))).flatten(1)),
        **mlp(act=nn.SiLU(), dropout=nn.Dropout(), head=nn.Linear(16 if positions else 4, 3)),
    )
    x, y = torch.randn(B, *([4] if positions else []), 5), labels(B)
    found = check(model, x)
    assert list(found) == [*(["gate"] if form == "sum" else []), expected, "down"]
    if form != "sum":
        column = model.down.weight.detach()[:, 3].clone()
        with torch.no_grad():
            model.down.weight[:, 3] = 0
            loss = F.cross_entropy(model.eval()(x), y, reduction="none")
            model.down.weight[:, 3] = column
        torch.testing.assert_close(found[expected].loss[3], loss)


class Residual(nn.Module):
    """Has linear layers before normalisations, before a sum, called twice, and two that give the logits together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.up, self.down = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.wide, self.batch_norm, self.twice = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.head, self.shortcut = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).tanh()
        x = x + self.down(self.up(x).relu())
        x = self.twice(self.twice(self.batch_norm(self.wide(x)).sigmoid()).sin()) + x
        return 2 * (self.head(x) + self.shortcut(x))


def test_every_hidden_linear_layer() -> None:
    found = check(settled(Residual()), torch.randn(B, 5))
    assert list(found) == ["first", "up", "down", "batch_norm", "twice"]


def test_networks_of_transformers() -> None:
    import_torchvision("models")
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 20, "num_labels": 3, "pad_token_id": 0}
    gpt = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, n_inner=12, n_positions=9, bos_token_id=1, eos_token_id=2, **size
    )
    llama = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **size
    )
    x, y = torch.randint(3, 20, (B, 5)), labels(B)
    for model, layers, act, down in (
        (transformers.GPT2ForSequenceClassification(gpt).eval(), "transformer.h", "act", "c_proj"),
        (transformers.LlamaForSequenceClassification(llama).eval(), "model.layers", "act_fn", "down_proj"),
    ):
        found = _quietly(ablation_losses, model, x, y)
        names = {name: len(site.loss) for name, site in found.items() if not name.endswith(".heads")}
        parts = {"attn.c_attn": 24, "attn.c_proj": 8, "mlp": 8, f"mlp.{act}": 12}
        if act == "act_fn":
            parts = {**{f"self_attn.{part}_proj": 8 for part in "qkvo"}, "mlp": 8, f"mlp.{act}": 12}
        assert names == {f"{layers}.{i}.{part}": units for i in range(2) for part, units in parts.items()}
        assert sum(name.endswith(".heads") for name in found) == 2
        projection = model.get_submodule(f"{layers}.1.mlp.{down}")
        handle = projection.register_forward_pre_hook(
            lambda module, args: (args[0].index_fill(-1, torch.tensor(5), 0),)
        )
        with torch.no_grad():
            expected = F.cross_entropy(model(x).logits, y, reduction="none")
        handle.remove()
        torch.testing.assert_close(found[f"{layers}.1.mlp.{act}"].loss[5], expected)


def _quietly(function: Callable[..., Any], *args: Any) -> Any:
    """Allow the warning of a model that cannot be recorded: whether one can depends on the version of the library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda logits, hidden: (logits, hidden),
    "list": lambda logits, hidden: [logits],
    "mapping": lambda logits, hidden: {"hidden": hidden, "logits": logits},
    "object": lambda logits, hidden: Output(None, logits),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("recorded", [True, False])
def test_outputs_of_more_than_logits(kind: str, recorded: bool) -> None:
    def forward(m: Model, x: Tensor) -> Any:
        x = x if recorded or x.sum() < 1e9 else 2 * x
        x = m.act(m.up(x))
        return OUTPUTS[kind](m.head(x), x) if m.whole else m.head(x)

    model = Model(forward, up=nn.Linear(5, 7), act=nn.ReLU(), head=nn.Linear(7, 3))
    x, y = torch.randn(B, 5), labels(B)
    results = []
    for model.whole in (False, True):
        results.append((_quietly(ablation_losses, model, x, y)["act"].loss, _localized(model, x, y)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def _localized(model: nn.Module, x: Tensor, y: Tensor) -> list[tuple[Any, ...]]:
    found = _quietly(lambda: localize(model, x, y, population=None))
    return [(one.units, one.status, one.losses) for one in found]


@pytest.mark.parametrize("output", [lambda x: {"scores": x}, lambda x: None, lambda x: (), lambda x: ({"logits": x},)])
@pytest.mark.parametrize("sites", [None, ["up"]])
def test_outputs_without_logits(output: Callable[[Tensor], Any], sites: list[str] | None) -> None:
    model = Model(lambda m, x: output(m.head(F.relu(m.up(x)))), up=nn.Linear(5, 7), head=nn.Linear(7, 3))
    x, y = torch.randn(B, 5), labels(B)
    for run in (ablation_losses, lambda *args: localize(*args[:3], sites=args[3], population=None)):
        with pytest.raises(ValueError, match=r"the model must return logits \[batch, classes\]: a tensor"):
            run(model, x, y, sites)
