"""Image files that stand in for the tensor of their pixels."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memloc_ext.files import read_bytes

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What an image may be, whatever its name: Pillow hands other formats, such as EPS, to other programs."""


@dataclass(frozen=True, eq=False)
class LazyImages:
    """RGB images of one size that are decoded, on the host, when they are indexed.

    Has the part of a tensor's interface that `memloc_ext.data.Split` needs. Colour spaces are converted to
    RGB; transparency is dropped.

    Attributes:
        paths: The N image files.
        height: Pixels of every image.
        width: Pixels of every image.
        resize: Resize an image of another size (bilinear, antialiased) instead of raising.
    """

    paths: tuple[str, ...]
    height: int
    width: int
    resize: bool = False

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
        return LazyImages(tuple(self.paths[row] for row in rows.tolist()), self.height, self.width, self.resize)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Decode the images at ``rows``, ``[B]`` int64, to ``[B, 3, height, width]`` uint8.

        Raises:
            ValueError: If a file is no image, is damaged, has more than 8 bits per channel or has another size.
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
        from PIL import Image

        size = (self.width, self.height)
        try:
            with Image.open(io.BytesIO(read_bytes(path)), formats=FORMATS) as image:
                # conversion to RGB would clip these at 255
                if image.mode[0] in "IF":
                    raise ValueError(f"more than 8 bits per channel (Pillow mode {image.mode})")
                if self.resize and image.size != size:
                    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
                if image.size == size:
                    return np.asarray(image.convert("RGB"))
                found = image.size
        except Exception as error:  # a damaged file can raise nearly anything in a decoder
            raise ValueError(f"{path}: cannot be decoded: {error}") from error
        raise ValueError(
            f"{path}: is {found[0]} x {found[1]} pixels where {size[0]} x {size[1]} were expected; "
            "give image_size to resize every image"
        )
