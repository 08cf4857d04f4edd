"""A convolution behind example-tied dropout, spelled out: every channel is computed, and most are zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memloc_ext.reference.example_tied_dropout import example_tied_dropout


def example_tied_conv2d(
    x: Tensor,
    example_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    num_generalization: int,
    p_mem: float,
    seed: int,
    site: int = 0,
) -> Tensor:
    """Return ``[batch, out, rows, columns]``; arguments as in `memloc_ext.ops.example_tied_conv2d`."""
    kept = example_tied_dropout(x, example_ids, num_generalization, p_mem, seed, site)
    return torch.conv2d(kept, weight, bias, stride, padding, dilation, groups)
