"""A training that was interrupted, at any moment and in any way, ends like one that was not."""

import itertools
import os
import random
import signal
import threading
from dataclasses import replace

import pytest
import torch
from processes import run as run_in_process
from torch import nn

from memloc_ext.data import Split
from memloc_ext.training import TrainConfig, list_checkpoints, load_checkpoint, train

CONFIG = TrainConfig(epochs=4, batch_size=32, learning_rate=0.05)
LONG = replace(CONFIG, epochs=60)


def make_split(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(200, 1, 8, 8, generator=generator)
    return Split.clean(images, torch.randint(10, (200,), generator=generator))


def build(seed=0, hidden=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, hidden, 3), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
            nn.Linear(36 * hidden, 10),
        )  # fmt: skip


def draw(model):
    """An evaluation that draws from the global generator, as input noise does."""
    return {"draw": torch.rand(()).item()}


def run(folder, config=CONFIG, model_seed=0):
    model = build(model_seed)
    history = train(model, make_split(), config, checkpoints=folder, evaluate=draw, progress=False)
    return model.state_dict(), history


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The short training, never interrupted: its folder, final state and history."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, *run(folder)


def assert_ends_alike(folder, result, unbroken):
    expected_folder, expected_state, expected_history = unbroken
    state, history = result
    assert history == expected_history
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], value) for name, value in expected_state.items())
    for epoch, path in list_checkpoints(expected_folder).items():
        expected, saved = load_checkpoint(path), load_checkpoint(list_checkpoints(folder)[epoch])
        assert all(torch.equal(saved.model[name], value) for name, value in expected.model.items())
        assert saved.optimizer["state"].keys() == expected.optimizer["state"].keys()
        for key, value in expected.optimizer["state"].items():
            assert torch.equal(saved.optimizer["state"][key]["momentum_buffer"], value["momentum_buffer"])


def copy(source, target, epochs):
    target.mkdir()
    for epoch in epochs:
        path = list_checkpoints(source)[epoch]
        (target / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]])
def test_continues_after_the_newest_checkpoint(tmp_path, unbroken, kept):
    folder = tmp_path / "run"
    copy(unbroken[0], folder, kept)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert_ends_alike(folder, run(folder, model_seed=1), unbroken)  # the checkpoint's weights replace the model's
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_continues_in_mixed_precision(tmp_path, precision):
    config = replace(CONFIG, epochs=2, precision=precision)
    unbroken = tmp_path / "unbroken", *run(tmp_path / "unbroken", config)
    copy(unbroken[0], tmp_path / "run", [0, 1])
    assert_ends_alike(tmp_path / "run", run(tmp_path / "run", config), unbroken)


def test_a_damaged_newest_checkpoint_is_told_and_can_be_deleted(tmp_path, unbroken):
    folder = tmp_path / "run"
    copy(unbroken[0], folder, [0, 1, 2])
    newest = folder / "epoch_002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-500])
    with pytest.raises(
        ValueError, match=r"train: .*epoch_002\.safetensors: .*; delete it to continue from the one before"
    ):
        run(folder)
    assert list(list_checkpoints(folder)) == [0, 1, 2]
    newest.unlink()
    assert_ends_alike(folder, run(folder), unbroken)


@pytest.mark.parametrize("setting", [{"epochs": 5}, {"learning_rate": 0.01}, {"schedule": "triangular"}, {"seed": 1}])
def test_another_config_is_refused(unbroken, setting):
    (name, value), folder = *setting.items(), unbroken[0]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        ValueError, match=rf"train: config\.{name} must be .* to continue .*004\.safetensors, got {value};"
    ):
        run(folder, replace(CONFIG, **setting))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            build(hidden=5),
            r"model\.0\.weight must be torch.float32 \[4, 1, 3, 3\] .*, got torch.float32 \[5, 1, 3, 3\]",
        ),
        (build().double(), r"model\.0\.weight must be torch.float32 .*, got torch.float64"),
        (build().append(nn.Linear(10, 10)), r"model\.6\.weight must be None .*, got torch.float32 \[10, 10\]"),
        (build()[:5], r"model\.5\.bias must be torch.float32 \[10\] .*, got None"),
    ],
)
def test_another_model_is_refused_and_left_alone(unbroken, model, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        train(model, make_split(), CONFIG, checkpoints=unbroken[0], progress=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_another_split_is_refused(unbroken):
    with pytest.raises(ValueError, match="train: the digest of the data's targets and numbers must be"):
        train(build(), make_split(seed=1), CONFIG, checkpoints=unbroken[0], progress=False)


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_interrupted_while_a_checkpoint_is_written(tmp_path, monkeypatch, unbroken, calls):
    replace_, left = os.replace, [calls]

    def interrupt(*paths):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        replace_(*paths)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert list(list_checkpoints(tmp_path)) == list(range(calls - 1))
    assert_ends_alike(tmp_path, run(tmp_path), unbroken)


def test_killed_again_and_again(tmp_path):
    """SIGKILL leaves no time to clean up: whatever lies in the folder then must do."""
    unbroken = tmp_path / "unbroken", *run(tmp_path / "unbroken", LONG)
    folder, moments = tmp_path / "killed", random.Random(0)
    for attempt in range(3):
        killed = run_in_process(run_until_killed, folder, moments.uniform(0, 0.03))
        assert killed.status == -signal.SIGKILL, killed.stderr
        assert 5 * (attempt + 1) <= len(list_checkpoints(folder)) <= LONG.epochs
    assert_ends_alike(folder, run(folder, LONG), unbroken)


def run_until_killed(folder, seconds):
    """Train in this process, which is killed that many seconds after its sixth evaluation."""
    calls = itertools.count(1)

    def evaluate(model):
        if next(calls) == 6:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return draw(model)

    torch.set_num_threads(1)
    train(build(), make_split(), LONG, checkpoints=folder, evaluate=evaluate, progress=False)
