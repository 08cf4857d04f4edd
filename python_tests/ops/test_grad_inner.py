import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grad_sqnorm import DTYPES, geometries, output, wide_pairs
from torch import Tensor

from memloc_ext.ops import conv2d_grad_inner, grad_inner, linear_grad_inner
from memloc_ext.reference import grad_inner as reference

LINEAR_OP = torch.ops.memloc_ext.linear_grad_inner.default
CONV2D_OP = torch.ops.memloc_ext.conv2d_grad_inner.default
SAME = ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def check(function, operator, specification, x: Tensor, g: Tensor, *geometry) -> None:
    exact, magnitude = (specification(*pair, *geometry) for pair in wide_pairs(x, g))
    terms = x[:1].numel() + g[:1].numel()
    norms, sizes = exact.diag().sqrt(), magnitude.diag().sqrt()
    of_sums = norms.outer(sizes) + sizes.outer(norms)  # sums that are multiplied err less than a sum of all products
    for result, allowed in ((function(x, g, *geometry), magnitude), (operator(x, g, *geometry), of_sums)):
        assert result.dtype == torch.promote_types(x.dtype, torch.float32)
        assert torch.equal(result, result.t())
        assert_accurate(result, exact, allowed, terms)


def check_linear(x: Tensor, g: Tensor) -> None:
    check(linear_grad_inner, LINEAR_OP, reference.linear_grad_inner, x, g)


def check_conv2d(x: Tensor, g: Tensor, *geometry) -> None:
    check(conv2d_grad_inner, CONV2D_OP, reference.conv2d_grad_inner, x, g, *geometry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [(), (1,), (7,), (3, 5), (300,)])
def test_linear(positions: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check_linear(torch.randn(9, *positions, 70).to(dtype), torch.randn(9, *positions, 33).to(dtype))


@pytest.mark.parametrize("batch", [1, 2, 13, 25, 70, 300])
def test_linear_sizes(batch: int) -> None:
    torch.manual_seed(0)
    check_linear(torch.randn(batch, 6, 40), torch.randn(batch, 6, 30))


def test_linear_of_more_than_the_scratch_holds() -> None:
    torch.manual_seed(0)
    check_linear(torch.randn(130, 40, 300), torch.randn(130, 40, 200))


def test_linear_strides() -> None:
    torch.manual_seed(0)
    x = torch.randn(19, 4, 2 * 9).transpose(0, 1)[:, :, ::2].transpose(1, 2)  # [4, 9, 19]
    check_linear(x, torch.randn(1, 1, 11).expand(4, 9, 11))
    check_linear(torch.randn(9, 19).expand(4, 9, 19), torch.randn(4, 9, 12)[..., 1:])


@pytest.mark.parametrize(
    ("x", "g"), [((0, 4, 3), (0, 4, 5)), ((2, 0, 3), (2, 0, 5)), ((2, 4, 0), (2, 4, 5)), ((2, 4, 3), (2, 4, 0))]
)
def test_linear_of_nothing_is_zero(x: tuple, g: tuple) -> None:
    for operator in (linear_grad_inner, LINEAR_OP):
        assert torch.equal(operator(torch.randn(x), torch.randn(g)), torch.zeros(x[0], x[0]))


def test_conv2d_geometries() -> None:
    torch.manual_seed(0)
    checked = 0
    for geometry in geometries():
        x = torch.randn(4, 6, 11, 8)
        g = output(x, 4, *geometry)
        if g is not None:
            check_conv2d(x, g, *geometry)
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64, 6, 6, 40), (2, 1, 32, 32, 5), (2, 17, 1, 1, 3), (1, 40, 4, 1, 40)])
def test_conv2d_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, channels, height, width, outputs = shape
    x, g = torch.randn(batch, channels, height, width), torch.randn(batch, outputs, height, width)
    check_conv2d(x.to(dtype), g.to(dtype), *SAME)


def test_conv2d_depthwise_channels_last_and_views() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(3, 12, 9, 9), torch.randn(3, 24, 9, 9)
    check_conv2d(x, g, *SAME[:4], 12)
    last = torch.channels_last
    check_conv2d(x.to(memory_format=last), g.to(memory_format=last), *SAME)
    check_conv2d(torch.randn(3, 12, 9, 20)[..., 1:19:2], g[:1].expand(3, -1, -1, -1), *SAME[:4], 2)


def test_conv2d_of_more_than_the_packed_operands_hold() -> None:
    torch.manual_seed(0)
    check_conv2d(torch.randn(5, 72, 130, 120), torch.randn(5, 24, 130, 120), *SAME)


def test_conv2d_of_nothing_is_zero() -> None:
    for batch, inputs, outputs in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x, g = torch.randn(batch, inputs, 5, 5), torch.randn(batch, outputs, 5, 5)
        for operator in (conv2d_grad_inner, CONV2D_OP):
            assert torch.equal(operator(x, g, *SAME), torch.zeros(batch, batch))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), batch=st.integers(0, 5), groups=st.integers(1, 3))
def test_conv2d_property(data, batch: int, groups: int) -> None:
    pair = lambda low, high: (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))  # noqa: E731
    geometry = (pair(1, 7), pair(1, 3), pair(0, 3), pair(1, 2), groups)
    height, width = pair(1, 12)
    x = torch.randn(batch, groups * data.draw(st.integers(1, 5)), height, width, dtype=torch.float64)
    g = output(x, groups * data.draw(st.integers(1, 5)), *geometry)
    if g is not None:
        check_conv2d(x, g, *geometry)
        check_conv2d(x.float().to(memory_format=torch.channels_last), g.float(), *geometry)


def test_compositions_in_some_parts(monkeypatch) -> None:
    monkeypatch.setattr(grad_inner, "_ELEMENTS", 500)
    torch.manual_seed(0)
    x, g = torch.randn(7, 5, 300), torch.randn(7, 5, 20)
    exact, magnitude = (reference.linear_grad_inner(*pair) for pair in wide_pairs(x, g))
    for result in (grad_inner._gram(x, g), grad_inner._in_parts(grad_inner._columns(x), g)):
        assert_accurate(result, exact, magnitude, 7000)
    x, g = torch.randn(7, 70, 6, 6), torch.randn(7, 20, 6, 6)
    exact, magnitude = (reference.conv2d_grad_inner(*pair, *SAME) for pair in wide_pairs(x, g))
    parts = grad_inner._patches(x, ((3, 3), 1, 1, 1))
    assert_accurate(grad_inner._in_parts(parts, g.flatten(2).transpose(1, 2)), exact, magnitude, 20_000)


def test_an_example_touches_its_own_products_only() -> None:
    torch.manual_seed(0)
    for shape in ((6, 20, 7, 7), (6, 20, 1, 1)):
        x, g = torch.randn(shape), torch.randn(6, 9, *shape[2:])
        x[[1, 4]] = float("nan")
        finite = torch.tensor([True, False, True, True, False, True])
        for operator in (conv2d_grad_inner, CONV2D_OP):
            assert torch.equal(operator(x, g, *SAME).isfinite(), finite[:, None] & finite)


@pytest.mark.parametrize("channels", [(3, 8), (32, 24), (200, 100)])
def test_threads_agree_bit_for_bit(channels: tuple[int, int]) -> None:
    x, g = torch.randn(29, channels[0], 8, 8), torch.randn(29, channels[1], 8, 8)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(CONV2D_OP(x, g, *SAME))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("positions", [1, 50])
def test_the_result_is_detached_and_knows_no_autocast(positions: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, positions, 3, requires_grad=True)
    result = linear_grad_inner(x, x)
    assert not result.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_grad_inner(x, x), result)


# what PyTorch is told


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch: int) -> None:
    x, g = torch.randn(batch, 3, 6), torch.randn(batch, 3, 4)
    torch.library.opcheck(LINEAR_OP, (x, g))
    torch.library.opcheck(LINEAR_OP, (x.double(), g.double()))
    image, grad = torch.randn(batch, 4, 5, 5), torch.randn(batch, 6, 5, 5)
    torch.library.opcheck(CONV2D_OP, (image, grad, [3, 3], [1, 1], [1, 1], [1, 1], 2))
    torch.library.opcheck(CONV2D_OP, (image.half(), grad.half(), [3, 3], [1, 1], [1, 1], [1, 1], 2))


@pytest.mark.parametrize("positions", [1, 50])
def test_compile_fullgraph(positions: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, g: linear_grad_inner(x * 2, g), fullgraph=True)
    x, g = torch.randn(3, positions, 6), torch.randn(3, positions, 4)
    torch.testing.assert_close(compiled(x, g), linear_grad_inner(x * 2, g))


# errors

LINEAR = {"input": torch.randn(2, 30, 4), "grad_output": torch.randn(2, 30, 5)}
ONE_POSITION = {"input": torch.randn(2, 4), "grad_output": torch.randn(2, 5)}
CONV2D = {
    "input": torch.randn(2, 4, 6, 6),
    "grad_output": torch.randn(2, 6, 4, 4),
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
        ({"input": torch.ones(2, 30, 4).long()}, (TypeError, ValueError), "input"),
        ({"grad_output": torch.randn(2, 30, 5).double()}, (TypeError, ValueError), "grad_output must have dtype|got"),
        ({"grad_output": None}, TypeError, "grad_output must be a tensor"),
        ({"input": 3}, TypeError, "input"),
        ({"input": torch.randn(4)}, ValueError, r"must be \[batch, \*, in\] .* got \[4\]"),
        ({"grad_output": torch.randn(3, 30, 5)}, ValueError, r"and \[3, 30, 5\]"),
    ],
)
def test_linear_refuses(given: dict, change: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        linear_grad_inner(**{**given, **change})


@pytest.mark.parametrize("outputs", [6, 600], ids=["fused", "composed"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(2, 4, 6)}, ValueError, r"must be \[batch, in, height, width\]"),
        ({"input": torch.randn(3, 4, 6, 6)}, ValueError, r"must be \[batch, in, height, width\] .* got \[3, 4, 6, 6\]"),
        ({"padding": (1, 0)}, ValueError, "the gradient of .* got"),
        ({"kernel_size": (3,)}, ValueError, "kernel_size must be two numbers, got 1"),
        ({"stride": (1, -1)}, ValueError, r"stride must be in \[1, 2\^31\), got -1"),
        ({"groups": 0}, ValueError, "groups must divide"),
    ],
)
def test_conv2d_refuses(outputs: int, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conv2d_grad_inner(**{**CONV2D, "grad_output": torch.randn(2, outputs, 4, 4), **change})
