"""Operators called from many threads at once give what one thread gets."""

import concurrent.futures
from typing import Any

import pytest
import torch
from torch import Tensor
from valid_arguments import VALID, call

import memloc_ext  # noqa: F401

THREADS, CALLS = 8, 25


def larger(values: list[Any]) -> list[Any]:
    """Repeat the arguments of the operators whose batch is the first dimension of all tensors, so that threads meet."""
    return [value.repeat(64, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value for value in values]


@pytest.mark.parametrize("name", sorted(set(VALID) - {"ablate_channels_", "plan"}))
def test_threads_do_not_disturb_each_other(name: str) -> None:
    torch.manual_seed(0)
    values = VALID[name]()
    if name in ("channel_saliency", "linear_grad_sqnorm", "conv2d_grad_sqnorm", "example_tied_dropout"):
        values = larger(values)

    def run(_: int) -> list[Tensor]:
        result = call(name, values)
        return list(result) if isinstance(result, tuple) else [result]

    expected = run(0)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for result in pool.map(run, range(THREADS * CALLS)):
            assert all(torch.equal(t, own) for t, own in zip(result, expected, strict=True))


def test_threads_write_into_tensors_of_their_own() -> None:
    make = VALID["ablate_channels_"]

    def call(seed: int) -> tuple[Tensor, Tensor]:
        values = make()
        values[0] = torch.full((2, 4, 3), float(seed))
        expected = torch.ops.memloc_ext.ablate_channels(*values)
        torch.ops.memloc_ext.ablate_channels_(*values)
        return values[0], expected

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for changed, expected in pool.map(call, range(THREADS * CALLS)):
            assert torch.equal(changed, expected)
