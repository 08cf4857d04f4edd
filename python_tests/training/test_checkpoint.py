import io
import os
import pickle
import re

import pytest
import torch

from memloc_ext.training import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint


def checkpoint(epoch=3, size=100):
    model = torch.nn.Linear(size, 2)
    return Checkpoint(epoch, model.state_dict(), {"state": {}}, {}, [{"epoch": 0, "a": 0.5}], {"seed": 0}, "digest")


def test_comes_back(tmp_path):
    saved = checkpoint()
    path = save_checkpoint(tmp_path, saved)
    assert path == tmp_path / "epoch_003.pt"
    loaded = load_checkpoint(path)
    assert all(torch.equal(loaded.model[name], value) for name, value in saved.model.items())
    assert {**vars(loaded), "model": None} == {**vars(saved), "model": None}


def test_listed_in_the_order_of_their_epochs(tmp_path):
    for epoch in (1000, 2, 10, 0):
        save_checkpoint(tmp_path, checkpoint(epoch))
    for name in (
        "epoch_1.pt",
        "epoch_003.pt.tmp",
        ".epoch_004.pt.0.tmp",
        "epoch_0005.pt",
        "model.pt",
        "epoch_\u0660\u0660\u0667.pt",
    ):
        (tmp_path / name).touch()
    listed = list_checkpoints(tmp_path)
    assert list(listed) == [0, 2, 10, 1000]
    assert all(load_checkpoint(path).epoch == epoch for epoch, path in listed.items())
    assert list_checkpoints(tmp_path / "missing") == {}


@pytest.mark.parametrize("kept", [0, 1, 100, -1000, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    path = save_checkpoint(tmp_path, checkpoint())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be loaded as a checkpoint: ")):
        load_checkpoint(path)


def test_a_flipped_bit_is_found(tmp_path):
    """PyTorch loads such a file without a word: it does not compare checksums."""
    path = save_checkpoint(tmp_path, checkpoint(size=10_000))
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


def saved_by_torch(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


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
        (vars(checkpoint()) | {"history": {}}, "history must be list, got dict"),
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
    with pytest.raises(ValueError, match=r"epoch_003\.pt: cannot be loaded as a checkpoint: .*CUDA"):
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
    path = save_checkpoint(tmp_path, checkpoint(0))
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
        ValueError, match=rf"epoch_000\.pt: {name} must hold plain values by name, got .*\.\.\..* for a"
    ):
        load_checkpoint(path)


def test_a_checkpoint_under_the_name_of_another_epoch_is_named(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(3))
    assert load_checkpoint(path.rename(tmp_path / "best.pt")).epoch == 3
    with pytest.raises(ValueError, match=r"epoch_004\.pt: must be of its epoch, got 3"):
        load_checkpoint((tmp_path / "best.pt").rename(tmp_path / "epoch_004.pt"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_not_dense(tmp_path):
    path, nested = tmp_path / "epoch_000.pt", torch.nested.nested_tensor([torch.zeros(2)])
    path.write_bytes(saved_by_torch(vars(checkpoint(0)) | {"model": {"weight": nested}}))
    with pytest.raises(
        ValueError, match=r"epoch_000\.pt: model must hold dense tensors by name, got Tensor for weight"
    ):
        load_checkpoint(path)
