"""Examples with a little noise on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def noisy_copies(x: Tensor, copies: int, noise: float, seeds: Sequence[int]) -> Tensor:
    """Return copies with Gaussian noise on them, ``[examples * copies, *]``.

    Args:
        x: Examples, ``[examples, *]``.
        copies: Of each.
        noise: Norm of the noise over that of the example.
        seeds: Of each example; the same draws wherever in a batch it is.
    """
    found = []
    for example, seed in zip(x, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        draws = torch.randn(copies, *example.shape, generator=generator).to(x)
        norms = draws.flatten(1).norm(dim=1).clamp_min(torch.finfo(draws.dtype).tiny)
        found.append(example + draws * (noise * example.norm() / norms).reshape(-1, *[1] * example.dim()))
    return torch.cat(found)
