import io
import os
import pickle
import re

import pytest
import safetensors.torch
import torch

from memloc_ext.training import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint


def checkpoint(epoch=3, size=100):
    model = torch.nn.Linear(size, 2)
    return Checkpoint(epoch, model.state_dict(), {"state": {}}, {}, [{"epoch": 0, "a": 0.5}], {"seed": 0}, "digest")


def test_comes_back(tmp_path):
    saved = checkpoint()
    path = save_checkpoint(tmp_path, saved)
    assert path == tmp_path / "epoch_003.safetensors"
    loaded = load_checkpoint(path)
    assert all(torch.equal(loaded.model[name], value) for name, value in saved.model.items())
    assert {**vars(loaded), "model": None} == {**vars(saved), "model": None}


def test_what_a_training_needs_comes_back_with_the_same_bytes_every_time(tmp_path):
    weight = torch.randn(3, 2).t()
    model = {"a": weight, "tied": weight, "optimizer.1.b": torch.tensor(3), "m._extra_state": {"seed": 1}}
    state = {0: {"momentum_buffer": torch.randn(2, 3)}, 1: {"momentum_buffer": None}}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1], "foreach": None}]}
    saved = Checkpoint(0, model, optimizer, {"scale": 2.0, "_growth_tracker": 3}, [{"epoch": 0}], {"seed": 0}, "x")
    path = save_checkpoint(tmp_path, saved)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.model["a"], weight)
    assert torch.equal(loaded.model["tied"], weight)
    assert torch.equal(loaded.optimizer["state"][0]["momentum_buffer"], state[0]["momentum_buffer"])
    assert loaded.optimizer["state"][1] == {"momentum_buffer": None}
    assert loaded.optimizer["param_groups"] == optimizer["param_groups"]
    assert (loaded.model["m._extra_state"], loaded.scaler, loaded.history) == (
        {"seed": 1},
        saved.scaler,
        [{"epoch": 0}],
    )
    content = path.read_bytes()
    assert save_checkpoint(tmp_path, loaded).read_bytes() == content
    assert set(safetensors.torch.load(content)) == {
        "model.a",
        "model.tied",
        "model.optimizer.1.b",
        "optimizer.0.momentum_buffer",
    }


def test_the_checkpoint_of_an_earlier_version_is_read(tmp_path):
    saved = checkpoint()
    torch.save(vars(saved), tmp_path / "epoch_003.pt")
    loaded = load_checkpoint(list_checkpoints(tmp_path)[3])
    assert all(torch.equal(loaded.model[name], value) for name, value in saved.model.items())
    assert {**vars(loaded), "model": None} == {**vars(saved), "model": None}
    save_checkpoint(tmp_path, saved)
    assert list_checkpoints(tmp_path) == {3: tmp_path / "epoch_003.safetensors"}


def test_listed_in_the_order_of_their_epochs(tmp_path):
    for epoch in (1000, 2, 10, 0):
        save_checkpoint(tmp_path, checkpoint(epoch))
    for name in (
        "epoch_1.pt",
        "epoch_002.safetensors.tmp",
        ".epoch_004.safetensors.0.tmp",
        "epoch_0005.safetensors",
        "model.pt",
        "epoch_\u0660\u0660\u0667.pt",
    ):
        (tmp_path / name).touch()
    listed = list_checkpoints(tmp_path)
    assert list(listed) == [0, 2, 10, 1000]
    assert all(load_checkpoint(path).epoch == epoch for epoch, path in listed.items())
    assert list_checkpoints(tmp_path / "missing") == {}


def saved_by_torch(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def pickle_of(folder, saved):
    """The file of an earlier version."""
    path = folder / f"epoch_{saved.epoch:03d}.pt"
    path.write_bytes(saved_by_torch(vars(saved)))
    return path


@pytest.mark.parametrize("save", [save_checkpoint, pickle_of])
@pytest.mark.parametrize("kept", [0, 1, 100, -1000, -1])
def test_a_truncated_file_is_named(tmp_path, kept, save):
    path = save(tmp_path, checkpoint())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be loaded as ")):
        load_checkpoint(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint())
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in (start, len(content) - 1, content.index(b"digest"), content.index(b'\\"a\\"')):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"epoch_003\.safetensors: cannot be loaded as .*"):
            load_checkpoint(path)


def test_a_flipped_bit_of_an_archive_is_found(tmp_path):
    """PyTorch loads such a file without a word: it does not compare checksums."""
    path = pickle_of(tmp_path, checkpoint(size=10_000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"epoch_003\.pt: .* checksum of archive/data/0 is wrong"):
        load_checkpoint(path)


class Harmful:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def pickled(value):
    return pickle.dumps(value)


@pytest.mark.parametrize("write", [pickled, saved_by_torch])
def test_code_in_a_file_is_not_run(tmp_path, write):
    path = tmp_path / "epoch_000.pt"
    path.write_bytes(write(vars(checkpoint()) | {"config": Harmful(tmp_path / "made")}))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_checkpoint(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "is no checkpoint: it must hold epoch, model"),
        (torch.nn.Linear(2, 2).state_dict(), "is no checkpoint: it must hold epoch, model"),
        (vars(checkpoint()) | {"history": {}}, "is no checkpoint: Expected `array`, got `object` - at `$.history`"),
        (vars(checkpoint()) | {"model": []}, "model must be dict, got list"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, message):
    path = tmp_path / "epoch_000.pt"
    path.write_bytes(saved_by_torch(content))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load_checkpoint(path)


def test_a_missing_file_is_not_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "epoch_000.pt")


def test_an_absent_device_is_told(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("has CUDA")
    path = save_checkpoint(tmp_path, checkpoint())
    with pytest.raises(ValueError, match=r"epoch_003\.safetensors: cannot be loaded as a checkpoint: .*CUDA"):
        load_checkpoint(path, "cuda")


class Filled:
    def __reduce__(self):
        return bytearray, (2**40,)


def test_a_checkpoint_takes_no_more_memory_than_it_is_large(tmp_path):
    path = tmp_path / "epoch_000.pt"
    path.write_bytes(saved_by_torch(vars(checkpoint()) | {"config": Filled()}))
    with pytest.raises(ValueError, match=r"epoch_000\.pt: .*it holds a bytearray, which could fill the memory"):
        load_checkpoint(path)


def test_only_what_begins_as_an_archive_is_one(tmp_path):
    """zipfile finds an archive behind other bytes; torch.load reads these bytes."""
    path = pickle_of(tmp_path, checkpoint(0))
    path.write_bytes(pickled({}) + path.read_bytes())
    with pytest.raises(ValueError, match=r"epoch_000\.pt: .*it is no zip archive"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["config", "history"])
def test_a_list_of_many_places_in_few_bytes_is_shown_in_part(tmp_path, name):
    many = []
    for _ in range(60):
        many = [many, many]
    path, record = tmp_path / "epoch_000.pt", {"a": many}
    path.write_bytes(saved_by_torch(vars(checkpoint(0)) | {name: record if name == "config" else [record]}))
    with pytest.raises(
        ValueError, match=rf"epoch_000\.pt: is no checkpoint: Expected .*, got `array` - at `\$\.{name}"
    ):
        load_checkpoint(path)


def test_a_checkpoint_under_the_name_of_another_epoch_is_named(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(3))
    assert load_checkpoint(path.rename(tmp_path / "best.safetensors")).epoch == 3
    with pytest.raises(ValueError, match=r"epoch_004\.safetensors: must be of its epoch, got 3"):
        load_checkpoint((tmp_path / "best.safetensors").rename(tmp_path / "epoch_004.safetensors"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_not_dense(tmp_path):
    path, nested = tmp_path / "epoch_000.pt", torch.nested.nested_tensor([torch.zeros(2)])
    path.write_bytes(saved_by_torch(vars(checkpoint(0)) | {"model": {"weight": nested}}))
    with pytest.raises(
        ValueError, match=r"epoch_000\.pt: model must hold dense tensors by name, got Tensor for weight"
    ):
        load_checkpoint(path)
