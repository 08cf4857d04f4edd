"""A training that keeps an account trains as without, and an interrupted one leaves the same files."""

import os
import shutil
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.data import Split, digits, with_label_noise
from memloc_ext.files import plain
from memloc_ext.models import lenet
from memloc_ext.probes import EpochAccount, GroupAccount, ParameterAccount
from memloc_ext.study.accounting import (
    AccountedBackward,
    AccountedEpoch,
    account_path,
    accounted_epochs,
    accounting_cost,
    load_account,
    save_account,
)
from memloc_ext.tensor_files import load_tensors, save_tensors
from memloc_ext.training import TrainConfig, list_checkpoints, load_checkpoint, train
from memloc_ext.training.epoch import epoch_rng

CONFIG = TrainConfig(epochs=3, batch_size=16, learning_rate=0.05)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def split() -> Split:
    """40 digits with label noise, whose numbers in the data set are not their rows."""
    return with_label_noise(digits(), 0.2).train.subset(torch.arange(1240, 1200, -1))


class Exact(nn.Module):
    """A LeNet in float64, in which rounding is no matter."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lenet = lenet(10, 1, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.lenet(x.double())


def build() -> nn.Module:
    return Exact().lenet.float()


def run(folder: Path, split: Split, config: TrainConfig = CONFIG, model: nn.Module | None = None) -> nn.Module:
    model = model or Exact()
    backward = AccountedBackward(model, split, folder / "accounting")
    train(model, split, config, checkpoints=folder / "checkpoints", backward=backward, progress=False)
    return model


@pytest.fixture(scope="module")
def unbroken(split: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, split)
    return folder


def accounts(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "accounting").iterdir()}


def test_ends_with_the_weights_of_a_training_without(split: Split, unbroken: Path, tmp_path: Path) -> None:
    plain = Exact()
    train(plain, split, CONFIG, checkpoints=tmp_path, progress=False)
    torch.testing.assert_close(load_checkpoint(list_checkpoints(unbroken / "checkpoints")[3]).model, plain.state_dict())


def test_accounts_the_batches_of_the_training_itself(split: Split, unbroken: Path) -> None:
    """The first batch of the second epoch, from the checkpoint before it, without an accountant."""
    model = Exact()
    model.load_state_dict(load_checkpoint(list_checkpoints(unbroken / "checkpoints")[1]).model)
    with epoch_rng(CONFIG.seed, 2, split.device) as generator:
        inputs, labels, ids = next(split.batches(CONFIG.batch_size, generator))
    account = load_account(account_path(unbroken / "accounting", 2))
    for row, number in enumerate(ids):
        loss = F.cross_entropy(model(inputs[row : row + 1]).float(), labels[row : row + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([value.flatten() for value in gradients]).norm()
        place = (account.indices == number).nonzero().item()
        torch.testing.assert_close(account.total_norms[place], norm.float())


def test_every_epoch_has_a_file(unbroken: Path) -> None:
    assert accounts(unbroken).keys() == {f"epoch_00{epoch}.safetensors" for epoch in (1, 2, 3)}
    table = accounted_epochs(unbroken / "accounting", 3)
    assert [(row.epoch, list(row.groups), len(row.parameters)) for row in table] == [
        (epoch, ["lenet"], 10) for epoch in (1, 2, 3)
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5])
def test_an_interrupted_training_leaves_the_same_files(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, precision: str
) -> None:
    """Interrupted in place of one of its files: checkpoint 0, account 1, checkpoint 1, account 2, checkpoint 2."""
    config = TrainConfig(epochs=2, batch_size=16, learning_rate=0.05, precision=precision)
    run(tmp_path / "unbroken", split, config, build())
    replace, left = os.replace, [calls]

    def interrupt(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        replace(source, target)

    broken = tmp_path / "broken"
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(broken, split, config, build())
    assert len(list(broken.glob("accounting/epoch*"))) == (calls - 1) // 2
    assert len(list_checkpoints(broken / "checkpoints")) == calls // 2
    run(broken, split, config, build())
    assert accounts(broken) == accounts(tmp_path / "unbroken")


def test_an_account_is_written_before_its_checkpoint(split: Split, tmp_path: Path, monkeypatch) -> None:
    written, replace = [], os.replace

    def note(source, target) -> None:
        written.append(str(Path(target).relative_to(tmp_path)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    run(tmp_path, split)
    per_epoch = [f"{folder}/epoch_00{epoch}" for epoch in (1, 2, 3) for folder in ("accounting", "checkpoints")]
    assert written == [f"{name}.safetensors" for name in ("checkpoints/epoch_000", *per_epoch)]


def test_an_account_of_another_model_or_epoch_is_named(unbroken: Path, tmp_path: Path) -> None:
    for epoch in (1, 2):
        account = load_account(account_path(unbroken / "accounting", epoch))
        save_account(account_path(tmp_path, epoch), epoch, account)
    assert len(accounted_epochs(tmp_path, 2)) == 2
    save_account(account_path(tmp_path, 2), 1, account)
    with pytest.raises(ValueError, match=r"epoch_002\.safetensors: must be of epoch 2, and of the groups and"):
        accounted_epochs(tmp_path, 2)
    groups = {f"{name}x": row for name, row in account.groups.items()}
    save_account(account_path(tmp_path, 2), 2, replace(account, groups=groups))
    with pytest.raises(ValueError, match=r"epoch_002\.safetensors: must be of epoch 2, and of the groups and"):
        accounted_epochs(tmp_path, 2)


def test_a_missing_account_is_named(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken / "accounting", tmp_path / "accounting")
    (tmp_path / "accounting" / "epoch_002.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"epoch_002\.safetensors is missing; delete {tmp_path} to train again"):
        accounted_epochs(tmp_path / "accounting", 3)


def made_account(num: int = 5) -> EpochAccount:
    row = GroupAccount(1.0, 0.5, 1.25, -0.5, 0.875, 2.0, 3.0, -7.5, -0.5, -0.75, -0.5, -0.25, 0.75, 0.5)
    return EpochAccount(
        model=replace(row, auc=None),
        groups={"head": row, "conv1": replace(row, clean=0.0)},
        parameters={f"{name}.weight": ParameterAccount(1.0, 0.5, 1.25, -0.5) for name in ("head", "conv1")},
        example_norms=torch.tensor([[1.0, float("nan")]]).expand(num, 2),
        example_cosines=torch.tensor([[-0.5, float("nan"), -0.25]]).expand(num, 3),
        memorized=torch.arange(num) % 2 == 1,
        indices=torch.arange(num) + 7,
    )


def test_an_account_comes_back_and_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    account, path = made_account(), account_path(tmp_path, 3)
    save_account(path, 3, account)
    loaded = load_account(path)
    for name in ("model", "groups", "parameters"):
        assert getattr(loaded, name) == getattr(account, name)
    assert list(loaded.groups) == ["head", "conv1"]
    for name in ("example_norms", "example_cosines", "memorized", "indices"):
        torch.testing.assert_close(getattr(loaded, name), getattr(account, name), rtol=0, atol=0, equal_nan=True)
    save_account(tmp_path / "again", 3, loaded)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_an_account_without_cosines_and_noise_scale_can_still_be_read(tmp_path: Path) -> None:
    account, path = made_account(), account_path(tmp_path, 1)
    old = {field.name for field in fields(GroupAccount) if field.default is MISSING}
    assert len(old) == 7
    about = plain(AccountedEpoch(1, account.model, account.groups, account.parameters))
    for row in (about["model"], *about["groups"].values()):
        for name in row.keys() - old:
            del row[name]
    save_tensors(path, {name: getattr(account, name) for name in ("example_norms", "memorized", "indices")}, about)
    loaded = load_account(path)
    assert accounted_epochs(tmp_path, 1)[0].model == loaded.model
    assert (loaded.model.total, loaded.model.noise_scale, loaded.model.memorized_against) == (1.25, None, None)
    assert loaded.example_cosines.shape == (5, 3)
    assert loaded.example_cosines.isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        {"example_norms": torch.zeros(5, 3)},
        {"example_cosines": torch.zeros(5, 2)},
        {"example_norms": torch.zeros(5, 2, dtype=torch.float64)},
        {"memorized": torch.zeros(4, dtype=torch.bool)},
        {"indices": torch.zeros(5)},
        {"more": torch.zeros(5)},
    ],
)
def test_tensors_of_another_kind_are_named(tmp_path: Path, change: dict[str, Tensor]) -> None:
    path = account_path(tmp_path, 3)
    save_account(path, 3, made_account())
    tensors, about = load_tensors(path, AccountedEpoch)
    save_tensors(path, {**tensors, **change}, about)
    with pytest.raises(ValueError, match=r"epoch_003\.safetensors: is no account of an epoch: it must hold"):
        load_account(path)
    save_tensors(path, tensors, {"epoch": 1})
    with pytest.raises(ValueError, match=r"epoch_003\.safetensors: cannot be loaded as AccountedEpoch"):
        load_account(path)


def test_float16_is_as_accurate_as_plain_float16(split: Split, tmp_path: Path) -> None:
    inputs, labels, _ = split.batch(split.indices.argsort())
    scaler = torch.amp.GradScaler("cpu")

    def plain(model: nn.Module, mixed: bool) -> Tensor:
        norms = []
        for row in range(len(split)):
            with torch.autocast("cpu", torch.float16, enabled=mixed):
                loss = F.cross_entropy(model(inputs[row : row + 1]).float(), labels[row : row + 1])
            gradients = torch.autograd.grad(scaler.scale(loss), list(model.parameters()))
            norms.append(torch.cat([value.flatten() for value in gradients]).norm() / scaler.get_scale())
        return torch.stack(norms)

    config = TrainConfig(epochs=1, batch_size=len(split), precision="float16")
    run(tmp_path, split, config, build())
    actual = load_account(account_path(tmp_path / "accounting", 1)).total_norms
    exact = plain(Exact(), mixed=False)
    assert (actual - exact).abs().max() <= 16 * torch.finfo(torch.float16).eps * exact.max()  # of all layers


def test_the_cost_is_measured_on_a_copy(split: Split, tmp_path: Path) -> None:
    model = build().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    cost = accounting_cost(model, split, CONFIG)
    assert all(value > 0 for value in cost.values())
    assert cost["pairs"] >= 3
    assert cost["ratio"] > cost["step_ratio"]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
