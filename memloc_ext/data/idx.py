"""The format of MNIST's files."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memloc_ext.files import read_bytes

_UINT8 = 8


def read_idx(path: str | Path, dimensions: int) -> Tensor:
    """Read an array of uint8: two zeros, its type, its dimensions, a big-endian int32 for each, then its elements.

    Args:
        path: The file, not compressed.
        dimensions: What the array must have.

    Raises:
        ValueError: If the file is something else or not whole; names it. Nothing in it tells whether a pixel is right.
        OSError: If it cannot be read, such as FileNotFoundError.
    """
    stored, start = read_bytes(path), 4 + 4 * dimensions
    if stored[:4] != bytes([0, 0, _UINT8, dimensions]) or len(stored) < start:
        raise ValueError(f"{path}: must be an idx file of bytes in {dimensions} dimensions, got {stored[:4].hex()}")
    shape = struct.unpack_from(f">{dimensions}I", stored, 4)
    if len(stored) - start != math.prod(shape):
        raise ValueError(f"{path}: must hold {shape} bytes, got {len(stored) - start}")
    return torch.from_numpy(np.frombuffer(stored, np.uint8, offset=start).reshape(shape).copy())
