"""A study of a user's own model and data set, named on the command line."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memloc_ext.study import DataConfig, ModelConfig, StudyConfig, load_data, load_run
from memloc_ext.study.command_line import main
from memloc_ext.study.stages import Study
from memloc_ext.training import list_checkpoints, load_checkpoint

SOURCE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def make(seed):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

def convolution(seed):
    model = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    model.layout = "NCL"
    return model

class Odd(nn.Module):
    # takes no single example, counts its calls and draws
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16, track_running_stats=False)
        self.last = nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        torch.rand(1)
        return self.last(self.norm(self.first(x).unsqueeze(1).squeeze()))

odd = Odd()

def kept(seed):
    return odd

def broken(seed):
    class Broken(nn.Linear):
        def forward(self, x):
            assert x.dim() == 4, "no image"
    return Broken(6, 3)

def data(seed, x=None):
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(seed))
    y = x[:, :3].argmax(1)
    return TensorDataset(x[:60], y[:60]), TensorDataset(x[60:], y[60:])

def marked(seed):
    train, test = data(seed)
    train.memorized = torch.arange(60) < 7
    return train, test

def nothing(seed):
    return None
"""
SETTINGS = ["--epochs", "3", "--batch-size", "16", "--learning-rate", "0.1", "--device", "cpu"]
PROBES = ["--localized", "2", "--max-units", "3", "--edited", "1", "--retrain-epochs", "1"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a package in the current folder, another one in each test."""
    name = f"package_{abs(hash(request.node.name))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return f"{name}.mine"


def arguments(package: str, data: str = "data", model: str = "make") -> list[str]:
    return ["--model", f"{package}:{model}", "--dataset", f"{package}:{data}", *SETTINGS, "--output", "out"]


def test_every_probe_of_it_ends_in_a_report(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", *arguments(package), *PROBES])
    told = capsys.readouterr().err
    assert "left out: dropout, controls, localize-dropout, audit-dropout; name modules for dropout by" in told
    run = load_run("out")
    assert set(run.seconds) == {"train", "account", "rewind", "retrain", "localize", "audit"}
    assert run.mislabelled
    assert Path("out/report.html").exists()
    mine = import_module(package)
    (stage,) = Path("out").glob("train-*")
    model = mine.make(0).double()
    model.load_state_dict(load_checkpoint(list_checkpoints(stage / "checkpoints")[3]).model)
    test: tuple[Tensor, Tensor] = mine.data(0)[1].tensors
    assert run.metrics[0]["test"] == (model(test[0].double()).argmax(1) == test[1]).double().mean()
    assert run.accounting is not None
    assert int(run.accounting.epoch(1).memorized.sum()) == 6  # label noise, 10 %


def test_dropout_goes_where_it_is_told(package: str) -> None:
    main(["dropout", *arguments(package), "--sites", "1", "3"])
    assert list(load_run("out").histories) == ["example_tied"]


def test_each_process_tries_a_model_on_two_examples_and_leaves_it_as_it_was(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = import_module(package).odd
    config = StudyConfig(DataConfig(f"{package}:data"), ModelConfig(f"{package}:kept"), device="cpu")
    study, before = Study(config, {}, load_data(config)), torch.get_rng_state()
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    study.check(["train"])
    assert odd.calls == 0
    assert odd.training
    assert odd.norm.training
    assert torch.equal(torch.get_rng_state(), before)


def test_channels_of_a_1d_model_are_where_the_module_or_the_option_says(package: str) -> None:
    probes = [*PROBES, "--only", "dropout", "controls", "localize-dropout"]
    with pytest.raises(SystemExit, match=r"got \[2, 8, 4\] without; .* \(--channel-dim of a command"):
        main(["run", *arguments(package, model="convolution"), *probes, "--sites", "2"])
    assert not Path("out").exists()
    for where in (["--sites", "1"], ["--sites", "2", "--channel-dim", "1"]):
        main(["run", *arguments(package, model="convolution"), *probes, *where])
        run = load_run("out")
        assert set(run.histories) == {"example_tied", "standard", "fixed"}
        assert run.localizations["example_tied"].sites[0].units == 8


def test_a_data_set_or_a_file_says_which_examples_are_memorized(package: str) -> None:
    main(["account", *arguments(package, "marked")])
    assert not load_run("out").mislabelled
    accounting = load_run("out").accounting
    assert accounting is not None
    assert accounting.epoch(1).memorized.nonzero()[:, 0].tolist() == list(range(7))
    np.save("mask.npy", np.arange(60) % 2 == 0)
    main(["account", *arguments(package), "--memorized", "mask.npy"])
    accounting = load_run("out").accounting
    assert accounting is not None
    assert accounting.epoch(1).memorized.nonzero()[:, 0].tolist() == list(range(0, 60, 2))


def test_another_source_or_other_data_are_another_training(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        main(["train", *arguments(package)])
    main(["train", *arguments(package, "marked")])
    said = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["begins", "finished before, reused", "begins"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dataset", "no_such_module:data"], "No module named 'no_such_module'"),
        (["--dataset", "{}:none"], "--dataset must name a function, package.module:factory"),
        (["--dataset", "{}:nothing"], "must return the training and the test set, got NoneType"),
        (["--model", "{}:nothing"], "must return a torch.nn.Module, got NoneType"),
        (["--model", "resnet9"], "takes square images; name a function of your own"),
        (["--model", "torchvision:resnet18", "--dataset", "digits"], "takes images of 3 channels, got 1"),
        (["--task", "tokens"], "task 'tokens' needs logits [batch, tokens, classes]"),
        (["--model", "{0}:broken"], "--model {0}:broken cannot take a batch of --dataset {0}:data: AssertionError: no"),
    ],
)
def test_what_is_wrong_with_it_is_told_before_anything_is_written(
    package: str, change: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments(package), *(word.format(package) for word in change)])
    assert message.format(package) in str(stop.value)
    assert not Path("out").exists()
