"""Data sets by name. Their packages are imported on first use: ``memloc_ext`` itself needs none of them."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memloc_ext._torchvision import import_torchvision
from memloc_ext.data.folder import folder
from memloc_ext.data.split import Dataset, Normalization, Split
from memloc_ext.files import read_bytes

DIGITS_SEED = 0
"""Names the division of the digits into train and test."""

_TEN_DIGITS = tuple("0123456789")


def digits() -> Dataset:
    """Return the 1,797 handwritten digits, 8 x 8 pixels, that scikit-learn ships: 1,437 to train on, 360 to test.

    The division is fixed (`DIGITS_SEED`) and keeps the share of each class. Pixels 0 .. 16 are scaled to [0, 1].

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("scikit-learn is not installed; run: pip install 'memloc_ext[study]'") from error
    flat, target = load_digits(return_X_y=True)
    pixels = torch.as_tensor(flat / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.as_tensor(target, dtype=torch.int64)
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=target, random_state=DIGITS_SEED)
    train, test = (Split.clean(pixels[rows], labels[rows]) for rows in map(torch.as_tensor, parts))
    return Dataset("digits", train, test, _TEN_DIGITS)


def mnist(root: str | Path = "data", download: bool = False) -> Dataset:
    """Return MNIST, ``[1, 28, 28]``: 60,000 to train on, 10,000 to test.

    Args:
        root: Folder that holds ``MNIST/raw/*-ubyte``.
        download: Fetch what is missing.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If a file is damaged; names it.
        ImportError: If torchvision is not installed.
    """
    place, parts = Path(root) / "MNIST" / "raw", ("train", "t10k")
    files = dict.fromkeys(f"{part}-{kind}-ubyte" for part in parts for kind in ("images-idx3", "labels-idx1"))
    with _complete("mnist", place, files, download):
        if download:
            import_torchvision("datasets").MNIST(root, download=True)
        if _damaged(place, files):
            raise ValueError("not all files are there")
    train, test = (
        _mnist_split(place / f"{part}-images-idx3-ubyte", place / f"{part}-labels-idx1-ubyte") for part in parts
    )
    return Dataset("mnist", train, test, _TEN_DIGITS)


def _mnist_split(images: Path, labels: Path) -> Split:
    pixels, classes = _read_idx(images, 3), _read_idx(labels, 1).long()
    if pixels.shape[1:] != (28, 28):
        raise ValueError(f"{images}: must hold images of 28 x 28 pixels, got {list(pixels.shape)}")
    if len(classes) != len(pixels) or (classes >= len(_TEN_DIGITS)).any():
        raise ValueError(f"{labels}: must hold a label below 10 for each of the {len(pixels)} images")
    return Split.clean(pixels.unsqueeze(1), classes)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an array of uint8: two zeros, its type, its dimensions, a big-endian int32 for each, then its elements."""
    stored, start = read_bytes(path), 4 + 4 * dimensions
    if stored[:4] != bytes([0, 0, 8, dimensions]) or len(stored) < start:
        raise ValueError(f"{path}: must be an idx file of bytes in {dimensions} dimensions, got {stored[:4].hex()}")
    shape = struct.unpack_from(f">{dimensions}I", stored, 4)
    if len(stored) - start != math.prod(shape):
        raise ValueError(f"{path}: must hold {shape} bytes, got {len(stored) - start}")
    return torch.from_numpy(np.frombuffer(stored, np.uint8, offset=start).reshape(shape).copy())


def cifar10(root: str | Path = "data", download: bool = False) -> Dataset:
    """Return CIFAR-10, ``[3, 32, 32]``: 50,000 to train on, 10,000 to test.

    The data set is distributed as pickles. They are opened only if they have the MD5 sums of the originals.

    Args:
        root: Folder that holds ``cifar-10-batches-py/*``, the Python version of the data set.
        download: Fetch what is missing.

    Raises:
        FileNotFoundError: If files are missing or damaged.
        ImportError: If torchvision is not installed.
    """
    make = import_torchvision("datasets").CIFAR10
    files = {**dict(make.train_list), **dict(make.test_list), make.meta["filename"]: make.meta["md5"]}
    with _complete("cifar10", Path(root) / "cifar-10-batches-py", files, download):
        found = [make(root, train=train, download=download) for train in (True, False)]
    train, test = (
        Split.clean(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in found
    )
    return Dataset("cifar10", train, test, tuple(found[0].classes))


def svhn(root: str | Path = "data", download: bool = False) -> Dataset:
    """Return the cropped Street View House Numbers, ``[3, 32, 32]``: 73,257 to train on, 26,032 to test.

    Errors are those of `cifar10`.

    Args:
        root: Folder that holds ``train_32x32.mat`` and ``test_32x32.mat``.
        download: Fetch what is missing.
    """
    make = import_torchvision("datasets").SVHN
    files = {make.split_list[split][1]: make.split_list[split][2] for split in ("train", "test")}
    with _complete("svhn", Path(root), files, download):
        found = [make(root, split, download=download) for split in ("train", "test")]
    train, test = (
        Split.clean(torch.from_numpy(np.ascontiguousarray(part.data)), torch.from_numpy(part.labels)) for part in found
    )
    return Dataset("svhn", train, test, _TEN_DIGITS)


def load(
    name: str,
    root: str | Path = "data",
    download: bool = False,
    image_size: int | None = None,
    normalization: Normalization = "paper",
) -> Dataset:
    """Return a data set by name.

    Args:
        name: ``digits``, ``mnist``, ``cifar10``, ``svhn``, or ``folder:PATH`` for images of your own.
        root: Folder that holds the files of ``mnist``, ``cifar10`` and ``svhn``.
        download: Fetch their files if missing.
        image_size: Side in pixels of the images of ``folder:PATH``, see `folder`.
        normalization: ``paper`` (0.5 and 0.5), ``imagenet``, or mean and standard deviation, see `Split`.

    Raises:
        ValueError: If there is no such name, or ``image_size`` is given for another data set than a folder.
        FileNotFoundError: If files are missing.
        ImportError: If a package is missing.
    """
    kind, _, path = name.partition(":")
    by_name = {"mnist": mnist, "cifar10": cifar10, "svhn": svhn}
    if kind == "folder" and path:
        dataset = folder(path, image_size)
    elif image_size is not None:
        raise ValueError(f"load: image_size is for folder:PATH only, got {image_size} for {name!r}")
    elif name not in ("digits", *by_name):
        raise ValueError(f"load: name must be one of digits, {', '.join(by_name)} or folder:PATH, got {name!r}")
    else:
        dataset = digits() if name == "digits" else by_name[name](root, download)
    return dataset.normalized(normalization)


@contextmanager
def _complete(name: str, place: Path, files: Mapping[str, str | None], download: bool) -> Iterator[None]:
    """Say what to do about files, name to MD5 sum if it is known, that are missing, damaged or truncated."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if download:
            by_hand = f"put {', '.join(files)} into {place} by hand"
            raise OSError(f"{name}: the download failed: {error}; {by_hand}") from error
        raise FileNotFoundError(
            f"{name}: no complete copy in {place}; pass --download (download=True) or put "
            f"{', '.join(_damaged(place, files))} there, which are missing or damaged"
        ) from error


def _damaged(place: Path, files: Mapping[str, str | None]) -> list[str]:
    check = import_torchvision("datasets.utils").check_integrity
    return [name for name, md5 in files.items() if not check(str(place / name), md5)]
