"""What a retraining of one layer group may touch, whom it may see, and when it ends."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from probing import Everything, Store, changed_state, made_dataset, small_model
from torch import nn

import memloc_ext
from memloc_ext import models
from memloc_ext.data import Dataset
from memloc_ext.nn import ExampleTiedDropout, current_example_ids, dropout_mode, insert_example_tied_dropout
from memloc_ext.probes import Retraining, accuracy, retraining
from memloc_ext.probes.layer_groups import chosen_groups
from memloc_ext.training import Checkpoint, save_checkpoint

SHORT = {"epochs": 2, "train_batch_size": 5}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Collect the copies of the model that are trained."""
    found: list[nn.Module] = []
    isolated = retraining._isolated

    def noted(network: nn.Module, *rest: Any) -> Any:
        found.append(network)
        return isolated(network, *rest)

    monkeypatch.setattr(retraining, "_isolated", noted)
    return found


def trained(name: str = "resnet9") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = small_model(name)
    return model, changed_state(model, 1)


def retrain(model: nn.Module, state: Any, dataset: Dataset, **arguments: Any) -> Retraining:
    return memloc_ext.retrain(model, state, dataset.train, test=dataset.test, **arguments)


def evaluated(model: nn.Module, dataset: Dataset) -> Any:
    return accuracy(model, dataset.train, test=dataset.test)


@pytest.mark.parametrize("name", ["lenet", "resnet9", "vit"])
def test_only_the_group_changes(name: str, copies: list[nn.Module]) -> None:
    model, initial = trained(name)
    model.train()
    dataset, before = made_dataset(), Everything(model)
    result = retrain(model, initial, dataset, **SHORT)
    before.check()
    assert result.unchanged == evaluated(model, dataset)
    chosen = chosen_groups("retrain", model, None)
    assert list(result.groups) == list(chosen)
    for network, group in zip(copies, chosen.values(), strict=True):
        for key, value in network.state_dict().items():
            if key not in group.names:
                assert torch.equal(value, model.state_dict()[key]), key
            elif value.is_floating_point() and value.numel() > 1:
                assert not torch.equal(value, initial[key]), key
        assert all(p.requires_grad == (key in group.parameters) for key, p in network.named_parameters())
        assert all(p.grad is None for key, p in network.named_parameters() if key not in group.parameters)


def test_it_starts_from_the_initial_values_with_buffers(copies: list[nn.Module]) -> None:
    model, initial = trained()
    dataset = made_dataset()
    result = retrain(model, initial, dataset, groups=["conv3"], **SHORT)
    rewound = memloc_ext.rewind(model, {0: initial}, dataset.train, test=dataset.test, groups=["conv3"])
    first, *others = result.groups["conv3"].epochs
    assert first.accuracy == rewound.groups["conv3"].at(0).with_buffers
    assert (first.epoch, first.loss) == (0, None)
    assert [record.epoch for record in others] == [1, 2]
    assert all(record.loss is not None and record.loss > 0 for record in others)
    assert others[-1].accuracy == evaluated(copies[0], dataset)


def test_only_clean_examples_are_seen_in_training(copies: list[nn.Module]) -> None:
    model, initial = trained()
    dataset, seen = made_dataset(), []

    def note(module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            ids = current_example_ids()
            assert ids is not None
            seen.append(ids)

    model.register_forward_pre_hook(note)
    retrain(model, initial, dataset, groups=["conv1", "head"], **SHORT)
    clean = dataset.train.indices[~dataset.train.memorized].tolist()
    assert sorted(torch.cat(seen).tolist()) == sorted(clean * 2 * SHORT["epochs"])


@pytest.mark.parametrize("group", ["conv1", "res2.conv1", "head"])
def test_the_groups_modules_train_and_others_evaluate(group: str) -> None:
    model, initial = trained()
    insert_example_tied_dropout(model, ["res2", "conv1"])
    training: dict[str, bool] = {}
    for name, module in model.named_modules():

        def note(module: nn.Module, args: Any, name: str = name) -> None:
            if torch.is_grad_enabled():
                training[name] = module.training

        module.register_forward_pre_hook(note)
    retrain(model, initial, made_dataset(), groups=[group], **SHORT)
    expected = {
        name
        for name, module in model.named_modules()
        if name == group or name.startswith(f"{group}.") or isinstance(module, ExampleTiedDropout)
    }
    assert {name for name, flag in training.items() if flag} == expected


def test_the_backward_pass_ends_at_the_group() -> None:
    model, initial = trained("lenet")
    asked: dict[str, bool] = {}
    for name, module in model.named_children():

        def note(module: nn.Module, args: Any, name: str = name) -> None:
            if torch.is_grad_enabled():
                asked[name] = args[0].requires_grad

        module.register_forward_pre_hook(note)
    retrain(model, initial, made_dataset(), groups=["fc1"], **SHORT)
    assert asked == {"conv1": False, "conv2": False, "fc1": False, "fc2": True, "head": True}


@pytest.mark.parametrize("mode", ["train", None])
def test_each_example_keeps_its_own_mask(mode: str | None) -> None:
    model, initial = trained()
    insert_example_tied_dropout(model, models.dropout_sites(model))
    dataset, masked = made_dataset(), []

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            with dropout_mode(module, "train"):
                masked.append(torch.equal(module.forward(args[0]), output))

    for module in list(model.modules()):
        if isinstance(module, ExampleTiedDropout):
            module.register_forward_hook(note)
    before = Everything(model)
    with dropout_mode(model, mode):
        result = retrain(model, initial, dataset, groups=["conv2"], **SHORT)
    assert len(masked) == 6 * 2 * SHORT["epochs"]
    assert all(masked)
    before.check()
    assert (result.groups["conv2"].epochs[-1].accuracy.test is None) == (mode == "train")


def test_a_groups_result_depends_on_no_other() -> None:
    model, initial = trained("vit")  # with standard dropout, whose draws follow the seed
    dataset = made_dataset()
    whole = retrain(model, initial, dataset, **SHORT, seed=3)
    torch.manual_seed(5)
    alone = retrain(model, initial, dataset, groups=["blocks.1"], **SHORT, seed=3)
    assert alone.groups["blocks.1"] == whole.groups["blocks.1"]
    other = retrain(model, initial, dataset, groups=["blocks.1"], **SHORT, seed=4)
    assert other != alone


def test_it_stops_once_every_clean_example_is_fitted() -> None:
    model = small_model("lenet")
    initial, dataset = model.state_dict(), made_dataset(train=4, noisy=2)
    how = {"epochs": 60, "learning_rate": 0.1, "patience": 2, "groups": ["head"]}
    found = retrain(model, initial, dataset, **how).groups["head"]
    assert found.stopped == "fitted"
    shares = [record.accuracy.clean for record in found.epochs]
    assert shares[-2:] == [1, 1]
    assert len(shares) < 60
    assert not any(a == b == 1 for a, b in itertools.pairwise(shares[1:-1]))
    assert retrain(model, initial, dataset, **how | {"epochs": 1}).groups["head"].stopped == "ended"


def test_an_interrupted_retraining_goes_on(tmp_path: Path) -> None:
    model, initial = trained("lenet")
    dataset, store = made_dataset(), Store(1)
    path = save_checkpoint(tmp_path, Checkpoint(0, initial, {}, {}, [], {}, ""))
    how = {**SHORT, "groups": ["fc2", "head"]}
    with pytest.raises(KeyboardInterrupt):
        retrain(model, path, dataset, **how, parts=store)
    first = next(iter(store))
    store[first]["epochs"][0]["accuracy"]["clean"], store.limit = 0.25, None
    result = retrain(model, initial, dataset, **how, parts=store)
    assert result.groups["fc2"].epochs[0].accuracy.clean == 0.25  # it was not trained again
    assert result.groups["head"] == retrain(model, path, dataset, **how).groups["head"]
    retrain(model, path, dataset, **how, patience=9, parts=store)
    assert len(store) == 4


def test_memorized_examples_need_no_wrong_label() -> None:
    model, initial = trained("lenet")
    dataset = made_dataset()
    atypical = dataclasses.replace(dataset.train, labels=dataset.train.true_labels)
    result = retrain(model, initial, dataclasses.replace(dataset, train=atypical), groups=["head"], **SHORT)
    for record in result.groups["head"].epochs:
        assert record.accuracy.memorized == record.accuracy.memorized_true is not None
    clean = dataclasses.replace(dataset, train=dataset.train.subset(~dataset.train.memorized))
    result = retrain(model, initial, clean, groups=["head"], **SHORT)
    assert all(record.accuracy.memorized is None for record in result.groups["head"].epochs)


def test_parameters_that_were_frozen_are_trained_in_the_copy_only() -> None:
    model, initial = trained("lenet")
    model.requires_grad_(False)
    dataset, before = made_dataset(), Everything(model)
    found = retrain(model, initial, dataset, groups=["head"], **SHORT).groups["head"]
    before.check()
    assert found.epochs[1].loss != found.epochs[2].loss


def test_errors_name_what_arrived() -> None:
    model, initial = trained("lenet")
    dataset = made_dataset()
    with pytest.raises(ValueError, match="groups must be among conv1, conv2, fc1, fc2, head, got 'fc9'"):
        retrain(model, initial, dataset, groups=["fc9"])
    with pytest.raises(ValueError, match=r"the state dict must be of this model"):
        retrain(model, small_model("vit").state_dict(), dataset)
    noisy = dataclasses.replace(dataset, train=dataset.train.subset(dataset.train.memorized))
    with pytest.raises(ValueError, match="at least one clean training example, got none"):
        retrain(model, initial, noisy)


def test_several_processes_do_not_meet_in_a_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memloc_ext.probes.retraining.world_size", lambda: 2)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small_model("resnet9"))
    with pytest.raises(ValueError, match="retrain: model must hold no SyncBatchNorm in several processes"):
        retrain(model, model.state_dict(), made_dataset())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"train_batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "must be positive and finite, got 0.0"),
    ],
)
def test_settings_have_rules(wrong: dict, message: str) -> None:
    model, initial = trained("lenet")
    with pytest.raises(ValueError, match=message):
        retrain(model, initial, made_dataset(), **wrong)


def test_memorized_examples_must_be_known() -> None:
    model, initial = trained("lenet")
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
    with pytest.raises(ValueError, match=r"retrain: memorized must be bool \[N\] by number, .* got None"):
        memloc_ext.retrain(model, initial, [(x, y)])


def test_rows_are_flat() -> None:
    model, initial = trained("lenet")
    result = retrain(model, initial, made_dataset(), groups=["fc2", "head"], **SHORT)
    rows = result.rows()
    assert [tuple(row) for row in rows] == [("group", "epoch", "clean", "memorized", "test")] * 6
    for row, (group, record) in zip(
        rows, [(group, record) for group, found in result.groups.items() for record in found.epochs], strict=True
    ):
        found = record.accuracy
        assert tuple(row.values()) == (group, record.epoch, found.clean, found.memorized, found.test)
