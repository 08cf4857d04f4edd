"""Images of your own, in a folder per class."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from memloc_ext._torchvision import import_torchvision
from memloc_ext.data._memory import fits
from memloc_ext.data.dataset import Dataset
from memloc_ext.data.images import FORMATS, LazyImages
from memloc_ext.data.split import Split
from memloc_ext.files import read_bytes


def folder(path: str | Path, image_size: int | None = None) -> Dataset:
    """Load ``path/train/<class>/*`` and ``path/test/<class>/*``, as RGB.

    Files are listed as torchvision's ``ImageFolder`` does: classes in alphabetical order, and within each its files in
    alphabetical order. All pixels are decoded once into one tensor per split if these take at most half of the free
    host memory. If not, every batch decodes its own images, and a bad file is found only then.

    Args:
        path: The folder that holds ``train`` and ``test``.
        image_size: Side in pixels that every image is resized to; if ``None`` all must have the size of the first.

    Raises:
        FileNotFoundError: If ``train`` or ``test`` is missing or holds no image.
        ValueError: If the classes of the two differ, ``image_size`` is not positive, or an image cannot be decoded or
            differs in size; names the file.
        ImportError: If torchvision is not installed.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"folder: image_size must be at least 1, got {image_size}")
    path = Path(path).expanduser()
    image_folder = import_torchvision("datasets").ImageFolder
    listed = []
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise FileNotFoundError(f"folder: {path} must hold train/<class>/ and test/<class>/, but has no {part}")
        listed.append(image_folder(path / part, allow_empty=True))
        if not listed[-1].samples:
            raise FileNotFoundError(f"folder: {path / part} must hold images, but none was found")
    train, test = listed
    if train.classes != test.classes:
        different = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise ValueError(f"folder: train and test of {path} must have the same classes, but only one has {different}")

    # one list, because the test images too must have the size of the first training image
    images = _images([file for file, _ in train.samples + test.samples], image_size)
    rows = torch.arange(len(images.paths)).split([len(train), len(test)])
    whole = fits(images.nbytes, images.device)
    splits = [
        Split.clean(images[part] if whole else images.subset(part), torch.tensor(found.targets))
        for part, found in zip(rows, listed, strict=True)
    ]
    return Dataset(f"folder:{path}", splits[0], splits[1], tuple(train.classes))


def _images(paths: list[str], image_size: int | None) -> LazyImages:
    if image_size is not None:
        return LazyImages(tuple(paths), image_size, image_size, resize=True)
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_bytes(paths[0])), formats=FORMATS) as image:
            return LazyImages(tuple(paths), image.height, image.width)
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        raise ValueError(f"{paths[0]}: cannot be decoded: {error}") from error
