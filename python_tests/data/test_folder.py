import io
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from memloc_ext._torchvision import import_torchvision
from memloc_ext.data import LazyImages, folder, load, with_label_noise
from memloc_ext.data import images as image_files


def write(path, size=(6, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(zlib.crc32(path.name.encode()))
    pixels = generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def images(tmp_path):
    """Two classes, with three training and one test image each; pixels by (split, row)."""
    pixels = {}
    for part, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                pixels[part, label * count + number] = write(tmp_path / part / name / f"{part}{label}{number}.png")
    return tmp_path, pixels


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(image_files, "free_bytes", lambda device: 100)


def assert_holds(dataset, pixels):
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 1]
    for (part, row), expected in pixels.items():
        image, _, index = getattr(dataset, part)[row]
        assert index == row
        assert torch.equal(image, (torch.tensor(expected).permute(2, 0, 1).float() / 255 - 0.5) / 0.5)


def test_images_are_decoded_into_one_tensor(images):
    path, pixels = images
    dataset = load(f"folder:{path}")
    assert isinstance(dataset.train.inputs, torch.Tensor)
    assert dataset.train.inputs.dtype == torch.uint8
    assert dataset.train.inputs.shape == (6, 3, 6, 6)
    assert dataset.name == f"folder:{path}"
    assert_holds(dataset, pixels)


def test_images_stay_files_if_memory_is_short(images, little_memory):
    path, pixels = images
    dataset = folder(path)
    assert isinstance(dataset.train.inputs, LazyImages)
    assert dataset.train.inputs.shape == (6, 3, 6, 6)
    assert_holds(dataset, pixels)
    part = dataset.train.subset(torch.tensor([5, 0])).to("cpu")
    assert isinstance(part.inputs, LazyImages)
    assert part.indices.tolist() == [5, 0]
    inputs, labels, _ = part.batch(torch.tensor([0, 1]))
    assert torch.equal(inputs[0], dataset.train[5][0])
    assert labels.tolist() == [1, 0]
    assert [len(labels) for _, labels, _ in dataset.train.batches(4)] == [4, 2]


def test_grey_and_transparent_images_become_rgb(images):
    path, _ = images
    grey = write(path / "train" / "dog" / "z1.png", mode="L")
    clear = write(path / "train" / "dog" / "z2.png", mode="RGBA")
    inputs = folder(path).train.inputs
    assert torch.equal(inputs[6].permute(1, 2, 0), torch.tensor(grey))
    assert torch.equal(inputs[7].permute(1, 2, 0), torch.tensor(clear))


@pytest.mark.parametrize("memory", [100, 2**30])
@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=5), side=st.integers(1, 9))
def test_images_of_any_size_are_resized(memory, sizes, side):
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "free_bytes", lambda device: memory)
        parts = ["train"] + ["test"] * (len(sizes) - 1)
        pixels = [
            write(Path(path, part, "cat", f"{row}.png"), size)
            for row, (part, size) in enumerate(zip(parts, sizes, strict=True))
        ]
        for asked in (None, side):
            dataset = folder(path, asked)
            assert dataset.image_size == (asked or max(sizes[0]))
            images = [image for split in (dataset.train, dataset.test) for image, *_ in split]
            for image, original in zip(images, pixels, strict=True):
                expected = torch.tensor(original).permute(2, 0, 1)[None].double()
                expected = F.interpolate(expected, [dataset.image_size] * 2, mode="bilinear", antialias=True)[0]
                # each of two passes rounds to an integer
                assert ((image.double() + 1) * 127.5 - expected).abs().max() <= 1.01


def test_hidden_or_empty_folders_are_no_class_and_hidden_files_no_images(images):
    path, pixels = images
    for part in ("train", "test"):
        (path / part / ".ipynb_checkpoints").mkdir()
        write(path / part / ".thumbnails" / "0.png")
        write(path / part / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
        (path / part / "cat" / "._0.png").write_bytes(b"Mac OS X")
        (path / part / "cat" / "notes.txt").write_text("no image")
        (path / part / "eel").mkdir()
        (path / part / "__MACOSX").mkdir()
        (path / part / "__MACOSX" / "._0.png").write_bytes(b"Mac OS X")
    with pytest.warns(UserWarning, match=r"a class must hold images; .*(train|test) has none in __MACOSX, eel"):
        dataset = folder(path)
    assert_holds(dataset, pixels)
    noisy = with_label_noise(dataset, 1.0, seed=0)
    assert noisy.train.labels.tolist() == [1, 1, 1, 0, 0, 0]


NAMES = st.sampled_from(["a", "a-b", "a.b", "B", "c d"])
FILES = st.tuples(NAMES, st.lists(NAMES, max_size=2).map("/".join), st.sampled_from(["0.png", "1.JPG", "a.webp"]))


@settings(deadline=None, max_examples=15)
@given(files=st.sets(FILES, min_size=1))
def test_files_are_listed_as_torchvision_does(files):
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "free_bytes", lambda device: 0)
        Image.new("RGB", (1, 1)).save(png := io.BytesIO(), format="PNG")
        for part in ("train", "test"):
            for file in files:
                place = Path(path, part, *file)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(png.getvalue())
        dataset = folder(path)
        for part in ("train", "test"):
            expected = import_torchvision("datasets").ImageFolder(f"{path}/{part}")
            split = getattr(dataset, part)
            assert list(zip(split.inputs.paths, split.labels.tolist(), strict=True)) == expected.samples
            assert dataset.classes == tuple(expected.classes)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"no image"])
@pytest.mark.parametrize("name", ["train/cat/train00.png", "train/dog/train10.png", "test/dog/test10.png"])
def test_a_damaged_image_is_named(images, damage, name):
    path, _ = images
    bad = path / name
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(ValueError, match="cannot be decoded") as error:
        folder(path)
    assert str(bad) in str(error.value)


def test_a_damaged_image_is_named_when_its_batch_is_decoded(images, little_memory):
    path, _ = images
    bad = path / "train/dog/train10.png"
    bad.write_bytes(b"no image")
    dataset = folder(path)
    dataset.train.batch(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"train10.png: cannot be decoded"):
        dataset.train.batch(torch.tensor([0, 3]))


def test_a_format_that_other_programs_would_read_is_refused(images):
    path, _ = images
    Image.new("RGB", (6, 6)).save(path / "train" / "dog" / "zz.png", format="EPS")
    message = r"[^<]*zz.png: cannot be decoded: cannot identify image file; must be BMP, .* or WEBP"
    with pytest.raises(ValueError, match=rf"^{message}$"):
        folder(path)


def test_deep_colour_is_refused_rather_than_clipped(images):
    path, _ = images
    Image.fromarray(np.full((6, 6), 40000, dtype=np.uint16)).save(path / "train" / "dog" / "zz.png")
    with pytest.raises(
        ValueError, match=r"zz.png: cannot be decoded: more than 8 bits per channel \(Pillow mode I;16\)"
    ):
        folder(path)


def test_classes_must_agree(images):
    path, _ = images
    write(path / "train" / "eel" / "0.png")
    write(path / "test" / "fox" / "0.png")
    with pytest.raises(ValueError, match="must have the same classes, but only one has eel, fox"):
        folder(path)


def test_missing_parts(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold train/<class>/ and test/<class>/, but has no train"):
        folder(tmp_path)
    write(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(FileNotFoundError, match="but has no test"):
        folder(tmp_path)
    (tmp_path / "test" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="test must hold images, but none was found"):
        folder(tmp_path)


def test_image_size_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="folder: image_size must be at least 1, got 0"):
        folder(tmp_path, image_size=0)
