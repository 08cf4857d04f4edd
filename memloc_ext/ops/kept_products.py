"""Products of rows with the weights that their run keeps: a layer, and its gradients, restricted to some channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from memloc_ext.ops._checks import result_dtype

_linear = torch.ops.memloc_ext.kept_linear_.default
_linear_input = torch.ops.memloc_ext.kept_linear_input_.default
_linear_weight = torch.ops.memloc_ext.kept_linear_weight_.default


def _has_kernel(values: Tensor, *matrices: Tensor) -> bool:
    dense = all(t.shape[1] <= 1 or t.stride(1) == 1 for t in matrices)
    if values.is_cuda:  # whose kernels multiply float32 without TF32
        return dense and not (values.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32")
    return dense and values.dtype in (torch.float32, torch.float64)


@dataclass(frozen=True)
class Kept:
    """Which channels each run of rows keeps.

    Values of kept channels are stored run after run, ``[channels of the run, rows of the run]`` each.

    Args:
        rows: Where each run of rows ends, after a first 0: runs + 1 numbers.
        ends: Where each run's channels end, after a first 0: runs + 1 numbers.
        channels: All runs' channels, one run after the other, ascending in each; int64.
    """

    rows: list[int]
    ends: list[int]
    channels: Tensor

    @classmethod
    def of(cls, mask: Tensor, lengths: list[int]) -> Kept:
        """Return the channels of a mask ``[runs, channels]``, whose runs have so many rows each."""
        counts = mask.sum(1).tolist()
        return cls([0, *accumulate(lengths)], [0, *accumulate(counts)], mask.nonzero()[:, 1])

    @property
    def arguments(self) -> tuple[Tensor, list[int], list[int]]:
        """What operators take."""
        return self.channels, self.rows, self.ends

    @property
    def numel(self) -> int:
        """How many values are stored for all runs."""
        return sum(
            (c - b) * (r - q) for q, r, b, c in zip(self.rows, self.rows[1:], self.ends, self.ends[1:], strict=False)
        )

    def runs(self, values: Tensor, dense: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each run's channels, values ``[channels, rows]`` and rows of a dense tensor ``[rows, n]``."""
        at = 0
        for first, last, begin, end in zip(self.rows, self.rows[1:], self.ends, self.ends[1:], strict=False):
            size = (end - begin) * (last - first)
            if size:
                yield self.channels[begin:end], values[at : at + size].view(end - begin, -1), dense[first:last]
            at += size


def kept_linear(input: Tensor, weight: Tensor, bias: Tensor | None, kept: Kept) -> Tensor:
    """Return ``weight[channels] @ input[rows].T + bias[channels]`` of each run, stored as `Kept` says.

    Args:
        input: ``[rows, n]``.
        weight: ``[channels, n]``.
        bias: ``[channels]`` or None.
        kept: What each run keeps.
    """
    values = input.new_empty(kept.numel)
    if _has_kernel(values, input, weight):
        _linear(values, input, weight, bias, *kept.arguments)
        return values
    for channels, own, rows in kept.runs(values, input):
        if bias is None:
            torch.mm(weight[channels], rows.t(), out=own)
        else:
            torch.addmm(bias[channels, None], weight[channels], rows.t(), out=own)
    return values


def add_kept_input_(sums: Tensor, values: Tensor, weight: Tensor, kept: Kept) -> None:
    """Add ``values.T @ weight[channels]`` of each run to its rows of ``sums [rows, n]``; ``weight [channels, n]``."""
    if _has_kernel(values, sums, weight):
        _linear_input(sums, values, weight, *kept.arguments)
        return
    for channels, own, rows in kept.runs(values, sums):
        rows.addmm_(own.t(), weight[channels])


def add_kept_weight_(sums: Tensor, values: Tensor, input: Tensor, kept: Kept) -> None:
    """Add ``values @ input[rows]`` of each run, in their order, to its channels of ``sums [channels, n]``.

    A run has a channel once, so that no two terms meet in a call: the same bits every time, on CUDA too. 16-bit terms
    are best added up in float32.
    """
    if _has_kernel(values, sums, input) and sums.dtype == result_dtype(values):
        _linear_weight(sums, values, input, *kept.arguments)
        return
    for channels, own, rows in kept.runs(values, input):
        sums.index_add_(0, channels, (own @ rows).to(sums.dtype))
