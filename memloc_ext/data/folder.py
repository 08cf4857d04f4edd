"""Images of your own, in a folder per class."""

from __future__ import annotations

import os
import warnings
from itertools import chain
from pathlib import Path

import torch

from memloc_ext.data.images import LazyImages, fits, opened
from memloc_ext.data.split import Dataset, Split

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def folder(path: str | Path, image_size: int | None = None) -> Dataset:
    """Load ``path/train/<class>/*`` and ``path/test/<class>/*``, as square RGB images of one size.

    Files are listed as torchvision's ``ImageFolder`` does: classes in alphabetical order, and within each its files in
    alphabetical order, those of folders inside of it too. Files and folders whose names begin with a dot are passed
    over, and so is, with a warning, a class folder without any image.

    All pixels are decoded once into one tensor per split if these take at most half of the free host memory. If not,
    every batch decodes its own images, and a bad file is found only then.

    Args:
        path: The folder that holds ``train`` and ``test``.
        image_size: Side of every image in pixels; by default the longer side of the first training image. An image of
            another size is resized to that square, its two sides each by a factor of their own (bilinear,
            antialiased); nothing is cut off or padded.

    Raises:
        FileNotFoundError: If ``train`` or ``test`` is missing or holds no image.
        ValueError: If the classes of the two differ, ``image_size`` is not positive, or an image cannot be decoded;
            names the file.
        ImportError: If Pillow is not installed.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"folder: image_size must be at least 1, got {image_size}")
    path = Path(path).expanduser()
    listed: list[dict[str, list[str]]] = []
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise FileNotFoundError(f"folder: {path} must hold train/<class>/ and test/<class>/, but has no {part}")
        folders = sorted(e.name for e in os.scandir(path / part) if e.is_dir() and not e.name.startswith("."))
        found = {name: _images(path / part / name) for name in folders}
        listed.append({name: files for name, files in found.items() if files})
        if not listed[-1]:
            raise FileNotFoundError(f"folder: {path / part} must hold images, but none was found")
        if empty := ", ".join(name for name, files in found.items() if not files):
            warnings.warn(f"folder: a class must hold images; {path / part} has none in {empty}", stacklevel=2)
    train, test = listed
    if train.keys() != test.keys():
        different = ", ".join(sorted(train.keys() ^ test.keys()))
        raise ValueError(f"folder: train and test of {path} must have the same classes, but only one has {different}")

    files = [list(chain(*part.values())) for part in listed]
    if image_size is None:
        with opened(files[0][0]) as first:
            image_size = max(first.size)
    images = [LazyImages(tuple(part), image_size, image_size) for part in files]
    whole = fits(sum(part.nbytes for part in images), images[0].device)
    splits = []
    for part, lazy in zip(listed, images, strict=True):
        counts = torch.tensor([len(found) for found in part.values()])
        labels = torch.arange(len(part)).repeat_interleave(counts)
        splits.append(Split.clean(lazy[torch.arange(len(labels))] if whole else lazy, labels))
    return Dataset(f"folder:{path}", splits[0], splits[1], tuple(train))


def _images(place: Path) -> list[str]:
    files = []
    for folder, folders, names in os.walk(place, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (name for name in names if name.lower().endswith(_SUFFIXES) and not name.startswith("."))
        files += [(folder, name) for name in images]
    return [os.path.join(*file) for file in sorted(files)]
