"""Variants are held against a copy of the model that was loaded with them: equal bit for bit."""

import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork, blocks
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import models
from memloc_ext.nn import ExampleTiedDropout, example_ids, insert_example_tied_dropout
from memloc_ext.probes import parameter_variants
from memloc_ext.probes.parameter_variants import ParameterVariants, replaced_tensors


class Model(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def other(model: nn.Module) -> dict[str, Tensor]:
    """Return other values of a model's parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (t.detach() * (0.5 + torch.rand_like(t)) + 0.1 * torch.rand_like(t) if t.is_floating_point() else t + 1)
        for name, t in tensors.items()
    }


def loaded(model: nn.Module, variant: Mapping[str, Tensor], x: Tensor) -> Tensor:
    changed = copy.deepcopy(model).eval()
    changed.load_state_dict(dict(variant), strict=False)
    with torch.no_grad():
        return changed(x)


def check(model: nn.Module, x: Tensor, *, slow: str | None = None) -> None:
    """Hold every tensor replaced alone, and some together, against the loaded model; for a second batch too."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    values, generator = other(model), torch.get_rng_state()
    names = list(values)
    sets = [[name] for name in names] + [names, names[::2], names[: len(names) // 2]]
    runner = ParameterVariants(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in (x, x.flip(0) * 0.5, x[:2]):
            for some in sets:
                first, second = ({name: factor * values[name] for name in some} for factor in (1, 2))
                found = runner.outputs(batch, [first, second, {}])
                for variant, output in zip((first, second, {}), found, strict=True):
                    assert torch.equal(output, loaded(model, variant, batch)), some
    told = [str(w.message) for w in caught if "ParameterVariants" in str(w.message)]
    assert len(told) == (slow is not None), told
    assert all(slow in message for message in told if slow), told
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def in_place(model: nn.Module, x: Tensor) -> Tensor:
    y = model.first(x)
    y += model.second(x).relu_()
    y[:, 0].mul_(2)
    return y


def shared(model: nn.Module, x: Tensor) -> Tensor:
    return model.head(model.layer(model.layer(x).relu()))


def two_branches(model: nn.Module, x: Tensor) -> Tensor:
    left, right = model.left(x), model.right(x)
    weight = F.softmax(model.left.weight, 1)  # a tensor that depends on a parameter only
    return model.head(torch.cat([left * right.sigmoid(), x @ weight.t()], 1))


def reads_a_value(model: nn.Module, x: Tensor) -> Tensor:
    y = model.layer(x)
    return y * 2 if y.sum().item() > 0 else y * 3


def reads_data(model: nn.Module, x: Tensor) -> Tensor:
    y = model.layer(x).data
    return y * 2


def reads_a_parameter(model: nn.Module, x: Tensor) -> Tensor:
    return x @ model.layer.weight.data.t() + model.layer.bias


def meets(model: nn.Module, x: Tensor) -> Tensor:
    y = model.layer(x)
    return y - y.mean(0)


def forgets(model: nn.Module, x: Tensor) -> Tensor:
    total = torch.zeros(3)
    y = x + total
    total += 1
    return model.layer(y) + total


def line(outputs: int = 3, inputs: int = 3) -> nn.Linear:
    return nn.Linear(inputs, outputs)


CASES = {
    "linear": lambda: line(),
    "batch norm": lambda: nn.Sequential(line(), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Dropout(), line(4)),
    "normalised by the batch": lambda: nn.Sequential(line(), nn.BatchNorm1d(3, track_running_stats=False)),
    "used twice": lambda: Model(shared, layer=line(), head=line(2)),
    "branches": lambda: Model(two_branches, left=line(), right=line(), head=line(2, 6)),
    "examples meet": lambda: Model(meets, layer=line()),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(line()), line()),
    "not used": lambda: Model(lambda model, x: model.layer(x), layer=line(), idle=line()),
    "recurrent": lambda: Model(lambda model, x: model.layer(x[:, None])[0][:, -1], layer=nn.LSTM(3, 4)),
    "attention": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.TransformerEncoderLayer(3, 1, 4, batch_first=True)),
}
SLOW = {
    "in place": (lambda: Model(in_place, first=line(), second=line()), "written through a view"),
    "reads a value": (lambda: Model(reads_a_value, layer=line()), "into Python"),
    "reads data": (lambda: Model(reads_data, layer=line()), "data of an activation"),
    "reads a parameter": (lambda: Model(reads_a_parameter, layer=line()), "data of an activation or parameter"),
    "changes a constant": (lambda: Model(forgets, layer=line()), "read before"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_can_be_replaced(name: str) -> None:
    torch.manual_seed(0)
    check(CASES[name](), torch.randn(5, 3))


@pytest.mark.parametrize("name", SLOW)
def test_what_cannot_be_recorded_is_run_whole(name: str) -> None:
    torch.manual_seed(0)
    make, message = SLOW[name]
    check(make(), torch.randn(5, 3), slow=message)


def test_random_draws_are_noticed() -> None:
    model = Model(lambda model, x: F.dropout(model.layer(x), training=True), layer=line())
    generator = torch.get_rng_state()
    with pytest.warns(UserWarning, match="draws random numbers"):
        ParameterVariants(model).outputs(torch.ones(2, 3), [{"layer.bias": torch.ones(3)}])
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    ("name", "size"), [("lenet", {"image_size": 8}), ("resnet9", {"image_size": 8, "width": 0.1}), ("vit", {})]
)
def test_models_of_the_paper(name: str, size: dict) -> None:
    torch.manual_seed(0)
    side = size.get("image_size", 4)
    model = models.ViT(5, 3, side, dim=16, depth=2, heads=2, mlp=8) if name == "vit" else models.build(name, **size)
    values, x = other(model), torch.randn(4, 3, side, side)
    runner = ParameterVariants(model)
    for names in models.layer_groups(model).values():
        variant = {name: values[name] for name in names}
        (found,) = runner.outputs(x, [variant])
        assert torch.equal(found, loaded(model, variant, x))


@pytest.mark.parametrize("mode", ["train", "test", "drop", None])
def test_each_example_has_its_own_mask(mode: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))
    insert_example_tied_dropout(model, ["0", "2"])
    for module in model.modules():
        if isinstance(module, ExampleTiedDropout):
            module.mode = mode
    values, runner, outputs = other(model), ParameterVariants(model), []
    for ids in (torch.tensor([5, 0]), torch.tensor([1, 2])):
        x = torch.ones(2, 3)
        with example_ids(ids):
            for name, value in values.items():
                (found,) = runner.outputs(x, [{name: value}])
                assert torch.equal(found, loaded(model, {name: value}, x))
            outputs.append(found)
    assert torch.equal(*outputs) == (mode != "train")


def test_what_does_not_depend_on_the_variant_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    run = parameter_variants._run

    def noted(steps, values) -> None:
        ran.append([step.run.name for step in steps])
        run(steps, values)

    monkeypatch.setattr(parameter_variants, "_run", noted)
    model = nn.Sequential(*(nn.Sequential(line(), nn.ReLU()) for _ in range(3)))
    ParameterVariants(model).outputs(torch.ones(2, 3), [{"2.0.weight": torch.ones(3, 3)}] * 2)
    assert ran == [["t", "addmm", "relu"] * 2, *[["t", "addmm", "relu", "alias"]] * 2]


def test_activations_do_not_stay_in_memory() -> None:
    outputs: list[weakref.ref] = []
    alive: list[int] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(weakref.ref(output))
        alive.append(sum(reference() is not None for reference in outputs))

    model = Model(lambda model, x: functools.reduce(lambda y, _: model.layer(y), range(8), x), layer=line())
    model.layer.register_forward_hook(note)
    ParameterVariants(model).outputs(torch.ones(2, 3), [{"layer.bias": torch.ones(3)}])
    assert max(alive) <= 2


def test_under_autocast_each_weight_is_cast_anew() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(line(), line()), torch.randn(4, 3)
    values = other(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)  # remembers what it cast
        found = ParameterVariants(model).outputs(x, [{"0.weight": values["0.weight"]}])[0]
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert torch.equal(found, loaded(model, {"0.weight": values["0.weight"]}, x))


def test_variants_take_the_memory_format_of_what_they_replace() -> None:
    def function(model: Any, x: Tensor) -> Tensor:
        return model.linear(
            model.conv(x).permute(0, 2, 3, 1).view(len(x), -1)
        )  # there is no such view in another format

    model = Model(function, conv=nn.Conv2d(3, 4, 3), linear=nn.Linear(144, 5)).to(memory_format=torch.channels_last)
    x, weight = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
    (found,) = ParameterVariants(model).outputs(x, [{"conv.weight": weight}])
    assert torch.equal(found, loaded(model, {"conv.weight": weight}, x))


def test_transformer_layers_round_alike_whether_recorded_or_not() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    recorded = Model(lambda model, x: model.layer(x).mean(1), layer=layer)
    whole = Model(lambda model, x: model.layer(x).mean(1) + 0 * x.sum().item(), layer=layer)
    x, variant = torch.rand(3, 5, 8), {"layer.linear1.bias": torch.rand(16)}
    with pytest.warns(UserWarning, match="running the whole model once per variant"):
        (expected,) = ParameterVariants(whole).outputs(x, [variant])
    assert torch.equal(ParameterVariants(recorded).outputs(x, [variant])[0], expected)


def test_a_compiled_model_is_run_as_it_was_written() -> None:
    model = line()
    compiled = torch.compile(model, backend="eager")
    (found,) = ParameterVariants(compiled).outputs(torch.ones(1, 3), [{"bias": torch.ones(3)}])
    assert torch.equal(found, loaded(model, {"bias": torch.ones(3)}, torch.ones(1, 3)))


def test_tensors_come_back_after_an_error() -> None:
    model = line()
    kept = {name: t.clone() for name, t in model.state_dict().items()}

    def fail() -> None:
        with replaced_tensors(model, {"weight": torch.ones(3, 3), "bias": torch.ones(3)}):
            assert bool((model.weight == 1).all())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())


def test_inputs_of_any_form_and_outputs_that_are_read() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Embedding(5, 4)

        def forward(self, a: Tensor, b: Tensor, scale: float | None = None) -> dict[str, Tensor]:
            return {"logits": self.first(a) + self.second(b) * (scale or 1)}

    model = Several()
    values, ids = other(model), torch.arange(6)
    runner = ParameterVariants(model, lambda output: output["logits"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            a, b = torch.randn(6, 3), torch.randint(5, (6,))
            for x in ((a, b), {"a": a, "b": b}, {"a": a, "b": b, "scale": 2.0}, {"b": b, "a": a, "scale": 3.0}):
                for name, value in values.items():
                    changed = copy.deepcopy(model)
                    changed.load_state_dict({name: value}, strict=False)
                    expected = (changed(**x) if isinstance(x, dict) else changed(*x))["logits"]
                    with example_ids(ids):
                        assert torch.equal(runner.outputs(x, [{name: value}])[0], expected)
    whole = ParameterVariants(model)
    with pytest.warns(UserWarning, match="the model must return one tensor"):
        found = whole.outputs((a, b), [values])
    assert torch.equal(found[0]["logits"], runner.outputs((a, b), [values])[0])


def test_wrong_names_and_shapes_are_refused() -> None:
    runner = ParameterVariants(line())
    with pytest.raises(ValueError, match="variants must name tensors of the model, got scale"):
        runner.outputs(torch.ones(1, 3), [{"scale": torch.ones(3)}])
    with pytest.raises(ValueError, match=r"bias must have shape \[3\], got \[1\]"):
        runner.outputs(torch.ones(1, 3), [{"bias": torch.ones(1)}])
    assert runner.outputs(torch.ones(1, 3), []) == []


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data(), st.lists(blocks, min_size=1, max_size=6), st.integers(1, 3))
def test_random_networks(data: st.DataObject, drawn: list[tuple[str, int, int]], batch: int) -> None:
    torch.manual_seed(0)
    model = RandomNetwork(drawn)
    values, x = other(model), torch.randn(batch, 2, 5, 4)
    names = data.draw(st.lists(st.sampled_from(list(values)), min_size=1, max_size=4, unique=True))
    variants = [{name: factor * values[name] for name in names[:number]} for number, factor in enumerate((1, 2, 1), 1)]
    runner = ParameterVariants(model)
    for variant, found in zip(variants, runner.outputs(x, variants), strict=True):
        assert torch.equal(found, loaded(model, variant, x))
    assert runner._recordable
