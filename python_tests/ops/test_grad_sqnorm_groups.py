import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grad_sqnorm import (
    DTYPES,
    assert_conv2d_norms,
    assert_linear_norms,
    geometries,
    output,
    wide_pairs,
)
from torch import Tensor

from memloc_ext.ops import (
    conv2d_grad_sqnorm,
    conv2d_grad_sqnorm_groups,
    linear_grad_sqnorm,
    linear_grad_sqnorm_groups,
)
from memloc_ext.reference import grad_sqnorm as reference

LINEAR_OP = torch.ops.memloc_ext.linear_grad_sqnorm_groups.default
CONV2D_OP = torch.ops.memloc_ext.conv2d_grad_sqnorm_groups.default
SAME = ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def check_linear(x: Tensor, g: Tensor, ids: Tensor, num_groups: int) -> None:
    computed = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    exact, magnitude = (reference.linear_grad_sums(*pair, ids, num_groups) for pair in wide_pairs(x, g))
    for norm, sums in (linear_grad_sqnorm_groups(x, g, ids, num_groups), LINEAR_OP(x, g, ids, num_groups)):
        assert norm.dtype == sums.dtype == computed
        assert sums.shape == (num_groups, g.shape[-1], x.shape[-1])
        assert_accurate(sums, exact, magnitude, x[..., 0].numel())
        assert_linear_norms(norm, x, g, "auto")


def check_conv2d(x: Tensor, g: Tensor, ids: Tensor, num_groups: int, *geometry) -> None:
    computed = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    exact, magnitude = (reference.conv2d_grad_sums(*pair, ids, num_groups, *geometry) for pair in wide_pairs(x, g))
    for result in (
        conv2d_grad_sqnorm_groups(x, g, ids, num_groups, *geometry),
        CONV2D_OP(x, g, ids, num_groups, *geometry),
    ):
        norm, sums = result
        assert norm.dtype == sums.dtype == computed
        assert_accurate(sums, exact, magnitude, g[:, 0].numel())
        assert_conv2d_norms(norm, x, g, "auto", *geometry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [(), (1,), (7,), (3, 5), (64,)])
def test_linear(positions: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(9, *positions, 70, dtype=dtype), torch.randn(9, *positions, 33, dtype=dtype)
    check_linear(x, g, torch.tensor([3, 0, 0, 1, 3, 3, 1, 0, 0]), 5)  # groups 2 and 4 are empty
    check_linear(x, g, torch.zeros(9, dtype=torch.long), 1)
    check_linear(x, g, torch.arange(9) * 2, 20)


@pytest.mark.parametrize("positions", [1, 4, 64])
def test_sums_over_many_examples_keep_their_digits(positions: int) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(5000, positions, 40) + 1, torch.randn(5000, positions, 30)
    check_linear(x, g, torch.arange(5000) % 2, 2)


@pytest.mark.parametrize("shape", [(300, 200), (3, 500), (700, 2)])
def test_linear_blocks(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(70, 6, shape[0]), torch.randn(70, 6, shape[1])
    check_linear(x, g, torch.arange(70) % 3, 3)


def test_linear_strides() -> None:
    x = torch.randn(19, 4, 2 * 9).transpose(0, 1)[:, :, ::2].transpose(1, 2)  # [4, 9, 19]
    ids = torch.tensor([1, 7, 0, 7, 1, 7, 1, 7])[::2]
    check_linear(x, torch.randn(1, 1, 11).expand(4, 9, 11), ids, 2)
    check_linear(torch.randn(9, 19).expand(4, 9, 19), torch.randn(4, 9, 12)[..., 1:], torch.tensor([2]).expand(4), 3)


@pytest.mark.parametrize(
    ("x", "g"), [((0, 4, 3), (0, 4, 5)), ((2, 0, 3), (2, 0, 5)), ((2, 4, 0), (2, 4, 5)), ((2, 4, 3), (2, 4, 0))]
)
def test_linear_of_nothing_is_zero(x: tuple, g: tuple) -> None:
    for operator in (linear_grad_sqnorm_groups, LINEAR_OP):
        norm, sums = operator(torch.randn(x), torch.randn(g), torch.zeros(x[0], dtype=torch.long), 2)
        assert torch.equal(norm, torch.zeros(x[0]))
        assert torch.equal(sums, torch.zeros(2, g[-1], x[-1]))


def test_conv2d_geometries() -> None:
    torch.manual_seed(0)
    checked = 0
    for geometry in geometries():
        x = torch.randn(4, 6, 11, 8)
        g = output(x, 4, *geometry)
        if g is not None:
            check_conv2d(x, g, torch.tensor([1, 0, 1, 1]), 2, *geometry)
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64, 6, 6, 40), (2, 1, 32, 32, 5), (2, 17, 1, 1, 3), (1, 40, 4, 1, 40)])
def test_conv2d_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, channels, height, width, outputs = shape
    x, g = torch.randn(batch, channels, height, width).to(dtype), torch.randn(batch, outputs, height, width).to(dtype)
    check_conv2d(x, g, torch.arange(batch) % 2, 2, *SAME)


def test_conv2d_depthwise_channels_last_and_views() -> None:
    torch.manual_seed(0)
    x, g, ids = torch.randn(3, 12, 9, 9), torch.randn(3, 24, 9, 9), torch.tensor([1, 0, 1])
    check_conv2d(x, g, ids, 2, *SAME[:4], 12)
    last = torch.channels_last
    check_conv2d(x.to(memory_format=last), g.to(memory_format=last), ids, 2, *SAME)
    check_conv2d(torch.randn(3, 12, 9, 20)[..., 1:19:2], g[:1].expand(3, -1, -1, -1), ids, 2, *SAME[:4], 2)


def test_conv2d_examples_of_more_than_the_packed_operands_hold() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(3, 72, 130, 120), torch.randn(3, 24, 130, 120)
    check_conv2d(x, g, torch.tensor([1, 0, 1]), 2, *SAME)
    check_conv2d(x, g, torch.tensor([1, 0, 1]), 2, *SAME[:4], 24)  # not all channel groups at a time


def test_conv2d_of_nothing_is_zero() -> None:
    for batch, inputs, outputs in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x, g, ids = torch.randn(batch, inputs, 5, 5), torch.randn(batch, outputs, 5, 5), torch.ones(batch).long()
        for operator in (conv2d_grad_sqnorm_groups, CONV2D_OP):
            norm, sums = operator(x, g, ids, 2, *SAME)
            assert torch.equal(norm, torch.zeros(batch))
            assert torch.equal(sums, torch.zeros(2, outputs, inputs, 3, 3))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), batch=st.integers(0, 5), groups=st.integers(1, 3), num_groups=st.integers(1, 7))
def test_conv2d_property(data, batch: int, groups: int, num_groups: int) -> None:
    pair = lambda low, high: (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))  # noqa: E731
    geometry = (pair(1, 7), pair(1, 3), pair(0, 3), pair(1, 2), groups)
    height, width = pair(1, 12)
    x = torch.randn(batch, groups * data.draw(st.integers(1, 5)), height, width, dtype=torch.float64)
    g = output(x, groups * data.draw(st.integers(1, 5)), *geometry)
    if g is not None:
        ids = torch.tensor([data.draw(st.integers(0, num_groups - 1)) for _ in range(batch)], dtype=torch.long)
        check_conv2d(x, g, ids, num_groups, *geometry)
        last = torch.channels_last
        check_conv2d(x.float().to(memory_format=last), g.float(), ids, num_groups, *geometry)


def test_norms_are_those_of_the_norm_operators() -> None:
    torch.manual_seed(0)
    x, g, ids = torch.randn(6, 5, 20), torch.randn(6, 5, 9), torch.arange(6) % 4
    torch.testing.assert_close(linear_grad_sqnorm_groups(x, g, ids, 4)[0], linear_grad_sqnorm(x, g))
    x, g = torch.randn(6, 20, 7, 7), torch.randn(6, 9, 7, 7)
    torch.testing.assert_close(conv2d_grad_sqnorm_groups(x, g, ids, 4, *SAME)[0], conv2d_grad_sqnorm(x, g, *SAME))


def test_an_example_touches_its_own_norm_and_group_only() -> None:
    torch.manual_seed(0)
    x, g, ids = torch.randn(6, 20, 7, 7), torch.randn(6, 9, 7, 7), torch.tensor([0, 1, 0, 1, 2, 2])
    x[[1, 4]] = float("nan")
    norm, sums = CONV2D_OP(x, g, ids, 3, *SAME)
    assert norm.isfinite().tolist() == [True, False, True, True, False, True]
    assert [bool(s.isfinite().all()) for s in sums] == [True, False, False]
    torch.testing.assert_close(sums[:1], reference.conv2d_grad_sums(x[:3:2], g[:3:2], ids[:3:2], 1, *SAME))


@pytest.mark.parametrize("channels", [(3, 8), (32, 24), (200, 100)])
def test_threads_agree_bit_for_bit(channels: tuple[int, int]) -> None:
    x, g, ids = torch.randn(19, channels[0], 8, 8), torch.randn(19, channels[1], 8, 8), torch.arange(19) % 3
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(CONV2D_OP(x, g, ids, 3, *SAME))
    finally:
        torch.set_num_threads(threads)
    for norm, sums in results[1:]:
        assert torch.equal(norm, results[0][0])
        assert torch.equal(sums, results[0][1])


def test_the_results_are_detached() -> None:
    for positions in (1, 50):
        x = torch.randn(2, positions, 3, requires_grad=True)
        results = linear_grad_sqnorm_groups(x, x, torch.tensor([0, 1]), 2)
        assert not any(t.requires_grad for t in results)


# what PyTorch is told


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch: int) -> None:
    x, g, ids = torch.randn(batch, 3, 6), torch.randn(batch, 3, 4), torch.ones(batch, dtype=torch.long)
    torch.library.opcheck(LINEAR_OP, (x, g, ids, 2))
    torch.library.opcheck(LINEAR_OP, (x.double(), g.double(), ids, 3))
    image, grad = torch.randn(batch, 4, 5, 5), torch.randn(batch, 6, 5, 5)
    torch.library.opcheck(CONV2D_OP, (image, grad, ids, 2, [3, 3], [1, 1], [1, 1], [1, 1], 2))
    torch.library.opcheck(CONV2D_OP, (image.half(), grad.half(), ids, 2, [3, 3], [1, 1], [1, 1], [1, 1], 2))


@pytest.mark.parametrize("positions", [1, 5])
def test_compile_fullgraph(positions: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, g, ids: linear_grad_sqnorm_groups(x * 2, g, ids, 2), fullgraph=True)
    x, g, ids = torch.randn(3, positions, 6), torch.randn(3, positions, 4), torch.tensor([1, 0, 1])
    for actual, expected in zip(compiled(x, g, ids), linear_grad_sqnorm_groups(x * 2, g, ids, 2), strict=True):
        torch.testing.assert_close(actual, expected)


# errors

IDS = torch.tensor([0, 1])
LINEAR = {"input": torch.randn(2, 3, 4), "grad_output": torch.randn(2, 3, 5), "group_ids": IDS, "num_groups": 2}
ONE_POSITION = {**LINEAR, "input": torch.randn(2, 4), "grad_output": torch.randn(2, 5)}
CONV2D = {
    "input": torch.randn(2, 4, 6, 6),
    "grad_output": torch.randn(2, 6, 4, 4),
    "group_ids": IDS,
    "num_groups": 2,
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
}
WRONG_GROUPS = [
    ({"group_ids": IDS + 1}, ValueError, r"group_ids must be in \[0, 2\), got 2"),
    ({"group_ids": -IDS}, ValueError, r"group_ids must be in \[0, 2\), got -1"),
    ({"group_ids": IDS[:1]}, ValueError, r"group_ids must have shape \[2\], got \[1\]"),
    ({"group_ids": IDS[:, None]}, ValueError, r"group_ids must have shape \[2\], got \[2, 1\]"),
    ({"group_ids": IDS.int()}, TypeError, "group_ids must have dtype int64, got"),
    ({"group_ids": None}, TypeError, "group_ids"),
    ({"group_ids": torch.empty(2, dtype=torch.long, device="meta")}, ValueError, "group_ids must be on"),
    ({"num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
]


@pytest.mark.parametrize("given", [LINEAR, ONE_POSITION], ids=["fused", "composed"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *WRONG_GROUPS,
        ({"input": torch.ones(2, 3, 4).long()}, (TypeError, ValueError), "input"),
        ({"grad_output": torch.randn(2, 3, 5).double()}, (TypeError, ValueError), "grad_output must have dtype|got"),
        ({"grad_output": None}, TypeError, "grad_output must be a tensor"),
        ({"input": 3}, TypeError, "input"),
        ({"input": torch.randn(4)}, ValueError, r"must be \[batch, \*, in\] .* got \[4\]"),
        ({"grad_output": torch.randn(3, 3, 5)}, ValueError, r"and \[3, 3, 5\]"),
    ],
)
def test_linear_refuses(given: dict, change: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        linear_grad_sqnorm_groups(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *WRONG_GROUPS,
        ({"input": torch.randn(2, 4, 6)}, ValueError, r"must be \[batch, in, height, width\]"),
        ({"grad_output": torch.randn(2, 6, 5, 4)}, ValueError, r"the gradient of .* got \[2, 6, 5, 4\]"),
        ({"kernel_size": (3,)}, ValueError, "kernel_size must be two numbers, got 1"),
        ({"stride": (1, -1)}, ValueError, r"stride must be in \[1, 2\^31\), got -1"),
        ({"groups": 4}, ValueError, "groups must divide the 4 input and 6 output channels, got 4"),
        ({"groups": 0}, ValueError, "groups must divide"),
    ],
)
def test_conv2d_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conv2d_grad_sqnorm_groups(**{**CONV2D, **change})
