"""Every cell is held against a copy of the model that was loaded as the cell says."""

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probing import Everything, Store, changed_state, made_dataset, small_model
from torch import nn

import memloc_ext
from memloc_ext import models
from memloc_ext.data import Dataset
from memloc_ext.nn import ExampleTiedDropout, dropout_mode, insert_example_tied_dropout
from memloc_ext.probes import Accuracy, Rewinding, accuracy, rewinding
from memloc_ext.probes.accuracy import masks_test_examples
from memloc_ext.training import Checkpoint, save_checkpoint


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def history(model: nn.Module, *epochs: int) -> dict[int, dict[str, Any]]:
    return {epoch: changed_state(model, epoch) for epoch in epochs}


def checkpoint_folder(path: Path, states: dict[int, dict[str, Any]]) -> Path:
    path.mkdir(exist_ok=True)
    for epoch, state in states.items():
        save_checkpoint(path, Checkpoint(epoch, state, {}, {}, [], {}, ""))
    return path


def plain(model: nn.Module, state: dict[str, Any], names: list[str], buffers: bool, test: bool = True) -> Accuracy:
    """Return the accuracy of a copy that was loaded with a group's weights, and perhaps its batch-norm buffers."""
    owners = {name.rpartition(".")[0] for name in names}
    own = [name for name, _ in model.named_buffers() if name.rpartition(".")[0] in owners] if buffers else []
    changed = copy.deepcopy(model)
    changed.load_state_dict({name: state[name] for name in (*names, *own)}, strict=False)
    return accuracy(changed, made().train, test=made().test if test else None, batch_size=4)


def made():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return made_dataset()


def rewind(model: nn.Module, states: Any, dataset: Dataset | None = None, **arguments: Any) -> Rewinding:
    dataset = dataset or made()
    return memloc_ext.rewind(model, states, dataset.train, test=dataset.test, **arguments)


def check(model: nn.Module, states: dict[int, dict[str, Any]], result: Rewinding, test: bool = True) -> None:
    assert result.unchanged == accuracy(model, made().train, test=made().test if test else None, batch_size=4)
    assert list(result.groups) == list(models.layer_groups(model))
    for group, names in models.layer_groups(model).items():
        for cell in result.groups[group].epochs:
            assert cell.with_buffers == plain(model, states[cell.epoch], names, True, test)
            assert cell.without_buffers == plain(model, states[cell.epoch], names, False, test)


@pytest.mark.parametrize("name", ["lenet", "resnet9", "resnet18", "vit"])
def test_accuracy_is_that_of_a_loaded_copy(name: str) -> None:
    model = small_model(name).train()
    model.load_state_dict(changed_state(model, 99))
    states = history(model, 0, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = Everything(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = rewind(model, states, epochs=[2, 0], batch_size=4)
    before.check()
    check(model, states, result)
    assert result.epochs == [0, 2]
    for group in models.layer_groups(model):
        found = result.groups[group]
        assert found.has_buffers == (name.startswith("resnet") and group not in ("head", "fc"))
        assert found.at(2) is found.epochs[1]


def test_rows_are_flat() -> None:
    model = small_model("resnet9")
    result = rewind(model, history(model, 0, 3), groups=["conv1", "head"])
    how = {"conv1": {False: "without_buffers", True: "with_buffers"}, "head": {None: "with_buffers"}}
    cells = {group: found.epochs for group, found in result.groups.items()}
    expected = [
        (group, cell.epoch, buffers, share.clean, share.memorized, share.test)
        for group, ways in how.items()
        for cell in cells[group]
        for buffers, share in ((buffers, getattr(cell, name)) for buffers, name in ways.items())
    ]
    rows = result.rows()
    assert [tuple(row) for row in rows] == [("group", "epoch", "buffers", "clean", "memorized", "test")] * 6
    assert [tuple(row.values()) for row in rows] == expected


def test_buffers_are_put_back_or_not() -> None:
    model = small_model("resnet9")
    states = history(model, 0)
    result = rewind(model, states, epochs=[0])
    assert any(g.at(0).with_buffers != g.at(0).without_buffers for g in result.groups.values())
    head = result.groups["head"]
    assert not head.has_buffers
    assert head.at(0).with_buffers == head.at(0).without_buffers


@pytest.mark.parametrize("mode", ["train", "drop", "test", None])
def test_dropout_stays_in_the_mode_it_is_in(mode: str | None) -> None:
    model = small_model("resnet9")
    insert_example_tied_dropout(model, models.dropout_sites(model))
    model.load_state_dict(changed_state(model, 99) | {k: v for k, v in model.state_dict().items() if "_extra" in k})
    states, before = history(model, 0), Everything(model)
    with dropout_mode(model, mode):
        result = rewind(model, states, epochs=[0], batch_size=4)
        check(model, states, result, test=mode != "train")
    before.check()
    assert (result.unchanged.test is None) == (mode == "train")


def test_a_model_that_cannot_be_recorded_is_run_whole() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(192, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x.flatten(1))
            return self.head(y if y.sum().item() > 0 else -y)

    model = Reading()
    states, before = history(model, 0, 1), Everything(model)
    with pytest.warns(UserWarning, match="whole model once per variant") as told:
        result = rewind(model, states, epochs=[0, 1], batch_size=4)
    assert len(told) == 1
    before.check()
    check(model, states, result)


def test_each_checkpoint_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("lenet")
    states, read = history(model, 0, 1, 2, 3), []

    def noted(path: Path) -> bytes:
        read.append(path.name)
        return path.read_bytes()

    monkeypatch.setattr("memloc_ext.tensor_files.read_bytes", noted)
    result = rewind(model, checkpoint_folder(tmp_path, states), batch_size=4)
    assert read == [f"epoch_00{epoch}.safetensors" for epoch in range(3)]
    assert result == rewind(model, states, epochs=[0, 1, 2], batch_size=4)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (range(4), [0, 1, 2]),
        (range(2), [0]),
        (range(5), [0, 2]),
        (range(21), [0, 2, 4, 6, 8, 10, 12, 14]),
        ([0, 3, 4, 50], [0, 4]),
        ([500, 1000, 1500], [500, 1000]),
    ],
)
def test_the_epochs_are_the_papers(there: Any, expected: list[int]) -> None:
    assert rewinding._before_last(dict.fromkeys(there)) == expected


def test_groups_can_be_named_or_given() -> None:
    model = small_model("lenet")
    states = history(model, 0)
    whole = rewind(model, states, epochs=[0])
    named = rewind(model, states, groups=["head", "conv1"], epochs=[0])
    assert list(named.groups) == ["head", "conv1"]
    assert all(whole.groups[group] == found for group, found in named.groups.items())
    given = rewind(model, states, groups={"last": ["head.weight", "head.bias"]}, epochs=[0])
    assert given.groups == {"last": whole.groups["head"]}


def test_an_interrupted_grid_goes_on() -> None:
    model, store = small_model("lenet"), Store(2)
    states = history(model, 0, 1)
    with pytest.raises(KeyboardInterrupt):
        rewind(model, states, epochs=[0, 1], parts=store)
    assert len(store) == 2
    before, store.limit = list(store), None
    result = rewind(model, states, epochs=[0, 1], parts=store)
    assert list(store)[:2] == before
    assert len(store) == 5
    assert result == rewind(model, states, epochs=[0, 1])
    rewind(model, states, epochs=[0], groups=["head"], parts=store)
    other = dataclasses.replace(made(), train=made().train.subset(made().train.memorized))
    rewind(model, states, other, epochs=[0, 1], groups=["head"], parts=store)
    assert len(store) == 7


def test_parts_of_other_checkpoints_are_not_taken() -> None:
    model, store = small_model("lenet"), Store()
    states = history(model, 0, 1)
    for state in ({0: states[0]}, {0: states[1]}):
        result = rewind(model, state, epochs=[0], parts=store)
        assert result == rewind(model, state, epochs=[0])
    assert len(store) == 2 * 5
    rewind(model, {0: states[1]}, epochs=[0], parts=store)
    assert len(store) == 2 * 5


def test_examples_may_be_missing() -> None:
    model = small_model("lenet")
    clean = dataclasses.replace(made(), train=made().train.subset(~made().train.memorized))
    result = rewind(model, history(model, 0), clean, epochs=[0])
    assert result.unchanged.memorized is None
    assert all(found.at(0).with_buffers.memorized is None for found in result.groups.values())
    empty = dataclasses.replace(clean, test=clean.test.subset(torch.tensor([], dtype=torch.int64)))
    assert rewind(model, history(model, 0), empty, epochs=[0]).groups["head"].at(0).with_buffers.test is None
    none = dataclasses.replace(clean, train=clean.train.subset(torch.tensor([], dtype=torch.int64)))
    with pytest.raises(ValueError, match="data must hold at least one training example, got none"):
        rewind(model, history(model, 0), none)


def test_errors_name_what_arrived(tmp_path: Path) -> None:
    model = small_model("lenet")
    states = history(model, 0, 2)

    def rewound(given: Any = states, **arguments: Any) -> None:
        rewind(model, given, **arguments)

    with pytest.raises(ValueError, match="groups must be among conv1, conv2, fc1, fc2, head, got 'conv9'"):
        rewound(groups=["conv9"])
    with pytest.raises(TypeError, match="groups must be a mapping or a list of names, got the string 'head'"):
        rewound(groups="head")
    with pytest.raises(ValueError, match=r"names of parameters of the model, .* got 'head.scale' in 'a'"):
        rewound(groups={"a": ["head.scale"]})
    with pytest.raises(ValueError, match=r"at most one group, got head.bias in a, b"):
        rewound(groups={"a": ["head.bias"], "b": ["head.bias"]})
    with pytest.raises(ValueError, match="at least one layer group, got none"):
        rewound(groups={})
    with pytest.raises(ValueError, match="'a' without"):
        rewound(groups={"a": []})
    with pytest.raises(ValueError, match="epochs must be among those of states, 0, 2, got 7"):
        rewound(epochs=[0, 7])
    with pytest.raises(ValueError, match="epochs must hold at least one"):
        rewound(epochs=[])
    with pytest.raises(ValueError, match="before the last, got 0"):
        rewound(checkpoint_folder(tmp_path / "one", history(model, 0)))
    with pytest.raises(ValueError, match=f"at least one checkpoint, got none in {tmp_path}"):
        rewound(tmp_path)
    foreign = changed_state(small_model("resnet9"), 0)
    with pytest.raises(
        ValueError, match=r"the state dict must be of this model, whose conv1.0.weight is torch.float32 \[6"
    ):
        rewound({0: foreign, 1: foreign})
    checkpoint_folder(tmp_path, {0: states[0] | {"more": torch.ones(1)}, 1: states[0]})
    with pytest.raises(
        ValueError, match=r"epoch_000.safetensors must be of this model, got more, which the model does not"
    ):
        rewound(tmp_path)
    lacking = {name: t for name, t in states[0].items() if name != "head.bias"}
    with pytest.raises(ValueError, match=r"whose head.bias is torch.float32 \[4\], got it not there"):
        rewound({0: lacking, 1: lacking})


def test_a_mode_set_by_name_is_what_masks_test_examples() -> None:
    model = nn.Sequential(ExampleTiedDropout())
    assert not masks_test_examples(model.train())
    model[0].mode = "train"
    assert masks_test_examples(model)


def test_epochs_are_integers_of_any_kind() -> None:
    model = small_model("lenet")
    states = history(model, 0, 2)
    expected = rewind(model, states, epochs=[0], groups=["fc1"]).rows()
    assert (
        rewind(model, {np.int64(e): s for e, s in states.items()}, epochs=np.array([0]), groups=["fc1"]).rows()
        == expected
    )
    with pytest.raises(TypeError, match="epochs in states must be integers, got '0'"):
        rewind(model, {"0": states[0]})


def test_steps_are_not_taken_for_the_papers_epochs() -> None:
    model = small_model("lenet")
    assert rewind(model, history(model, 10, 20, 30, 40), groups=["fc1"]).epochs == [10, 20, 30, 40]
    assert rewinding._before_last(dict.fromkeys((10, 20, 30, 40))) == [10, 20, 30]
    assert rewinding._before_last(dict.fromkeys(range(9))) == [0, 2, 4, 6]
