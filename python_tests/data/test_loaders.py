import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memloc_ext._torchvision import import_torchvision
from memloc_ext.data import cifar10, digits, load, mnist, svhn

REAL = os.environ.get("MEMLOC_DATA")
GENERATOR = np.random.default_rng(0)


def test_digits_have_their_shape_and_scale():
    dataset = load("digits")
    assert (dataset.name, dataset.num_classes, dataset.in_channels, dataset.image_size) == ("digits", 10, 1, 8)
    assert dataset.train.inputs.shape == (1437, 1, 8, 8)
    assert dataset.test.inputs.shape == (360, 1, 8, 8)
    inputs, _, _ = dataset.train.batch(torch.arange(1437))
    assert (inputs.min(), inputs.max()) == (-1, 1)
    assert set(((inputs + 1) * 8).unique().tolist()) == set(range(17))
    assert not dataset.train.memorized.any()
    assert torch.equal(dataset.train.labels, dataset.train.true_labels)
    assert torch.equal(dataset.train.indices, torch.arange(1437))


def test_digits_are_divided_once_and_by_class():
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator is what must stay as it was
    first, second = digits(), digits()
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(first.train.inputs, second.train.inputs)
    train, test = (torch.bincount(split.labels) for split in (first.train, first.test))
    assert ((train + test) * 0.2 - test).abs().max() <= 1

    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    both = [(split.inputs.flatten(1) * 16, split.labels) for split in (first.train, first.test)]
    rows = sorted((*pixels.tolist(), int(label)) for part in both for pixels, label in zip(*part, strict=True))
    assert rows == sorted((*pixels.tolist(), int(label)) for pixels, label in zip(flat, labels, strict=True))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn is not installed; run: pip install 'memloc_ext\[study\]'"):
        digits()


@pytest.mark.parametrize("name", ["minst", "", "folder", "folder:", "digits:8"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"one of digits, mnist, cifar10, svhn or folder:PATH, got '{name}'"):
        load(name)


def test_image_size_is_for_folders():
    with pytest.raises(ValueError, match="image_size is for folder:PATH only, got 32 for 'digits'"):
        load("digits", image_size=32)


@pytest.mark.parametrize(
    ("name", "place"),
    [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py"), ("svhn", ".")],
)
def test_missing_files(tmp_path, name, place):
    with pytest.raises(FileNotFoundError, match=r"pass --download \(download=True\) or put .+ there") as error:
        load(name, tmp_path)
    assert str(error.value).startswith(f"{name}: no complete copy in {tmp_path / place};")
    assert not list(tmp_path.iterdir())


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = GENERATOR.integers(256, size=(7, 28, 28), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return raw, pixels


def test_mnist(tmp_path):
    _, pixels = write_mnist(tmp_path)
    dataset = load("mnist", tmp_path)
    for split in (dataset.train, dataset.test):
        assert torch.equal(split.inputs, torch.from_numpy(pixels).unsqueeze(1))
        assert split.labels.tolist() == list(range(7))
    assert dataset.classes == tuple("0123456789")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", [b"", b"\0\0", bytes(16), b"\0\0\x0d\3" + bytes(12), b"\0\0\x08\3" + b"\xff" * 12])
def test_damaged_mnist(tmp_path, name, damage):
    raw, _ = write_mnist(tmp_path)
    (raw / name).write_bytes(damage)
    with pytest.raises(ValueError, match=rf"{name}: must "):
        mnist(tmp_path)


def test_truncated_mnist(tmp_path):
    raw, _ = write_mnist(tmp_path)
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: must hold \(7, 28, 28\) bytes, got 5487"):
        mnist(tmp_path)


@pytest.mark.parametrize(("array", "file"), [
    (np.full(7, 10), "labels-idx1"), (np.arange(6), "labels-idx1"), (np.zeros((7, 28, 27)), "images-idx3"),
])  # fmt: skip
def test_mnist_of_another_kind(tmp_path, array, file):
    raw, _ = write_mnist(tmp_path)
    write_idx(raw / f"t10k-{file}-ubyte", array.astype(np.uint8))
    with pytest.raises(ValueError, match=rf"t10k-{file}-ubyte: must hold"):
        mnist(tmp_path)


def test_cifar10(tmp_path, monkeypatch):
    reader = import_torchvision("datasets").CIFAR10
    for table in ("train_list", "test_list"):  # the checksums of the real files
        monkeypatch.setattr(reader, table, [[name, None] for name, _ in getattr(reader, table)])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": None})
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    pixels = GENERATOR.integers(256, size=(2, 3, 32, 32), dtype=np.uint8)
    for name, _ in reader.train_list + reader.test_list:
        (place / name).write_bytes(pickle.dumps({"data": pixels.reshape(2, -1), "labels": [3, 9]}))
    names = [f"class {label}" for label in range(10)]
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))

    dataset = cifar10(tmp_path)
    assert torch.equal(dataset.train.inputs, torch.from_numpy(pixels).repeat(5, 1, 1, 1))
    assert torch.equal(dataset.test.inputs, torch.from_numpy(pixels))
    assert dataset.train.labels.tolist() == [3, 9] * 5
    assert dataset.classes == tuple(names)


def test_a_pickle_in_place_of_cifar10_is_not_opened(tmp_path):
    reader, place = import_torchvision("datasets").CIFAR10, tmp_path / "cifar-10-batches-py"
    place.mkdir()
    for name, _ in reader.train_list + reader.test_list:
        (place / name).write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "made").encode() + b"'\ntR.")
    with pytest.raises(FileNotFoundError, match=r"data_batch_1, .*, batches\.meta there, which are missing or damaged"):
        cifar10(tmp_path)
    assert not (tmp_path / "made").exists()


def test_svhn(tmp_path, monkeypatch):
    from scipy.io import savemat

    reader = import_torchvision("datasets").SVHN
    files = {part: [url, file, None] for part, (url, file, _) in reader.split_list.items()}
    monkeypatch.setattr(reader, "split_list", files)
    pixels = GENERATOR.integers(256, size=(2, 3, 32, 32), dtype=np.uint8)
    for part in ("train", "test"):  # the files number rows, columns, channels, images, and call the digit 0 "10"
        columns = {"X": pixels.transpose(2, 3, 1, 0), "y": np.array([[10], [4]], dtype=np.uint8)}
        savemat(tmp_path / f"{part}_32x32.mat", columns)

    dataset = svhn(tmp_path)
    assert torch.equal(dataset.train.inputs, torch.from_numpy(pixels))
    assert dataset.train.inputs.is_contiguous()
    assert dataset.test.labels.tolist() == [0, 4]


@pytest.mark.skipif(not REAL, reason="MEMLOC_DATA does not name a folder with the real data")
def test_real_mnist():
    dataset = mnist(REAL)
    assert dataset.train.inputs.shape == (60000, 1, 28, 28)
    assert dataset.test.inputs.shape == (10000, 1, 28, 28)
    assert torch.bincount(dataset.train.labels).tolist()[:3] == [5923, 6742, 5958]
    mean = dataset.train.inputs.double().mean() / 255
    assert abs(mean - 0.1307) < 1e-4  # the mean that everyone normalises MNIST with


@pytest.mark.skipif(not REAL, reason="MEMLOC_DATA does not name a folder with the real data")
def test_real_cifar10_folder():
    dataset = load(f"folder:{Path(str(REAL)) / 'cifar10-jpeg'}")
    assert dataset.train.inputs.shape == (50000, 3, 32, 32)
    assert dataset.train.labels.bincount().tolist() == [5000] * 10
    assert dataset.test.labels.bincount().tolist() == [1000] * 10
    means = dataset.train.inputs.float().mean(dim=(0, 2, 3)) / 255
    assert (means - torch.tensor([0.4914, 0.4822, 0.4465])).abs().max() < 0.005  # of the originals; these are JPEGs
