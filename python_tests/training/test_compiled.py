"""A compiler that is wrong about gradients ends a training before it begins."""

import os

import pytest
import torch
from torch import nn

from memloc_ext import models
from memloc_ext.data import Split
from memloc_ext.tasks import Classification
from memloc_ext.training import TrainConfig, train
from memloc_ext.training.compiled import check_gradients
from memloc_ext.training.epoch import epoch_rng


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    return Split.clean(torch.rand(20, 1, 8, 8, generator=generator), torch.arange(20) % 10)


def build(dropout=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 10)
        )


def loses(batch_size):
    """A compiler with which the weights of convolutions get no gradient in batches of one size."""

    def backend(graph, inputs):
        def run(*args):
            images = [t for t in args if isinstance(t, torch.Tensor) and t.dim() == 4]  # and filters
            wrong = any(len(t) == batch_size and not isinstance(t, nn.Parameter) for t in images)
            lost = [wrong and isinstance(t, nn.Parameter) and t.dim() == 4 for t in args]
            return graph(*(t.detach() if lose else t for t, lose in zip(args, lost, strict=True)))

        return run

    return lambda model: _compile(model, backend=backend)


_compile = torch.compile


def test_the_batches_that_are_compared_are_those_of_the_training(split, tmp_path, monkeypatch):
    split = split.subset(torch.arange(17))
    monkeypatch.setattr(torch, "compile", loses(9))  # 17 examples: 8 and 9, since batch norm cannot do with 1
    with pytest.raises(ValueError, match="compiled, in a batch of 9, the gradient of"):
        train(build(), split, TrainConfig(epochs=1, batch_size=8, compile=True), checkpoints=tmp_path, progress=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [8, 4])  # 20 examples: 8, 8 and 4
def test_wrong_gradients_are_an_error(split, tmp_path, monkeypatch, precision, wrong):
    monkeypatch.setattr(torch, "compile", loses(wrong))
    config = TrainConfig(epochs=1, batch_size=8, precision=precision, compile=True)
    message = (
        rf"train: compile must be False .* in a batch of {wrong}, the gradient of 0.weight is off by .* times its norm;"
    )
    with pytest.raises(ValueError, match=message):
        train(build(), split, config, checkpoints=tmp_path, progress=False)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(torch, "compile", loses(7))
    assert len(train(build(), split, config, checkpoints=tmp_path, progress=False)) == 2


def test_a_model_that_the_caller_compiled_is_checked(split, tmp_path):
    with pytest.raises(ValueError, match=r"the gradient of 0\.weight"):
        train(loses(8)(build()), split, TrainConfig(batch_size=8), checkpoints=tmp_path, progress=False)


def test_the_check_leaves_everything_as_it_was(split):
    model = build().eval()
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    check_gradients(model, loses(7)(model), split, TrainConfig(batch_size=8), Classification())
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="the gradient of"):
        check_gradients(model, loses(8)(model), split, TrainConfig(batch_size=8), Classification())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_draws_is_not_checked(split):
    model = build(dropout=0.5)
    check_gradients(model, loses(8)(model), split, TrainConfig(batch_size=8), Classification())


def test_a_gradient_that_is_zero_but_for_rounding_is_not_compared(split):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))

    def other(x):  # the bias before a batch norm counts for nothing
        return nn.functional.linear(model[:3](x), model[3].weight, model[3].bias) + 0 * model[0].bias.sum()

    check_gradients(model, other, split, TrainConfig(batch_size=8), Classification())


@pytest.mark.slow
def test_what_is_trained_is_right_or_refused(tmp_path):
    """With some versions of torch the convolutions of a LeNet get no gradient here."""
    with epoch_rng(0, 0, torch.device("cpu")):
        model, x = models.lenet(10, 1, 8), torch.rand(16, 1, 8, 8)
    split, config = Split.clean(x, torch.arange(16) % 10), TrainConfig(epochs=2, batch_size=16, compile=True)
    before = model.conv1[0].weight.clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(model, split, config, checkpoints=tmp_path, progress=False)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    finally:
        torch.set_num_threads(threads)
    assert "the gradient of conv" in message or (model.conv1[0].weight - before).norm() > 1e-4
