"""Operators called from many threads at once give what one thread gets."""

import concurrent.futures
from typing import Any

import pytest
import torch
from torch import Tensor
from valid_arguments import VALID, call

import memloc_ext  # noqa: F401

THREADS, CALLS = 8, 25
IN_PLACE = sorted(name for name in VALID if name.endswith("_"))


def larger(values: list[Any]) -> list[Any]:
    """Repeat the arguments of the operators whose batch is the first dimension of all tensors, so that threads meet."""
    return [value.repeat(64, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value for value in values]


@pytest.mark.parametrize("name", sorted(set(VALID) - set(IN_PLACE) - {"plan"}))
def test_threads_do_not_disturb_each_other(name: str) -> None:
    torch.manual_seed(0)
    values = VALID[name]()
    if name in ("channel_saliency", "linear_grad_sqnorm", "conv2d_grad_sqnorm", "example_tied_dropout"):
        values = larger(values)

    def run(_: int) -> list[Tensor]:
        result = call(name, values)
        results = result if isinstance(result, tuple) else (result,)
        return [t for own in results for t in (own if isinstance(own, list) else [own])]

    expected = run(0)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for result in pool.map(run, range(THREADS * CALLS)):
            assert all(torch.equal(t, own) for t, own in zip(result, expected, strict=True))


@pytest.mark.parametrize("name", IN_PLACE)
def test_threads_write_into_tensors_of_their_own(name: str) -> None:
    torch.manual_seed(0)
    _, *values = VALID[name]()

    def run(seed: int) -> Tensor:
        written = torch.full_like(first, float(seed))
        call(name, [written, *values])
        return written

    first = VALID[name]()[0]
    expected = [run(seed) for seed in range(THREADS)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        seeds = [number % THREADS for number in range(THREADS * CALLS)]
        for seed, written in zip(seeds, pool.map(run, seeds), strict=True):
            assert torch.equal(written, expected[seed])
