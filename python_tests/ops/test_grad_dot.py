import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grad_sqnorm import DTYPES, assert_conv2d_norms, assert_linear_norms, geometries, output, wide_pairs
from torch import Tensor

from memloc_ext.ops import Groups, conv2d_grad_dot, linear_grad_dot, plan_conv2d, plan_linear
from memloc_ext.reference import grad_dot as reference
from memloc_ext.reference.grad_sqnorm import conv2d_grad_sums, linear_grad_sums

LINEAR_OP = torch.ops.memloc_ext.linear_grad_dot.default
CONV2D_OP = torch.ops.memloc_ext.conv2d_grad_dot.default
SAME = ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def directions(count: int, x: Tensor, *weight: int) -> Tensor:
    return torch.randn(count, *weight, dtype=torch.float64).to(torch.promote_types(x.dtype, torch.float32))


def check_linear(x: Tensor, g: Tensor, along: Tensor, ids: Tensor | None = None, num_groups: int = 0) -> None:
    pairs, both = wide_pairs(x, g), (along.double(), along.double().abs())
    exact, magnitude = (reference.linear_grad_dot(*p, v) for p, v in zip(pairs, both, strict=True))
    sums, largest = (linear_grad_sums(*p, torch.zeros(len(x)) if ids is None else ids, num_groups) for p in pairs)
    for result in (linear_grad_dot(x, g, along, ids, num_groups), LINEAR_OP(x, g, along, ids, num_groups)):
        assert [t.dtype for t in result] == [along.dtype] * 3
        assert_accurate(result[0], exact, magnitude, x[:1].numel() + along[0].numel())
        assert_linear_norms(result[1], x, g, "auto")
        assert_accurate(result[2], sums, largest, x[..., :1].numel())


def check_conv2d(x: Tensor, g: Tensor, along: Tensor, ids: Tensor | None, num_groups: int, *geometry) -> None:
    pairs, both = wide_pairs(x, g), (along.double(), along.double().abs())
    exact, magnitude = (reference.conv2d_grad_dot(*p, v, *geometry) for p, v in zip(pairs, both, strict=True))
    of = torch.zeros(len(x)) if ids is None else ids
    sums, largest = (conv2d_grad_sums(*p, of, num_groups, *geometry) for p in pairs)
    arguments = (x, g, along, ids, num_groups, *geometry)
    for result in (conv2d_grad_dot(*arguments), CONV2D_OP(*arguments)):
        assert [t.dtype for t in result] == [along.dtype] * 3
        assert_accurate(result[0], exact, magnitude, x[:1].numel() + along[0].numel())
        assert_conv2d_norms(result[1], x, g, "auto", *geometry)
        assert_accurate(result[2], sums, largest, g[:, :1].numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [(), (1,), (7,), (3, 5), (300,)])
def test_linear(positions: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(9, *positions, 70).to(dtype), torch.randn(9, *positions, 33).to(dtype)
    check_linear(x, g, directions(1, x, 33, 70))
    check_linear(x, g, directions(3, x, 33, 70), torch.tensor([3, 0, 0, 1, 3, 3, 1, 0, 0]), 5)


@pytest.mark.parametrize("batch", [1, 2000])
def test_linear_blocks(batch: int) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(batch, 6, 300), torch.randn(batch, 6, 40)
    check_linear(x, g, directions(2, x, 40, 300), torch.arange(batch) % 3, 3)
    check_linear(x[..., :3], g, directions(2, x, 40, 3))  # few tiles, so that threads share the examples


def test_linear_strides() -> None:
    torch.manual_seed(0)
    x = torch.randn(19, 4, 2 * 9).transpose(0, 1)[:, :, ::2].transpose(1, 2)  # [4, 9, 19]
    g, ids = torch.randn(1, 1, 11).expand(4, 9, 11), torch.tensor([1, 7, 0, 7, 1, 7, 1, 7])[::2]
    check_linear(x, g, torch.randn(19, 22, 2)[:, ::2].permute(2, 1, 0), ids, 2)
    check_linear(x, g, torch.randn(11, 1).expand(3, 11, 19))


@pytest.mark.parametrize(
    ("x", "g"), [((0, 4, 3), (0, 4, 5)), ((2, 0, 3), (2, 0, 5)), ((2, 4, 0), (2, 4, 5)), ((2, 4, 3), (2, 4, 0))]
)
def test_linear_of_nothing_is_zero(x: tuple, g: tuple) -> None:
    for operator in (linear_grad_dot, LINEAR_OP):
        arguments = (torch.randn(x), torch.randn(g), torch.randn(3, g[-1], x[-1]))
        for ids, groups in ((None, 0), (torch.zeros(x[0], dtype=torch.long), 2)):
            dot, norm, sums = operator(*arguments, ids, groups)
            assert torch.equal(dot, torch.zeros(3, x[0]))
            assert torch.equal(norm, torch.zeros(x[0]))
            assert torch.equal(sums, torch.zeros(groups, g[-1], x[-1]))


def test_conv2d_geometries() -> None:
    torch.manual_seed(0)
    checked = 0
    for kernel, *rest in geometries():
        x = torch.randn(4, 6, 11, 8)
        g = output(x, 4, kernel, *rest)
        if g is not None:
            along = directions(1 + checked % 3, x, 4, 6 // rest[-1], *kernel)
            check_conv2d(x, g, along, *((None, 0) if checked % 2 else (torch.tensor([1, 0, 1, 1]), 2)), kernel, *rest)
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64, 6, 6, 40), (2, 1, 32, 32, 5), (2, 17, 1, 1, 3), (1, 40, 4, 1, 40)])
def test_conv2d_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, channels, height, width, outputs = shape
    x, g = torch.randn(batch, channels, height, width).to(dtype), torch.randn(batch, outputs, height, width).to(dtype)
    check_conv2d(x, g, directions(2, x, outputs, channels, 3, 3), torch.arange(batch) % 2, 2, *SAME)


def test_conv2d_depthwise_channels_last_and_views() -> None:
    torch.manual_seed(0)
    x, g, ids = torch.randn(3, 12, 9, 9), torch.randn(3, 24, 9, 9), torch.tensor([1, 0, 1])
    check_conv2d(x, g, directions(2, x, 24, 1, 3, 3), ids, 2, *SAME[:4], 12)
    last = torch.channels_last
    along = torch.stack([v.to(memory_format=last) for v in directions(3, x, 24, 12, 3, 3)], -1).movedim(-1, 0)
    check_conv2d(x.to(memory_format=last), g.to(memory_format=last), along, ids, 2, *SAME)
    wide = torch.randn(3, 12, 9, 20)[..., 1:19:2]
    check_conv2d(wide, g[:1].expand(3, -1, -1, -1), directions(1, x, 24, 6, 3, 3), None, 0, *SAME[:4], 2)


def test_conv2d_examples_of_more_than_the_packed_operands_hold() -> None:
    torch.manual_seed(0)
    x, g, ids = torch.randn(3, 72, 130, 120), torch.randn(3, 24, 130, 120), torch.tensor([1, 0, 1])
    check_conv2d(x, g, directions(2, x, 24, 72, 3, 3), ids, 2, *SAME)
    check_conv2d(x, g, directions(2, x, 24, 3, 3, 3), ids, 2, *SAME[:4], 24)  # not all channel groups at a time


def test_conv2d_of_nothing_is_zero() -> None:
    for batch, inputs, outputs in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x, g, ids = torch.randn(batch, inputs, 5, 5), torch.randn(batch, outputs, 5, 5), torch.ones(batch).long()
        for operator in (conv2d_grad_dot, CONV2D_OP):
            dot, norm, sums = operator(x, g, torch.randn(1, outputs, inputs, 3, 3), ids, 2, *SAME)
            assert torch.equal(dot, torch.zeros(1, batch))
            assert torch.equal(norm, torch.zeros(batch))
            assert torch.equal(sums, torch.zeros(2, outputs, inputs, 3, 3))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), batch=st.integers(0, 5), groups=st.integers(1, 3), count=st.integers(1, 4))
def test_conv2d_property(data, batch: int, groups: int, count: int) -> None:
    pair = lambda low, high: (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))  # noqa: E731
    geometry = (pair(1, 7), pair(1, 3), pair(0, 3), pair(1, 2), groups)
    height, width = pair(1, 12)
    inputs, outputs = data.draw(st.integers(1, 5)), groups * data.draw(st.integers(1, 5))
    x = torch.randn(batch, groups * inputs, height, width, dtype=torch.float64)
    g = output(x, outputs, *geometry)
    if g is not None:
        along = directions(count, x, outputs, inputs, *geometry[0])
        check_conv2d(x, g, along, None, 0, *geometry)
        ids = torch.tensor([data.draw(st.integers(0, 2)) for _ in range(batch)], dtype=torch.long)
        check_conv2d(x.float().to(memory_format=torch.channels_last), g.float(), along.float(), ids, 3, *geometry)


def test_the_pass_is_taken_with_directions_where_it_is_not_without() -> None:
    assert not plan_linear(4, 512, 512).fused
    assert plan_linear(4, 512, 512, directions=2).fused
    assert not plan_linear(1, 784, 512, directions=9).fused
    assert plan_conv2d(256, 256, (8, 8), (3, 3), padding=(1, 1), directions=1).fused
    with pytest.raises(ValueError, match="directions must be at least 0"):
        plan_linear(3, 4, 5, directions=-1)


def test_norms_and_sums_are_those_without_directions() -> None:
    torch.manual_seed(0)
    x, g, ids = torch.randn(6, 20, 7, 7), torch.randn(6, 9, 7, 7), torch.arange(6) % 4
    _, norm, sums = CONV2D_OP(x, g, torch.randn(2, 9, 20, 3, 3), ids, 4, *SAME)
    norms, groups = torch.ops.memloc_ext.conv2d_grad_sqnorm_groups(x, g, ids, 4, *SAME)
    torch.testing.assert_close((norm, sums), (norms, groups))
    given_groups = conv2d_grad_dot(x, g, torch.ones(1, 9, 20, 3, 3), Groups(ids, 4), None, *SAME)
    torch.testing.assert_close(given_groups[2], groups)
    torch.testing.assert_close(CONV2D_OP(x, g, sums, None, 0, *SAME)[0].sum(1), sums.sum(0).mul(sums).sum((1, 2, 3, 4)))


def test_an_example_touches_its_own_products_only() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(6, 20, 7, 7), torch.randn(6, 9, 7, 7)
    x[[1, 4]] = float("nan")
    for operator in (conv2d_grad_dot, CONV2D_OP):
        dot, norm, _ = operator(x, g, torch.randn(2, 9, 20, 3, 3), None, 0, *SAME)
        assert dot.isfinite().tolist() == [[True, False, True, True, False, True]] * 2
        assert norm.isfinite().tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("channels", [(3, 8), (32, 24), (200, 100)])
def test_threads_agree_bit_for_bit(channels: tuple[int, int]) -> None:
    x, g, ids = torch.randn(19, channels[0], 8, 8), torch.randn(19, channels[1], 8, 8), torch.arange(19) % 3
    along, threads, results = torch.randn(2, channels[1], channels[0], 3, 3), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append((*CONV2D_OP(x, g, along, ids, 3, *SAME), *CONV2D_OP(x, g, along, None, 0, *SAME)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(t, own) for t, own in zip(result, results[0], strict=True))


@pytest.mark.parametrize("positions", [1, 50])
def test_the_results_are_detached_and_know_no_autocast(positions: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, positions, 3, requires_grad=True)
    along = torch.randn(1, 3, 3, requires_grad=True)
    results = linear_grad_dot(x, x, along)
    assert not any(t.requires_grad for t in results)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_grad_dot(x, x, along)[0], results[0])


# what PyTorch is told


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch: int) -> None:
    x, g, ids = torch.randn(batch, 3, 6), torch.randn(batch, 3, 4), torch.ones(batch, dtype=torch.long)
    torch.library.opcheck(LINEAR_OP, (x, g, torch.randn(2, 4, 6), ids, 2))
    torch.library.opcheck(LINEAR_OP, (x.double(), g.double(), torch.randn(1, 4, 6).double()))
    image, grad, along = torch.randn(batch, 4, 5, 5), torch.randn(batch, 6, 5, 5), torch.randn(3, 6, 2, 3, 3)
    torch.library.opcheck(CONV2D_OP, (image, grad, along, ids, 2, [3, 3], [1, 1], [1, 1], [1, 1], 2))
    torch.library.opcheck(CONV2D_OP, (image.half(), grad.half(), along, None, 0, [3, 3], [1, 1], [1, 1], [1, 1], 2))


@pytest.mark.parametrize("positions", [1, 5])
def test_compile_fullgraph(positions: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, g, v: linear_grad_dot(x * 2, g, v), fullgraph=True)
    x, g, along = torch.randn(3, positions, 6), torch.randn(3, positions, 4), torch.randn(2, 4, 6)
    for actual, expected in zip(compiled(x, g, along), linear_grad_dot(x * 2, g, along), strict=True):
        torch.testing.assert_close(actual, expected)


# errors

IDS = torch.tensor([0, 1])
LINEAR = {"input": torch.randn(2, 30, 4), "grad_output": torch.randn(2, 30, 5), "directions": torch.randn(2, 5, 4)}
ONE_POSITION = {**LINEAR, "input": torch.randn(2, 4), "grad_output": torch.randn(2, 5)}
CONV2D = {
    "input": torch.randn(2, 4, 6, 6),
    "grad_output": torch.randn(2, 6, 4, 4),
    "directions": torch.randn(2, 6, 4, 3, 3),
    "group_ids": IDS,
    "num_groups": 2,
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
}


@pytest.mark.parametrize("given", [LINEAR, ONE_POSITION], ids=["fused", "composed"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"directions": torch.randn(2, 4, 5)}, ValueError, r"shape \[D, 5, 4\] with D at least 1, got \[2, 4, 5\]"),
        ({"directions": torch.randn(5, 4)}, ValueError, r"directions must have shape .* got \[5, 4\]"),
        ({"directions": torch.randn(0, 5, 4)}, ValueError, r"directions must have shape .* got \[0, 5, 4\]"),
        ({"directions": torch.tensor(1.0)}, ValueError, r"directions must have shape .* got \[\]"),
        ({"directions": torch.randn(2, 5, 4).double()}, TypeError, "directions must have dtype .*loat"),
        ({"directions": torch.randn(2, 5, 4).half()}, TypeError, "directions must have dtype .*loat"),
        ({"directions": torch.empty(2, 5, 4, device="meta")}, ValueError, "directions must be on the device of input"),
        ({"directions": None}, TypeError, "directions"),
        ({"num_groups": 2}, ValueError, "num_groups must be 0 without group_ids, got 2"),
        ({"group_ids": IDS, "num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
        ({"group_ids": IDS}, TypeError, "num_groups"),
        ({"group_ids": IDS + 1, "num_groups": 2}, ValueError, r"group_ids must be in \[0, 2\), got 2"),
        ({"group_ids": IDS[:1], "num_groups": 2}, ValueError, r"group_ids must have shape \[2\], got \[1\]"),
        ({"input": torch.ones(2, 30, 4).long()}, (TypeError, ValueError), "input"),
        ({"grad_output": None}, TypeError, "grad_output must be a tensor"),
        ({"grad_output": torch.randn(3, 30, 5)}, ValueError, r"and \[3, 30, 5\]"),
    ],
)
def test_linear_refuses(given: dict, change: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        linear_grad_dot(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"directions": torch.randn(2, 6, 4, 3)}, ValueError, r"shape \[D, 6, 4, 3, 3\] with D at least 1"),
        (
            {"directions": torch.randn(2, 6, 2, 3, 3)},
            ValueError,
            r"directions must have shape .* got \[2, 6, 2, 3, 3\]",
        ),
        ({"group_ids": None}, ValueError, "num_groups must be 0 without group_ids, got 2"),
        ({"grad_output": torch.randn(2, 6, 5, 4)}, ValueError, r"the gradient of .* got \[2, 6, 5, 4\]"),
        ({"kernel_size": (3,)}, ValueError, "kernel_size must be two numbers, got 1"),
        ({"groups": 0}, ValueError, "groups must divide"),
    ],
)
def test_conv2d_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conv2d_grad_dot(**{**CONV2D, **change})
