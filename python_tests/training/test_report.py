import contextlib
import io
import sys
import types

import pytest
import torch
from torch import nn

from memloc_ext.data import Split
from memloc_ext.training import TrainConfig, train

CONFIG = TrainConfig(epochs=2, batch_size=8)


def run(folder, **options):
    split = Split.clean(torch.linspace(0, 1, 16 * 64).view(16, 1, 8, 8), torch.arange(16) % 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return train(model, split, CONFIG, checkpoints=folder, evaluate=lambda _: {"noisy_accuracy": 0.125}, **options)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_loss_and_accuracy_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    history = run(tmp_path)
    shown = sys.stderr.getvalue()
    assert "2/2" in shown
    assert f"loss={history[-1]['loss']:.3g}" in shown
    assert "noisy_accuracy=0.125" in shown


def test_the_bar_is_quiet_elsewhere(tmp_path, capfd):
    run(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_without_tqdm(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run(tmp_path / "quiet", progress=False)
    with pytest.raises(ImportError, match=r"pip install 'memloc_ext\[study\]', or pass progress=False"):
        run(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"run: pip install 'memloc_ext\[tensorboard\]'"):
        run(tmp_path / "new", progress=False, tensorboard=tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_number_once_from_where_the_training_continues(tmp_path, monkeypatch):
    logged = []

    class Writer(contextlib.nullcontext):
        def __init__(self, folder, purge_step):
            logged.append((folder, purge_step))
            super().__init__(self)

        def add_scalar(self, name, value, step):
            logged.append((name, value, step))

        def flush(self):
            logged.append("flush")

    stub = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    options = {"progress": False, "tensorboard": tmp_path / "log"}
    history = run(tmp_path / "run", **options)
    expected = []
    for record in history:
        expected += [(name, value, record["epoch"]) for name, value in record.items() if name != "epoch"]
        expected.append("flush")
    assert logged == [(str(tmp_path / "log"), 0), *expected]

    (tmp_path / "run" / "epoch_002.safetensors").unlink()
    logged.clear()
    assert run(tmp_path / "run", **options) == history
    assert logged == [(str(tmp_path / "log"), 2), *expected[-4:]]
