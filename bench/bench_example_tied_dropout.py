"""Example-tied dropout against a copy of its input, a gathered table of masks, and standard dropout.

The bound is traffic: the kernel reads the share of x that it keeps and writes y, where a copy reads and writes all. On
a CPU a large new output also costs a page fault per page, 4 KiB for ``clone`` and, where the system grants them, 2 MiB
for ours; a copy into memory that was used before has none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu_time import GpuCase
from bench.measure import interleaved, ratios
from memloc_ext.ops import example_tied_dropout
from memloc_ext.reference import example_tied_dropout as reference

P_GEN, P_MEM, SEED = 0.2, 0.1, 0
EXAMPLES = 60_000  # rows of the table of masks that the peer gathers from: a data set like MNIST


@dataclass(frozen=True)
class Case:
    """An input: shape, dtype, and ``nchw``, ``nhwc`` (channels-last memory) or ``tokens`` ([B, T, C], an id each)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    form: str

    def __str__(self) -> str:
        return f"{self.form}-{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}"

    def inputs(self, device: str) -> tuple[Tensor, Tensor]:
        """Return x and example ids."""
        x = torch.randn(self.shape, device=device).to(self.dtype)
        if self.form == "nhwc":
            x = x.contiguous(memory_format=torch.channels_last)
        ids = self.shape[:2] if self.form == "tokens" else self.shape[:1]
        return x, torch.randint(EXAMPLES, ids, device=device)

    @property
    def channel_dim(self) -> int:
        """Dimension of the channels."""
        return -1 if self.form == "tokens" else 1

    @property
    def settings(self) -> tuple[int, float, int, int, int]:
        """The operator's arguments after x and ids."""
        return int(P_GEN * self.shape[self.channel_dim]), P_MEM, SEED, 0, self.channel_dim


CASES = [
    Case((256, 256, 16, 16), torch.float32, "nchw"),
    Case((256, 256, 16, 16), torch.bfloat16, "nchw"),
    Case((256, 256, 16, 16), torch.float32, "nhwc"),
    Case((512, 256, 4, 4), torch.float32, "nchw"),
    Case((32, 512, 1024), torch.float32, "tokens"),
]


def check(case: Case, x: Tensor, ids: Tensor) -> None:
    """Fail unless the operator gives exactly what the reference gives."""
    actual = example_tied_dropout(x, ids, *case.settings)
    if not torch.equal(actual, reference.example_tied_dropout(x, ids, *case.settings)):
        raise AssertionError(f"example_tied_dropout differs from its reference on {case}")


def kept_share(case: Case, ids: Tensor, together: int = 1) -> float:
    """Return the share of x that is read, if so many neighbouring channels are read where one of them is kept."""
    kept, p_mem, seed, site, dim = case.settings
    keep = reference.keep_mask(ids, case.shape[dim], kept, p_mem, seed, site)
    return keep.unflatten(-1, (-1, together)).any(-1).double().mean().item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_example_tied_dropout(case: Case, benchmark: Any) -> None:
    torch.manual_seed(0)
    x, ids = case.inputs("cpu")
    check(case, x, ids)
    channels = case.shape[case.channel_dim]
    some = torch.arange(EXAMPLES).split(4096)  # the reference needs room
    table = torch.cat([reference.keep_mask(e, channels, case.settings[0], P_MEM, SEED).to(case.dtype) for e in some])
    view = [n if d < ids.dim() else 1 for d, n in enumerate(case.shape)]
    view[case.channel_dim] = channels
    used = torch.empty_like(x)
    times = interleaved(
        {
            "ours": lambda: example_tied_dropout(x, ids, *case.settings),
            "clone": x.clone,
            "clone into used memory": lambda: used.copy_(x),
            "mask table": lambda: x * table[ids].view(view),
            "nn.Dropout": lambda: torch.nn.functional.dropout(x, 0.5),
        }
    )
    benchmark.extra_info["time over"] = ratios(times, "ours")
    benchmark.extra_info["bytes over clone's"] = round((1 + kept_share(case, ids)) / 2, 3)
    benchmark.pedantic(example_tied_dropout, (x, ids, *case.settings), rounds=5)


def gpu_cases(tiny: bool) -> Iterator[GpuCase]:
    """Yield for `bench.gpu` what to time beside a copy, on inputs larger than the L2 cache, or on tiny ones."""
    for case in (*CASES, Case((256, 256, 16, 16), torch.bfloat16, "nhwc")):
        shape = (2, *(min(n, 32) for n in case.shape[1:])) if tiny else (4 * case.shape[0], *case.shape[1:])
        large = replace(case, shape=shape)
        # memory is read in sectors of 32 bytes, which in channels-last hold neighbouring channels
        sector = 1 if case.form == "nchw" else 32 // case.dtype.itemsize
        yield GpuCase(
            f"example_tied_dropout {large}",
            large.inputs,
            functools.partial(check, large),
            lambda x, ids, case=large: torch.ops.memloc_ext.example_tied_dropout(x, ids, *case.settings),
            lambda x, ids: x.clone(),
            lambda x, ids, case=large, n=sector: (x.nbytes * (1 + kept_share(case, ids, n)), 2 * x.nbytes),
            at_least=0.85,
        )
