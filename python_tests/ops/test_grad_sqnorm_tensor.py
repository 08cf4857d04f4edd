"""The direct way on tensor cores, and the operators of groups on CUDA, against float64.

Sizes lie around those of its tiles (64 and 128 outputs, 128 columns), of what is copied at once (8 channels) and of a
slice (32 positions, three of which are in shared memory).
"""

import pytest
import torch
from accuracy import assert_accurate
from test_grad_sqnorm import assert_conv2d_norms, assert_linear_norms, geometries, output, wide_pairs
from test_grad_sqnorm_cuda import LAST, SAME, check_conv2d, check_linear
from torch import Tensor

from memloc_ext.ops import (
    conv2d_grad_sqnorm,
    conv2d_grad_sqnorm_groups,
    linear_grad_sqnorm,
    linear_grad_sqnorm_groups,
)
from memloc_ext.reference import grad_sqnorm as reference

pytestmark = pytest.mark.cuda

HALVES = [torch.float16, torch.bfloat16]
LINEAR_OP = torch.ops.memloc_ext.linear_grad_sqnorm_groups.default
CONV2D_OP = torch.ops.memloc_ext.conv2d_grad_sqnorm_groups.default


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, last: bool = False) -> Tensor:
    t = torch.randn(shape).to(dtype)
    return (t.to(memory_format=LAST) if last else t).cuda()


# norms


@pytest.mark.parametrize("positions", [31, 32, 33, 64, 96, 97])
def test_linear(positions: int) -> None:
    torch.manual_seed(0)
    for outputs, inputs in ((8, 8), (64, 128), (72, 136), (120, 16), (136, 24)):
        check_linear(randn(3, positions, inputs), randn(3, positions, outputs), "direct")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("last", [False, True])
def test_conv2d(last: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for channels, outputs, groups in ((3, 16, 1), (16, 72, 1), (40, 24, 1), (32, 48, 2), (20, 68, 2)):
        x, g = randn(2, channels, 7, 9, dtype=dtype, last=last), randn(2, outputs, 7, 9, dtype=dtype, last=last)
        check_conv2d(x, g, "direct", *SAME, groups)


def test_conv2d_geometries() -> None:
    torch.manual_seed(0)
    checked = 0
    for geometry in geometries():
        x = randn(2, 16, 11, 8, last=True)
        g = output(x.float(), 8, *geometry)
        if g is not None and geometry[-1] == 1:
            check_conv2d(x, g.bfloat16().to(memory_format=LAST), "direct", *geometry)
            checked += 1
    assert checked > 15


def test_operands_that_lie_in_other_ways_are_copied() -> None:
    torch.manual_seed(0)
    x, g = randn(3, 24, 6, 12, last=True), randn(3, 32, 6, 12, last=True)
    wide = randn(3, 25, 6, 12, last=True)
    for other in (wide[:, 1:], wide[:, :24], randn(3, 24, 7, 13, last=True)[:, :, 1:, 1:], x[:1].expand(3, -1, -1, -1)):
        check_conv2d(other, g, "direct", *SAME, 1)
    taller = randn(3, 32, 6, 16, last=True)[..., :12]  # rows of g that do not follow each other
    for other in (taller, randn(3, 32, 12, 6).transpose(2, 3), g.contiguous()):
        check_conv2d(x, other, "direct", *SAME, 1)
    check_linear(randn(3, 50, 17)[..., 1:], randn(3, 50, 16), "direct")
    check_linear(randn(3, 50, 16)[:, :1].expand(3, 50, 16), randn(50, 3, 16).transpose(0, 1), "direct")
    column = randn(3, 64, 40, 1, last=True)
    check_conv2d(column, column[:, :32], "direct", (1, 1), (1, 1), (0, 0), (1, 1), 1)


def test_more_examples_than_a_block_has() -> None:
    torch.manual_seed(0)
    check_linear(randn(2100, 16, 8), randn(2100, 16, 8), "direct")  # blocks of two, and one of one


def test_copies_of_some_examples_at_a_time() -> None:
    torch.manual_seed(0)
    batch = 17 if torch.cuda.device_count() == 0 else 127  # a third of the second-level cache holds less
    x, g = randn(batch, 64, 32, 32), randn(batch, 64, 32, 32)  # 256 KiB each
    one = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
    check_conv2d(x, g, "direct", *one)
    check_conv2d_groups(x, g, torch.zeros(batch, dtype=torch.long), 1, *one)


def test_long_sums() -> None:
    torch.manual_seed(0)
    check_linear(randn(2, 4500, 8) + 1, randn(2, 4500, 8) + 1, "direct")


def test_what_is_not_finite_stays_with_its_example() -> None:
    x, g = randn(6, 16, 7, 7), randn(6, 8, 7, 7)
    x[[0, 2, 4]], g[5] = float("nan"), float("inf")
    for a, b in ((x, g), (x.to(memory_format=LAST), g.to(memory_format=LAST))):
        norms = conv2d_grad_sqnorm(a, b, *SAME, 1, method="direct")
        assert norms.isfinite().tolist() == [False, True, False, True, False, False]


def test_shared_memory_is_read_without_conflicts(bank_conflicts) -> None:
    for outputs in (64, 128):
        linear_grad_sqnorm(randn(2, 64, 128), randn(2, 64, outputs), method="direct")
        accesses, repeats = bank_conflicts()
        assert accesses > 0
        assert repeats == 0


# sums over groups


def check_linear_groups(x: Tensor, g: Tensor, ids: Tensor, num_groups: int) -> None:
    exact, magnitude = (reference.linear_grad_sums(*p, ids, num_groups) for p in wide_pairs(x.cpu(), g.cpu()))
    results = (LINEAR_OP(x, g, ids.cuda(), num_groups), linear_grad_sqnorm_groups(x, g, ids.cuda(), num_groups))
    for norms, sums in results:
        assert norms.dtype == sums.dtype == torch.promote_types(x.dtype, torch.float32)
        assert_accurate(sums.cpu(), exact, magnitude, x[..., 0].numel())
        assert_linear_norms(norms.cpu(), x.cpu(), g.cpu(), "auto")


def check_conv2d_groups(x: Tensor, g: Tensor, ids: Tensor, num_groups: int, *geometry) -> None:
    wide = wide_pairs(x.cpu(), g.cpu())
    exact, magnitude = (reference.conv2d_grad_sums(*pair, ids, num_groups, *geometry) for pair in wide)
    arguments = (x, g, ids.cuda(), num_groups, *geometry)
    for norms, sums in (CONV2D_OP(*arguments), conv2d_grad_sqnorm_groups(*arguments)):
        assert norms.dtype == sums.dtype == torch.promote_types(x.dtype, torch.float32)
        assert_accurate(sums.cpu(), exact, magnitude, g[:, 0].numel())
        assert_conv2d_norms(norms.cpu(), x.cpu(), g.cpu(), "auto", *geometry)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("positions", [(), (3, 5), (70,)])
def test_linear_groups(positions: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for inputs, outputs in ((19, 33), (136, 72)):
        x, g = randn(7, *positions, inputs, dtype=dtype), randn(7, *positions, outputs, dtype=dtype)
        check_linear_groups(x, g, torch.zeros(7, dtype=torch.long), 1)
        check_linear_groups(x, g, torch.tensor([3, 0, 0, 1, 3, 3, 1]), 5)  # groups 2 and 4 are empty


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_conv2d_groups(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for channels, outputs, groups in ((3, 16, 1), (16, 72, 1), (12, 24, 12), (20, 68, 2)):
        x, g = randn(5, channels, 7, 9, dtype=dtype), randn(5, outputs, 7, 9, dtype=dtype)
        check_conv2d_groups(x, g, torch.zeros(5, dtype=torch.long), 1, *SAME, groups)
        check_conv2d_groups(x, g, torch.tensor([1, 0, 0, 1, 1]), 2, *SAME, groups)
    strided = ((3, 2), (2, 1), (1, 0), (1, 2))
    x = randn(5, 16, 9, 8, dtype=dtype, last=True)
    g = output(x.float(), 8, *strided, 1)
    assert g is not None
    check_conv2d_groups(x, g.to(dtype), torch.zeros(5, dtype=torch.long), 1, *strided, 1)


def test_sums_over_many_examples() -> None:
    torch.manual_seed(0)
    x, g = randn(1100, 16, 16) + 1, randn(1100, 16, 8)
    check_linear_groups(x, g, torch.zeros(1100, dtype=torch.long), 1)


def test_an_example_touches_its_own_norm_and_group_only() -> None:
    torch.manual_seed(0)
    x, g, ids = randn(6, 16, 7, 7), randn(6, 8, 7, 7), torch.tensor([0, 1, 0, 1, 2, 2])
    x[[1, 4]] = float("nan")
    norms, sums = CONV2D_OP(x, g, ids.cuda(), 3, *SAME, 1)
    assert norms.isfinite().tolist() == [True, False, True, True, False, True]
    assert [bool(s.isfinite().all()) for s in sums] == [True, False, False]


def test_nothing_is_zero() -> None:
    for x, g in (((0, 4, 3), (0, 4, 5)), ((2, 0, 3), (2, 0, 5)), ((2, 4, 0), (2, 4, 5)), ((2, 4, 3), (2, 4, 0))):
        norms, sums = LINEAR_OP(randn(*x), randn(*g), torch.zeros(x[0], dtype=torch.long).cuda(), 1)
        assert torch.equal(norms.cpu(), torch.zeros(x[0]))
        assert torch.equal(sums.cpu(), torch.zeros(1, g[-1], x[-1]))


def test_the_same_bits_twice() -> None:
    x, g, ids = randn(13, 24, 8, 8), randn(13, 40, 8, 8), torch.zeros(13, dtype=torch.long).cuda()
    first, second = (CONV2D_OP(x, g, ids, 1, *SAME, 1) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_compiles_without_a_break() -> None:
    x, g, ids = randn(5, 40, 16), randn(5, 40, 8), torch.zeros(5, dtype=torch.long).cuda()
    compiled = torch.compile(lambda x, g: linear_grad_sqnorm_groups(x, g, ids, 1), fullgraph=True)
    torch.testing.assert_close(compiled(x, g), linear_grad_sqnorm_groups(x, g, ids, 1))
