"""States come from whatever trainers write, and only from files of the same model."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memloc_ext
from memloc_ext.probes.states import found_states, read_state


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def other(model: nn.Module, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    state = copy.deepcopy(model.state_dict())
    return {k: t + torch.rand(t.shape, generator=generator) if t.is_floating_point() else t for k, t in state.items()}


def check(state: dict[str, torch.Tensor], source: Any, model: nn.Module) -> None:
    found = read_state("probe", source, model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "net.inner."])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
def test_files_of_torch(tmp_path: Path, prefix: str, wrap: str | None) -> None:
    model = build()
    state = other(model, 1)
    named: dict[str, Any] = {prefix + name: value for name, value in state.items()}
    if prefix == "net.inner.":
        named["loss.weight"] = torch.ones(2)  # of what wraps the model
    torch.save(named if wrap is None else {wrap: named, "epoch": 3}, tmp_path / "state.pt")
    check(state, tmp_path / "state.pt", model)


def hugging_face(folder: Path, model: nn.Module, saved: dict[int, tuple[float | None, str]]) -> dict[int, dict]:
    """Write checkpoints as a Trainer does: step to its epoch, if it is told, and to the kind of its files."""
    from safetensors.torch import save_file

    states = {}
    for step, (epoch, kind) in saved.items():
        place, states[step] = folder / f"checkpoint-{step}", other(model, step)
        place.mkdir(parents=True)
        if kind == "safetensors":
            save_file(states[step], place / "model.safetensors")
        elif kind == "bin":
            torch.save(states[step], place / "pytorch_model.bin")
        else:
            parts = [dict(list(states[step].items())[:3]), dict(list(states[step].items())[3:])]
            for number, part in enumerate(parts):
                save_file(part, place / f"model-{number}.safetensors")
            where = {name: f"model-{number}.safetensors" for number, part in enumerate(parts) for name in part}
            (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        if epoch is not None:
            (place / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "global_step": step}))
    return states


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [((1.0, 2.0, 3.0), [1, 2, 3]), ((0.5, 1.0, 1.5), [50, 100, 150]), ((None,) * 3, [50, 100, 150])],
)
def test_folders_of_hugging_face(tmp_path: Path, epochs: tuple, expected: list[int]) -> None:
    model = build()
    kinds = zip(epochs, ("safetensors", "bin", "sharded"), strict=True)
    states = hugging_face(tmp_path, model, dict(zip((50, 100, 150), kinds, strict=True)))
    found = found_states("probe", tmp_path)
    assert list(found) == expected
    for path, state in zip(found.values(), states.values(), strict=True):
        check(state, path, model)
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    result = memloc_ext.rewind(model, tmp_path, [(x, y)])
    assert result.epochs == expected[:-1]
    loaded = copy.deepcopy(model)
    loaded.load_state_dict({k: v for k, v in states[50].items() if k.startswith("3.")}, strict=False)
    assert result.groups["3"].at(result.epochs[0]).with_buffers == memloc_ext.accuracy(loaded, [(x, y)])


def test_folders_of_lightning(tmp_path: Path) -> None:
    model = build()
    names = ("epoch=0-step=5", "epoch=0-step=10", "epoch=1-step=20")
    states = {name: other(model, seed) for seed, name in enumerate(names)}
    for name, state in states.items():
        stored = {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 0, "loops": {}}
        torch.save(stored, tmp_path / f"{name}.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    found = found_states("probe", tmp_path)
    assert {epoch: path.stem for epoch, path in found.items()} == {0: "epoch=0-step=10", 1: "epoch=1-step=20"}
    check(states["epoch=1-step=20"], found[1], model)


def test_tied_tensors_may_be_there_by_one_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    found = read_state("probe", {"0.weight": torch.ones(2, 2)}, model)
    assert torch.equal(found["1.weight"], torch.ones(2, 2))


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(ValueError, match="probe: states must hold at least one checkpoint, got none in"):
        found_states("probe", tmp_path)
    with pytest.raises(ValueError, match=r"probe: .*it is a folder without model.safetensors"):
        read_state("probe", tmp_path, model)
    (tmp_path / "broken.pt").write_bytes(b"PK\3\4 broken")
    (tmp_path / "broken.safetensors").write_bytes(b"\1\2\3")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("broken.pt", "broken.safetensors", "module.pt", "list.pt"):
        with pytest.raises(ValueError, match=f"probe: .*{name}: cannot be read as the state of a model"):
            read_state("probe", tmp_path / name, model)
    with pytest.raises(FileNotFoundError):
        read_state("probe", tmp_path / "none.pt", model)
    torch.save(other(nn.Linear(1, 1), 0), tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign.pt must be of this model, whose 0.weight is .*, got it not there"):
        read_state("probe", tmp_path / "foreign.pt", model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrapped_models_state_is_that_of_the_model(prefix: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = model.state_dict()
    found = read_state("probe", {f"{prefix}{name}": value for name, value in state.items()}, model)
    assert found.keys() == state.keys()
