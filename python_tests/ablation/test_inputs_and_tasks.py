"""Models of several inputs, tasks other than classification, and recordings that are kept, against plain passes."""

import contextlib
import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import ablation_losses, apply_ablation, localize
from memloc_ext.ablation import recording_cache
from memloc_ext.tasks import Tokens


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Speaker(nn.Module):
    """Gives logits for every token, of tokens and a mask, or for every example of the mean of them."""

    def __init__(self, per_token: bool, form: str = "tensor") -> None:
        super().__init__()
        self.embed, self.mix, self.up = nn.Embedding(11, 6), nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 9)
        self.head, self.per_token, self.form = nn.Linear(9, 7 if per_token else 3), per_token, form

    def forward(self, tokens: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Any:
        x = self.embed(tokens)
        x = x if mask is None else x * mask[..., None]
        x = scale * torch.relu(self.up(x + self.mix(x.transpose(1, 2)).transpose(1, 2)))
        logits = self.head(x if self.per_token else x.mean(1))
        return logits if self.form == "tensor" else {"hidden": x, "logits": logits, "none": None}


class Reconstruction:
    """A task of a user's own, which reads more than logits."""

    def loss(self, output: Any, y: Tensor) -> Tensor:
        return (output["logits"] - y).square().mean(1) + output["hidden"].square().mean((1, 2))

    def right(self, output: Any, y: Tensor) -> Tensor:
        return (output["logits"] - y).abs().amax(1) < 0.55


def call(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)


def plain(model: nn.Module, x: Any, y: Tensor, task: Any, units: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
    """Return loss and rightness with units of linear layers or convolutions switched off by hooks, in float64."""
    model = copy.deepcopy(model).double().eval()
    handles = []
    for site, unit in units:

        def hook(module: nn.Module, args: Any, output: Tensor, unit: int = unit) -> Tensor:
            output = output.clone()
            output.select(1 if isinstance(module, nn.Conv1d) else -1, unit)[...] = 0
            return output

        handles.append(model.get_submodule(site).register_forward_hook(hook))
    with torch.no_grad():
        output = call(model, double(x))
        return task.loss(output, double(y)), task.right(output, double(y))


def double(x: Any) -> Any:
    if isinstance(x, dict | tuple):
        return {k: double(t) for k, t in x.items()} if isinstance(x, dict) else tuple(map(double, x))
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


class Classes:
    def loss(self, output: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y, reduction="none")

    def right(self, output: Any, y: Tensor) -> Tensor:
        return output.argmax(1) == y


class NextTokens:
    """One example after another, one token after another."""

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def _tokens(self, output: Any, y: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
        for logits, labels in zip(output, y, strict=True):
            pairs = zip(logits[: len(labels) - self.shift], labels[self.shift :], strict=True)
            yield [(row, label) for row, label in pairs if label != -100]

    def loss(self, output: Any, y: Tensor) -> Tensor:
        return torch.stack([sum(F.cross_entropy(r, c) for r, c in ts) / len(ts) for ts in self._tokens(output, y)])

    def right(self, output: Any, y: Tensor) -> Tensor:
        return torch.tensor([all(r.argmax() == c for r, c in ts) for ts in self._tokens(output, y)])


TOKENS, MASK = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(1)), torch.ones(4, 5)
MASK[1, 3:] = MASK[2, 4:] = 0.25
LABELS = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(2))
LABELS[0, :2] = LABELS[3, 4] = -100
INPUTS: dict[str, Any] = {
    "tensor": TOKENS,
    "tuple": (TOKENS, MASK),
    "mapping": {"mask": MASK, "tokens": TOKENS, "scale": 1.5},
}
TASKS: dict[str, tuple[bool, str, Any, Any, Tensor]] = {
    "classification": (False, "tensor", "classification", Classes(), torch.tensor([0, 1, 2, 1])),
    "tokens": (True, "mapping", "tokens", None, LABELS),
    "unshifted": (True, "tensor", Tokens(shift=False), NextTokens(0), LABELS),
    "own": (False, "mapping", Reconstruction(), Reconstruction(), torch.randn(4, 3)),
}


def made(name: str) -> tuple[nn.Module, Any, Any, Tensor]:
    per_token, form, task, exact, y = TASKS[name]
    if name == "tokens":  # the plain loop reads the logits among the rest

        class Named(NextTokens):
            def _tokens(self, output: Any, y: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
                return super()._tokens(output["logits"], y)

        exact = Named(1)
    return Speaker(per_token, form).eval(), task, exact, y


@contextlib.contextmanager
def warned(expected: bool) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert bool(caught) == expected, [str(w.message) for w in caught]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("name", TASKS)
def test_scan(name: str, form: str, recorded: bool) -> None:
    model, task, exact, y = made(name)
    if not recorded:
        model.embed.register_forward_hook(lambda module, args, output: output if output.sum().item() < 1e9 else None)
    x = INPUTS[form]
    with warned(not recorded):
        found = ablation_losses(model, x, y, ["mix", "up"], task=task)
    base, right = plain(model, x, y, exact, [])
    torch.testing.assert_close(found.base_loss.double(), base, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.base_right, right)
    assert (found.base_predicted is None) == (name != "classification")
    changed = 0
    for site, units in (("mix", 6), ("up", 9)):
        assert found[site].loss.shape == found[site].right.shape == (units, 4)
        for unit in range(units):
            loss, right = plain(model, x, y, exact, [(site, unit)])
            torch.testing.assert_close(found[site].loss[unit].double(), loss, rtol=1e-4, atol=1e-5)
            assert torch.equal(found[site].right[unit], right)
            changed += int((loss != base).sum())
    assert changed > 20


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("name", TASKS)
def test_search(name: str, form: str, recorded: bool) -> None:
    """Labels are what the model says, so that there is something to lose; the losses are those of a plain pass."""
    model, task, exact, y = made(name)
    x, reference = INPUTS[form], (INPUTS[form], y)
    with torch.no_grad():
        output = call(model, x)
    logits = output if isinstance(output, Tensor) else output["logits"]
    if name == "own":
        y = logits + 0.5
    elif name == "classification":
        y = logits.argmax(1)
    else:
        y = torch.where(y == -100, y, logits.argmax(2) if name == "unshifted" else logits.argmax(2).roll(1, 1))
    if not recorded:
        model.embed.register_forward_hook(lambda module, args, output: output if output.sum().item() < 1e9 else None)
    noise = 0.01 if form != "tensor" else 0
    with warned(not recorded):
        found = localize(
            model, x, y, task=task, reference=reference, sites=["mix", "up"], noise=noise, eot=2,
            population=["first_order", "exact"][form == "tuple"], refresh=int(form == "mapping"),
        )  # fmt: skip
    population = plain(model, x, reference[1], exact, [])[0].mean()
    assert found[0].population_losses[0] == pytest.approx(float(population), 1e-4)
    assert any(one.status == "flipped" for one in found)
    for i, one in enumerate(found):
        assert one.status != "already_wrong"
        assert bool(one.predicted) == (name == "classification")
        for k in range(len(one.units) + 1):
            loss, right = plain(model, x, y, exact, one.units[:k])
            torch.testing.assert_close(one.losses[k], float(loss[i]), rtol=1e-4, atol=1e-5)
            assert bool(right[i]) == (k < len(one.units) or one.status != "flipped")
        with apply_ablation(model, one.units, channel_dims=found.channel_dims), torch.no_grad():
            loss, _ = plain(model, x, y, exact, one.units)
            logits = call(model, x)
            torch.testing.assert_close(exact.loss(logits, y)[i].double(), loss[i], rtol=1e-4, atol=1e-5)


def test_arguments() -> None:
    model = Speaker(False).eval()
    y = torch.tensor([0, 1, 2, 1])
    for x, message in (
        ((TOKENS, MASK[:3]), r"same number of examples.*\[4, 5\] and \[3, 5\] and \[4\]"),
        ({"scale": 2.0}, "x must be a tensor, or a tuple or mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            ablation_losses(model, x, y)
    with pytest.raises(ValueError, match="task must be one of"):
        ablation_losses(model, TOKENS, y, task="words")
    with pytest.raises(ValueError, match="of the form of x"):
        localize(model, TOKENS, y, reference=((TOKENS, MASK), y), noise=0)
    with pytest.raises(ValueError, match="noise must be finite, and 0 unless x is floating"):
        localize(model, TOKENS, y, population=None)
    with pytest.raises(ValueError, match="task: right must return bool"):
        ablation_losses(model, TOKENS, y, task=type("Wrong", (Classes,), {"right": lambda self, o, y: o[:, 0]})())


# recordings that are kept


class Changing(nn.Module):
    """Has weights, a buffer, a constant that is computed of weights, a plain flag, and parts that can be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.act, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)
        self.position, self.flag, self.settings = nn.Embedding(3, 4), 1.0, {"factor": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(torch.arange(3, device=x.device)).sum(0)
        return self.head(self.act(self.norm(self.up(x)))) * self.flag * self.settings["factor"]


def swapped(model: nn.Module) -> None:
    model.act = nn.Tanh()


def hooked(model: nn.Module) -> None:
    model.up.register_forward_hook(lambda module, args, output: output * 2)


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
            tensor.mul_(1.5).add_(0.1)


def in_place_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)  # of which the parameter's version says nothing


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})


CHANGES: dict[str, tuple[Callable[[Any], object], bool]] = {
    "nothing": (lambda model: None, True),
    "modes": (lambda model: model.train(), True),
    "weights in place": (in_place, True),
    "data in place": (in_place_data, True),
    "loaded": (loaded, True),
    "other parameter": (lambda model: setattr(model, "head", nn.Linear(6, 3)), False),
    "other data": (lambda model: setattr(model.up.weight, "data", torch.randn(6, 4)), False),
    "other shape": (lambda model: setattr(model, "head", nn.Linear(6, 5)), False),
    "swapped": (swapped, False),
    "hooked": (hooked, False),
    "flag": (lambda model: setattr(model, "flag", 2.0), False),
    "settings": (lambda model: model.settings.update(factor=3.0), False),
    "method": (lambda model: setattr(model.act, "forward", torch.sigmoid), False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_kept_recording_is_right_whatever_has_changed(
    change: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plainly = [], recording_cache.record
    monkeypatch.setattr(recording_cache, "record", lambda *args: (made.append(1), plainly(*args))[1])
    model, (act, is_kept) = Changing().eval(), CHANGES[change]
    model.norm.running_var.uniform_(0.5, 2)
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    search: dict[str, Any] = {"population": None, "noise": 0, "eot": 1, "max_units": 2}
    for run in (lambda m, n: ablation_losses(m, x[:n], y[:n]), lambda m, n: localize(m, x[:n], y[:n], **search)):
        run(model, 3)
    assert len(made) == 1
    act(model)
    for n in (batch, 3):
        found, expected = ablation_losses(model, x[:n], y[:n]), ablation_losses(copy.deepcopy(model), x[:n], y[:n])
        assert set(found) == set(expected)
        for site in found:
            torch.testing.assert_close(found[site].loss, expected[site].loss, rtol=0, atol=0)
        torch.testing.assert_close(found.base_loss, F.cross_entropy(model.eval()(x[:n]), y[:n], reduction="none"))
        one, other = localize(model, x[:n], y[:n], **search), localize(copy.deepcopy(model), x[:n], y[:n], **search)
        assert list(one) == list(other)
    assert len(made) == 1 + 4 + (not is_kept)


def test_what_cannot_be_used_again_is_recorded_anew() -> None:
    """A number that was read of a parameter is that of the first call."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    model[1].register_forward_hook(lambda module, args, output: output * float(model[0].bias.detach().sum()))
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    for _ in range(2):
        found = ablation_losses(model, x, y)
        torch.testing.assert_close(found.base_loss, F.cross_entropy(model(x), y, reduction="none"))
        model[0].bias.data.add_(1.0)


def test_inference_mode() -> None:
    """Operators are others there, and tensors made there are of no use outside."""
    model, x, y = Changing().eval(), torch.randn(3, 4), torch.tensor([0, 1, 2])
    settings: dict[str, Any] = {"population": None, "noise": 0, "eot": 1, "max_units": 2}
    expected = ablation_losses(copy.deepcopy(model), x, y)
    with torch.inference_mode():
        found = ablation_losses(model, x, y)
    assert list(found) == list(expected)
    assert all(torch.equal(found[site].loss, expected[site].loss) for site in found)
    assert list(localize(model, x, y, **settings)) == list(localize(copy.deepcopy(model), x, y, **settings))


def test_nothing_keeps_a_model_alive() -> None:
    model = Changing().eval()
    ablation_losses(model, torch.randn(2, 4), torch.tensor([0, 1]))
    assert model in recording_cache._cache
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
