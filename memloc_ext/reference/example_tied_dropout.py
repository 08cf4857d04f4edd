"""Example-tied dropout, spelled out: the published generator in NumPy and a mask that is multiplied on."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def philox4x32_10(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10 on arrays.

    Args:
        counter: Four 32-bit words each, ``[..., 4]``, held in uint64.
        key: Two 32-bit words each, ``[..., 2]``, held in uint64.

    Returns:
        Four random 32-bit words each, ``[..., 4]``, held in uint64.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key[..., 0], key[..., 1]
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ k0, b & low, (a >> np.uint64(32)) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], axis=-1)


def keep_mask(
    example_ids: Tensor, channels: int, num_generalization: int, p_mem: float, seed: int, site: int = 0
) -> Tensor:
    """Return which channels each example keeps.

    Args:
        example_ids: int64, any shape ``[...]``, at least 0.
        channels: Number of channels of the layer.
        num_generalization: Channels ``0 .. num_generalization - 1`` are kept for every example.
        p_mem: Probability that any other channel is kept, in ``[0, 1]``.
        seed: Any int64.
        site: In ``[0, 2**32)``.

    Returns:
        bool, ``[..., channels]``.
    """
    ids = example_ids.cpu().numpy().astype(np.uint64)[..., None]
    channel = np.arange(channels, dtype=np.uint64)
    four, low, high = np.uint64(4), np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = np.stack(np.broadcast_arrays(channel // four, np.uint64(site), ids & low, ids >> high), axis=-1)
    unsigned_seed = seed % 2**64
    draws = philox4x32_10(counter, np.array([unsigned_seed % 2**32, unsigned_seed >> 32], dtype=np.uint64))
    word = draws[..., np.arange(channels), np.arange(channels) % 4]
    drawn = word < np.uint64(math.ceil(p_mem * 2**32))
    return torch.from_numpy((channel < np.uint64(num_generalization)) | drawn)


def example_tied_dropout(
    x: Tensor,
    example_ids: Tensor,
    num_generalization: int,
    p_mem: float,
    seed: int,
    site: int = 0,
    channel_dim: int = 1,
) -> Tensor:
    """Zero the channels that `keep_mask` does not keep; arguments as in `memloc_ext.ops.example_tied_dropout`."""
    channels = x.shape[channel_dim]
    keep = keep_mask(example_ids, channels, num_generalization, p_mem, seed, site).to(x.device)
    shape = [1] * x.dim()
    shape[: example_ids.dim()] = example_ids.shape
    shape[channel_dim] = channels
    return torch.where(keep.reshape(shape), x, torch.zeros((), dtype=x.dtype, device=x.device))
