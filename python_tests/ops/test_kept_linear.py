from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from valid_arguments import VALID, ids

from memloc_ext.ops._checks import result_dtype
from memloc_ext.ops.kept_products import Kept, add_kept_input_, add_kept_weight_, kept_linear

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = {
    "few": ([3, 1, 0, 7], 5, 9),
    "a tile and a column more": ([17, 16, 33], 40, 33),
    "longer than a chain": ([300, 70], 600, 130),
    "copied 16 bytes at a time": ([72, 8, 136], 200, 264),
    "more runs than a launch takes": ([2] * 100, 3, 5),
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
        mask[-1, : channels // 2] = False
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
    by_weight = weight.to(result_dtype(weight))
    for sums, add, left, right in (
        (rows, lambda sums: add_kept_input_(sums, values, weight, kept), before, exact[1]),
        (by_weight, lambda sums: add_kept_weight_(sums, values, rows, kept), before.t(), exact[0]),
    ):
        result = sums.clone()
        add(result)
        start = sums.double()
        rounded = device.type == "cpu" and result.dtype != dtype  # products of 16 bits, before they are added up
        if not rounded:
            assert_accurate(result, start + left @ right, start.abs() + left.abs() @ right.abs(), left.shape[1] + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_matrices_in_larger_ones(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and dtype not in (torch.float32, torch.float64):
        pytest.skip("no kernel")
    kept, _, rows, weight, bias = case("copied 16 bytes at a time", dtype, device)

    def around(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (3, 4))

    values = kept_linear(rows, weight, bias, kept)
    assert torch.equal(kept_linear(around(rows)[:, 3:-4], around(weight)[:, 3:-4], bias, kept), values)
    sums = torch.zeros_like(weight, dtype=result_dtype(weight))
    larger = around(sums)
    for to in (sums, larger[:, 3:-4]):
        add_kept_weight_(to, values, rows, kept)
    assert torch.equal(larger, around(sums))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lanes_meet_in_no_bank_on_cuda(dtype: torch.dtype, bank_conflicts: Callable[[], tuple[int, int]]) -> None:
    kept, _, rows, weight, bias = case("copied 16 bytes at a time", dtype, torch.device("cuda"))
    values = kept_linear(rows, weight, bias, kept)
    steps = (
        lambda: kept_linear(rows, weight, bias, kept),
        lambda: add_kept_input_(rows, values, weight, kept),
        lambda: add_kept_weight_(weight.float(), values, rows, kept),
    )
    for step in steps:
        bank_conflicts()
        step()
        accesses, repeats = bank_conflicts()
        assert accesses > 0
        assert repeats == 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_that_a_weight_does_not_have_are_zeros_on_cuda(dtype: torch.dtype) -> None:
    def tensor(*sizes: int) -> Tensor:
        return torch.randn(sizes).to("cuda", dtype)

    dense, weight, bias = tensor(5, 3), tensor(4, 3), tensor(4)
    channels, ends = torch.tensor([-(2**62), -1, 2, 4, 2**62], device="cuda"), ([0, 5], [0, 5])
    values, of_channel = tensor(25), slice(10, 15)
    terms = values[of_channel].double()
    sums, by_weight = dense.clone(), torch.zeros_like(weight, dtype=result_dtype(weight))
    torch.ops.memloc_ext.kept_linear_input_(sums, values, weight, channels, *ends)
    torch.ops.memloc_ext.kept_linear_weight_(by_weight, values, dense, channels, *ends)
    assert_accurate(sums, dense.double() + terms.outer(weight[2].double()), 9 + dense.double().abs(), 2)
    assert_accurate(by_weight[2], terms @ dense.double(), terms.abs() @ dense.double().abs(), 5)
    assert not by_weight[[0, 1, 3]].any()
    torch.ops.memloc_ext.kept_linear_(values, dense, weight, bias, channels, *ends)
    exact = dense.double() @ weight[2].double() + bias[2].double()
    assert_accurate(values[of_channel], exact, 9 + exact.abs(), 4)
    values[of_channel] = 0
    assert not values.any()


@pytest.mark.cuda
def test_sums_of_16_bits_on_cuda_are_in_float32() -> None:
    floats, others = VALID["kept_linear_weight_"]()[:3], VALID["kept_linear_weight_"]()[3:]
    given = [*(value.to("cuda", torch.bfloat16) for value in floats), others[0].cuda(), *others[1:]]
    with pytest.raises(RuntimeError, match="weight must have dtype Float, in which it is added up, got BFloat16"):
        torch.ops.memloc_ext.kept_linear_weight_(*given)


class _Names(TorchDispatchMode):
    """Collects the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("dtype", "allowed", "kernel"),
    [
        (torch.float32, True, False),
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
    ],
)
def test_tf32_on_cuda_where_it_is_allowed(dtype: torch.dtype, allowed: bool, kernel: bool) -> None:
    kept, _, rows, weight, bias = case("few", dtype, torch.device("cuda"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        with _Names() as seen:
            kept_linear(rows, weight, bias, kept)
    finally:
        torch.set_float32_matmul_precision(before)
    assert ("memloc_ext.kept_linear_.default" in seen.names) == kernel


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
