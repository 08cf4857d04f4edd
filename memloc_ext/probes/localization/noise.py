"""Examples with a little noise on them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def noisy_copies(x: Tensor, copies: int, noise: float, seeds: Sequence[int]) -> Tensor:
    """Return copies, with Gaussian noise on them if they are floating, ``[examples * copies, *]``.

    Args:
        x: Of examples, ``[examples, *]``.
        copies: Of each.
        noise: Norm of the noise over that of the example.
        seeds: Of each example; the same draws wherever in a batch it is.
    """
    if noise == 0 or not x.is_floating_point():
        return x.repeat_interleave(copies, 0)
    found = []
    for example, seed in zip(x, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(copies, *example.shape, generator=generator).to(x)
        norms = draws.flatten(1).norm(dim=1).clamp_min(torch.finfo(draws.dtype).tiny)
        found.append(example + draws * (noise * example.norm() / norms).reshape(-1, *[1] * example.dim()))
    return torch.cat(found)


def seeds_of(tensors: Sequence[Tensor], seed: int) -> list[int]:
    """Return a seed for each example, that depends on nothing but its tensors, ``[examples, *]``, and ``seed``."""
    checks = [0] * len(tensors[0])
    for t in tensors:
        for i, example in enumerate(t):
            content = example.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
            checks[i] = zlib.crc32(content, checks[i])
    return [(seed * 1_000_003 + check) % (1 << 63) for check in checks]
