"""Image files that stand in for the tensor of their pixels."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from memloc_ext.files import read_bytes

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What an image may be, whatever its name: Pillow hands other formats, such as EPS, to other programs."""


@dataclass(frozen=True, eq=False)
class LazyImages:
    """RGB images of one size that are decoded, on the host, when they are indexed.

    Has the part of a tensor's interface that `memloc_ext.data.Split` needs. Colour spaces are converted to
    RGB; transparency is dropped. An image of another size is resized (bilinear, antialiased).

    Attributes:
        paths: The N image files.
        height: Pixels of every image.
        width: Pixels of every image.
    """

    paths: tuple[str, ...]
    height: int
    width: int

    dtype = torch.uint8
    device = torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        """``[N, 3, height, width]``."""
        return torch.Size((len(self.paths), 3, self.height, self.width))

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels, decoded."""
        return self.shape.numel()

    def subset(self, rows: Tensor) -> LazyImages:
        """Return the images at ``rows``, ``[B]`` int64, without decoding any."""
        return LazyImages(tuple(self.paths[row] for row in rows.tolist()), self.height, self.width)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Decode the images at ``rows``, ``[B]`` int64, to ``[B, 3, height, width]`` uint8.

        Raises:
            ValueError: If a file is no image, is damaged or has more than 8 bits per channel.
        """
        chosen = self.subset(rows)
        pixels = torch.empty(chosen.shape, dtype=self.dtype)
        array = pixels.numpy()

        def store(row: int) -> None:
            array[row] = chosen._decode(chosen.paths[row]).transpose(2, 0, 1)

        with ThreadPoolExecutor() as pool:  # Pillow reads and decodes without holding the interpreter lock
            for _ in pool.map(store, range(len(array))):
                pass  # in order, so that the error raised is that of the first bad file
        return pixels

    def _decode(self, path: str) -> np.ndarray:
        from PIL.Image import Resampling

        size = (self.width, self.height)
        with opened(path) as image:
            if image.mode[0] in "IF":  # conversion to RGB would clip these at 255
                raise ValueError(f"more than 8 bits per channel (Pillow mode {image.mode})")
            pixels = image.convert("RGB")
            return np.asarray(pixels if pixels.size == size else pixels.resize(size, Resampling.BILINEAR))


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Open an image file, and tell its name with whatever goes wrong inside the ``with``.

    Raises:
        ValueError: If it is no image or damaged.
        ImportError: If Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("Pillow is not installed; run: pip install 'memloc_ext[study]'") from error
    try:
        with Image.open(io.BytesIO(read_bytes(path)), formats=_FORMATS) as image:
            yield image
    except UnidentifiedImageError:  # its message shows the object that held the bytes
        formats = f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
        raise ValueError(f"{path}: cannot be decoded: cannot identify image file; must be {formats}") from None
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        raise ValueError(f"{path}: cannot be decoded: {error}") from error


def fits(num_bytes: int, device: torch.device) -> bool:
    """Return whether ``num_bytes`` take at most half of the memory that is free on ``device``.

    The other half is for the model and its activations. Devices other than CUDA are taken to share the host's memory.
    """
    return 2 * num_bytes <= free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that the driver (CUDA) or the operating system reports as available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kib = dict(line.split()[:2] for line in lines)
        return 1024 * int(kib["MemAvailable:"])
    except (OSError, KeyError):  # not Linux: all of the memory is the closest that the standard library can tell
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
