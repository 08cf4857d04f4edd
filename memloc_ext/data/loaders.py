"""Data sets by name. Their packages are imported on first use: ``memloc_ext`` itself needs torch and numpy only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from memloc_ext._torchvision import import_torchvision
from memloc_ext.data.dataset import Dataset
from memloc_ext.data.folder import folder
from memloc_ext.data.split import Split

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
        FileNotFoundError: If files are missing or damaged.
        ImportError: If torchvision is not installed.
    """
    make = import_torchvision("datasets").MNIST
    with _complete("mnist", Path(root) / "MNIST" / "raw", "the four *-ubyte files", download):
        found = [make(root, train=train, download=download) for train in (True, False)]
    train, test = (Split.clean(part.data.unsqueeze(1), part.targets) for part in found)
    return Dataset("mnist", train, test, _TEN_DIGITS)


def cifar10(root: str | Path = "data", download: bool = False) -> Dataset:
    """Return CIFAR-10, ``[3, 32, 32]``: 50,000 to train on, 10,000 to test.

    Args:
        root: Folder that holds ``cifar-10-batches-py/*``, the Python version of the data set.
        download: Fetch what is missing.

    Raises:
        FileNotFoundError: If files are missing or damaged.
        ImportError: If torchvision is not installed.
    """
    make = import_torchvision("datasets").CIFAR10
    place = Path(root) / "cifar-10-batches-py"
    with _complete("cifar10", place, "data_batch_1 .. 5, test_batch and batches.meta", download):
        found = [make(root, train=train, download=download) for train in (True, False)]
    train, test = (
        Split.clean(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in found
    )
    return Dataset("cifar10", train, test, tuple(found[0].classes))


def svhn(root: str | Path = "data", download: bool = False) -> Dataset:
    """Return the cropped Street View House Numbers, ``[3, 32, 32]``: 73,257 to train on, 26,032 to test.

    Args:
        root: Folder that holds ``train_32x32.mat`` and ``test_32x32.mat``.
        download: Fetch what is missing.

    Raises:
        FileNotFoundError: If files are missing or damaged.
        ImportError: If torchvision is not installed.
    """
    make = import_torchvision("datasets").SVHN
    with _complete("svhn", Path(root), "train_32x32.mat and test_32x32.mat", download):
        found = [make(root, split, download=download) for split in ("train", "test")]
    train, test = (
        Split.clean(torch.from_numpy(np.ascontiguousarray(part.data)), torch.from_numpy(part.labels)) for part in found
    )
    return Dataset("svhn", train, test, _TEN_DIGITS)


def load(name: str, root: str | Path = "data", download: bool = False, image_size: int | None = None) -> Dataset:
    """Return a data set by name.

    Args:
        name: ``digits``, ``mnist``, ``cifar10``, ``svhn``, or ``folder:PATH`` for images of your own.
        root: Folder that holds the files of ``mnist``, ``cifar10`` and ``svhn``.
        download: Fetch their files if missing.
        image_size: Side in pixels to resize the images of ``folder:PATH`` to.

    Raises:
        ValueError: If there is no such name, or ``image_size`` is given for another data set than a folder.
        FileNotFoundError: If files are missing.
        ImportError: If a package is missing.
    """
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        return folder(path, image_size)
    if image_size is not None:
        raise ValueError(f"load: image_size is for folder:PATH only, got {image_size} for {name!r}")
    if name == "digits":
        return digits()
    by_name = {"mnist": mnist, "cifar10": cifar10, "svhn": svhn}
    if name not in by_name:
        raise ValueError(f"load: name must be one of digits, {', '.join(by_name)} or folder:PATH, got {name!r}")
    return by_name[name](root, download)


@contextmanager
def _complete(name: str, place: Path, files: str, download: bool) -> Iterator[None]:
    """Say what to do about files that torchvision finds missing, damaged or truncated."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        if download:
            raise OSError(f"{name}: the download failed: {error}; put {files} into {place} by hand") from error
        raise FileNotFoundError(
            f"{name}: no complete copy in {place}; pass --download (download=True) or put {files} there"
        ) from error
