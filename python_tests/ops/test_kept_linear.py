from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor
from valid_arguments import VALID, ids

from memloc_ext.ops.kept_products import Kept, add_kept_input_, add_kept_weight_, kept_linear

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = {
    "few": ([3, 1, 0, 7], 5, 9),
    "a tile and a column more": ([17, 16, 33], 40, 33),
    "longer than a chain": ([300, 70], 600, 130),
    "no columns": ([3, 2], 5, 0),
    "no runs": ([], 5, 4),
}


def case(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Kept, Tensor, Tensor, Tensor, Tensor]:
    """Kept channels; mask ``[rows, channels]`` of them; rows ``[rows, n]``; weight ``[channels, n]``; bias."""
    lengths, channels, n = SIZES[name]
    make = torch.Generator().manual_seed(0)
    mask = torch.rand(len(lengths), channels, generator=make) < 0.6
    if len(lengths) > 1:
        mask[1] = False
    tensor = lambda *sizes: torch.randn(sizes, generator=make).to(device, dtype)  # noqa: E731
    rows = mask.repeat_interleave(torch.tensor(lengths, dtype=torch.int64), 0)
    kept = Kept.of(mask.to(device), lengths)
    return kept, rows.to(device), tensor(sum(lengths), n), tensor(channels, n), tensor(channels)


def stored(kept: Kept, dense: Tensor) -> Tensor:
    """The kept ones of values ``[rows, channels]``, as they are stored."""
    values = dense.new_empty(kept.numel)
    for channels, own, rows in kept.runs(values, dense):
        own.copy_(rows[:, channels].t())
    return values


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: torch.dtype, name: str, device: torch.device) -> None:
    kept, mask, rows, weight, bias = case(name, dtype, device)
    exact = [t.double() for t in (rows, weight, bias)]
    for b, by in ((bias, exact[2]), (None, torch.zeros_like(exact[2]))):
        values = kept_linear(rows, weight, b, kept)
        true, magnitude = exact[0] @ exact[1].t() + by, exact[0].abs() @ exact[1].abs().t() + by.abs()
        assert_accurate(values, stored(kept, true), stored(kept, magnitude), rows.shape[1] + 1)
    dense = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    values, before = stored(kept, dense), dense.double() * mask
    for sums, add, left, right in (
        (rows, lambda sums: add_kept_input_(sums, values, weight, kept), before, exact[1]),
        (weight, lambda sums: add_kept_weight_(sums, values, rows, kept), before.t(), exact[0]),
    ):
        result = sums.clone()
        add(result)
        start = sums.double()
        rounded = 1 if sums is rows else len(kept.rows)  # to 16 bits, once or for every run
        if dtype in (torch.float32, torch.float64) or rounded == 1:
            assert_accurate(result, start + left @ right, start.abs() + left.abs() @ right.abs(), left.shape[1] + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_of_matrices_in_larger_ones(dtype: torch.dtype) -> None:
    kept, _, rows, weight, bias = case("longer than a chain", dtype, torch.device("cpu"))

    def around(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (3, 4))

    values = kept_linear(rows, weight, bias, kept)
    assert torch.equal(kept_linear(around(rows)[:, 3:-4], around(weight)[:, 3:-4], bias, kept), values)
    sums, larger = torch.zeros_like(weight), around(torch.zeros_like(weight))
    for to in (sums, larger[:, 3:-4]):
        add_kept_weight_(to, values, rows, kept)
    assert torch.equal(larger, around(sums))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_agree(threads: int) -> None:
    kept, _, rows, weight, bias = case("longer than a chain", torch.float32, torch.device("cpu"))
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            values = kept_linear(rows, weight, bias, kept)
            by_rows, by_weight = torch.zeros_like(rows), torch.zeros_like(weight)
            add_kept_input_(by_rows, values, weight, kept)
            add_kept_weight_(by_weight, values, rows, kept)
            results.append((values, by_rows, by_weight))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 1), (33, 70), (64, 32)])
def test_turned(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(sizes[0], sizes[1] + 2).to(dtype)[:, 1:-1]
    result = torch.ops.memloc_ext.turned(matrix)
    assert torch.equal(result, matrix.t())
    assert result.is_contiguous()


BAD: list[tuple[dict[int, Any], str]] = [
    ({0: torch.randn(7)}, "values must have 8 elements, got 7"),
    ({0: torch.randn(8).half()}, "values must have dtype float32 or float64, got Half"),
    ({1: torch.randn(5, 3).double()}, "dense must have dtype Float, that of values, got Double"),
    ({1: torch.randn(3, 5).t()}, "dense must have its last dimension dense in memory"),
    ({2: torch.randn(4, 2)}, "weight must have as many columns as dense, 3, got 2"),
    ({3: torch.randn(3)}, r"bias must have shape \[4\]"),
    ({4: ids(1, 4, 0)}, r"channels must be in \[0, 4\), got 4"),
    ({4: ids(1, -1, 0)}, r"channels must be in \[0, 4\), got -1"),
    ({4: ids(1, 3, 0).int()}, "channels must have dtype int64, got Int"),
    ({5: [0, 3, 4]}, "rows must ascend from 0 to 5"),
    ({5: []}, "rows must ascend from 0 to 5"),
    ({6: [0, 4, 3]}, "ends must ascend from 0 to 3"),
    ({6: [0, 3]}, "ends must ascend from 0 to 3, as many numbers as rows has"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors(case: int) -> None:
    change, message = BAD[case]
    given = [change.get(place, value) for place, value in enumerate(VALID["kept_linear_"]())]
    with pytest.raises(RuntimeError, match=f"kept_linear_: {message}"):
        torch.ops.memloc_ext.kept_linear_(*given)
