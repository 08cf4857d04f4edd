from itertools import product

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memloc_ext.ops import conv2d_grad_sqnorm, linear_grad_sqnorm, plan_conv2d, plan_linear
from memloc_ext.reference import grad_sqnorm as reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PLAIN = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups


def assert_linear_norms(actual: Tensor, x: Tensor, g: Tensor, method: str) -> None:
    norms = [reference.linear_grad_sqnorm(*pair) for pair in wide_pairs(x, g)]
    positions = x[0, ..., 0].numel() if x.numel() else 0
    assert_norms(actual, *norms, method, positions, x.shape[-1], g.shape[-1])


def assert_conv2d_norms(actual: Tensor, x: Tensor, g: Tensor, method: str, kernel: tuple, *rest) -> None:
    norms = [reference.conv2d_grad_sqnorm(*pair, kernel, *rest) for pair in wide_pairs(x, g)]
    assert_norms(actual, *norms, method, g.shape[2:].numel(), kernel[0] * kernel[1], x.shape[1], g.shape[1])


def wide_pairs(x: Tensor, g: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (x.double(), g.double()), (x.double().abs(), g.double().abs())


def assert_norms(actual: Tensor, exact: Tensor, magnitude: Tensor, method: str, *terms: int) -> None:
    """Hold norms to the bound of their way; ``magnitude``: the norms of absolute values; ``terms``: of all its sums.

    A Gram adds up all terms of a norm. The other ways square sums: they err by twice a sum times what that errs by,
    which the roots of norm and magnitude bound.
    """
    squares = method in ("direct", "outer")
    assert_accurate(actual, exact, 2 * (exact * magnitude).sqrt() if squares else magnitude, sum(terms))


def check_linear(x: Tensor, g: Tensor, method: str) -> None:
    actual = linear_grad_sqnorm(x, g, method=method)
    computed = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    assert actual.dtype == computed
    assert actual.shape == x.shape[:1]
    assert_linear_norms(actual, x, g, method)


def check_conv2d(x: Tensor, g: Tensor, method: str, *geometry) -> None:
    actual = conv2d_grad_sqnorm(x, g, *geometry, method=method)
    computed = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    assert actual.dtype == computed
    assert actual.shape == x.shape[:1]
    assert_conv2d_norms(actual, x, g, method, *geometry)


# linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "direct", "gram"])
@pytest.mark.parametrize("positions", [(), (1,), (7,), (3, 5), (2, 3, 4), (1024,)])
def test_linear(positions: tuple[int, ...], method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(3, *positions, 19, dtype=dtype), torch.randn(3, *positions, 33, dtype=dtype)
    check_linear(x, g, method)


@pytest.mark.parametrize("method", ["auto", "direct", "gram", "outer"])
def test_linear_with_one_position(method: str) -> None:
    check_linear(torch.randn(5, 1, 70), torch.randn(5, 1, 13), method)


@pytest.mark.parametrize("method", ["auto", "direct", "gram"])
@pytest.mark.parametrize(
    ("x", "g"), [((0, 4, 3), (0, 4, 5)), ((2, 0, 3), (2, 0, 5)), ((2, 4, 0), (2, 4, 5)), ((2, 4, 3), (2, 4, 0))]
)
def test_linear_of_nothing_is_zero(x: tuple, g: tuple, method: str) -> None:
    assert torch.equal(linear_grad_sqnorm(torch.randn(x), torch.randn(g), method=method), torch.zeros(x[0]))


@pytest.mark.parametrize("method", ["direct", "gram"])
def test_linear_strides(method: str) -> None:
    x = torch.randn(19, 4, 2 * 9).transpose(0, 1)[:, :, ::2].transpose(1, 2)  # [4, 9, 19]
    check_linear(x, torch.randn(1, 1, 11).expand(4, 9, 11), method)
    check_linear(torch.randn(9, 19).expand(4, 9, 19), torch.randn(4, 9, 12)[..., 1:], method)


# conv2d


def geometries() -> list[tuple]:
    kernels, strides = [(1, 1), (3, 3), (5, 2), (7, 7)], [(1, 1), (2, 2), (3, 1)]
    return [
        (kernel, stride, padding, dilation, groups)
        for (kernel, stride), (padding, dilation), groups in product(
            product(kernels, strides), [((0, 0), (1, 1)), ((1, 3), (1, 2)), ((3, 2), (2, 1))], (1, 2)
        )
    ]


def output(x: Tensor, channels: int, kernel, stride, padding, dilation, groups) -> Tensor | None:
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    shape = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return torch.randn(len(x), channels, *shape, dtype=torch.float64).to(x.dtype) if min(shape) > 0 else None


@pytest.mark.parametrize("method", ["auto", "direct", "shifted_gram"])
def test_conv2d_geometries(method: str) -> None:
    torch.manual_seed(0)
    checked = 0
    for geometry in geometries():
        x = torch.randn(2, 6, 11, 8)
        g = output(x, 4, *geometry)
        if g is not None:
            check_conv2d(x, g, method, *geometry)
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["direct", "shifted_gram"])
@pytest.mark.parametrize("shape", [(3, 64, 6, 6, 40), (2, 1, 32, 32, 5), (2, 17, 1, 1, 3), (1, 40, 4, 1, 40)])
def test_conv2d_shapes(shape: tuple[int, ...], method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, channels, height, width, outputs = shape
    x, g = torch.randn(batch, channels, height, width), torch.randn(batch, outputs, height, width)
    check_conv2d(x.to(dtype), g.to(dtype), method, (3, 3), (1, 1), (1, 1), (1, 1), 1)


@pytest.mark.parametrize("method", ["direct", "shifted_gram"])
def test_conv2d_depthwise_channels_last_and_views(method: str) -> None:
    x, g = torch.randn(3, 12, 9, 9), torch.randn(3, 24, 9, 9)
    check_conv2d(x, g, method, (3, 3), (1, 1), (1, 1), (1, 1), 12)
    last = torch.channels_last
    check_conv2d(x.to(memory_format=last), g.to(memory_format=last), method, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    wide = torch.randn(3, 12, 9, 20)[..., 1:19:2]
    check_conv2d(wide, g[:1].expand(3, -1, -1, -1), method, (3, 3), (1, 1), (1, 1), (1, 1), 2)


@pytest.mark.parametrize("method", ["auto", "direct", "shifted_gram"])
def test_conv2d_of_nothing_is_zero(method: str) -> None:
    for batch, inputs, outputs in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x, g = torch.randn(batch, inputs, 5, 5), torch.randn(batch, outputs, 5, 5)
        assert torch.equal(conv2d_grad_sqnorm(x, g, (1, 1), *PLAIN, method=method), torch.zeros(batch))


@settings(deadline=None, max_examples=100)
@given(
    data=st.data(),
    batch=st.integers(0, 3),
    groups=st.integers(1, 3),
    method=st.sampled_from(["direct", "shifted_gram"]),
)
def test_conv2d_property(data, batch: int, groups: int, method: str) -> None:
    pair = lambda low, high: (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))  # noqa: E731
    geometry = (pair(1, 7), pair(1, 3), pair(0, 3), pair(1, 2), groups)
    height, width = pair(1, 12)
    x = torch.randn(batch, groups * data.draw(st.integers(1, 5)), height, width, dtype=torch.float64)
    g = output(x, groups * data.draw(st.integers(1, 5)), *geometry)
    if g is not None:
        check_conv2d(x, g, method, *geometry)
        last = torch.channels_last
        check_conv2d(x.float().to(memory_format=last), g.float().to(memory_format=last), method, *geometry)


ONE = torch.randn(2, 3, 1, 1)
SINGLE = {  # one position, one kernel offset: the outer way, or what looks like it
    "one pixel": (ONE, ONE, (1, 1), (0, 0)),
    "one pixel, channels last": (ONE.to(memory_format=torch.channels_last), ONE, (1, 1), (0, 0)),
    "a view": (torch.randn(2, 3, 4, 4)[:, :, 1:2, 2:3], torch.randn(2, 5, 2, 2)[..., :1, :1], (1, 1), (0, 0)),
    "the corner of an image": (torch.randn(2, 3, 2, 2), ONE, (2, 2), (0, 0)),
    "padding only": (ONE, ONE, (3, 3), (1, 1)),
    "far apart": (ONE.as_strided((2, 3, 1, 1), (3, 1, 10**10, 1)), ONE, (1, 1), (0, 0)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_conv2d_with_one_position_and_one_offset(name: str) -> None:
    x, g, stride, padding = SINGLE[name]
    for method in ("auto", "direct", "shifted_gram"):
        check_conv2d(x, g, method, (1, 1), stride, padding, (1, 1), 1)


def test_sizes_that_no_scratch_can_hold_are_refused() -> None:
    x, huge = torch.ones(1, 1, 1, 1), 2**15
    with pytest.raises(ValueError, match="elements of scratch"):
        conv2d_grad_sqnorm(
            x.expand(1, 2**32, 2, 2), x, (1, 1), (huge, huge), (huge // 2 - 1,) * 2, (1, 1), 1, method="direct"
        )


def test_a_gram_too_large_for_its_scratch_is_direct() -> None:
    x, g = torch.randn(1, 2**13, 2), torch.randn(1, 2**13, 3)
    results = [linear_grad_sqnorm(x, g, method=method) for method in ("gram", "direct")]
    assert torch.equal(*results)


def test_the_result_is_detached() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    assert not linear_grad_sqnorm(x, x).requires_grad


# both


def test_a_norm_is_that_of_the_example_s_own_gradient_whatever_surrounds_it() -> None:
    x, g = torch.randn(6, 20, 7, 7), torch.randn(6, 9, 7, 7)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    x[[0, 2, 4]] = float("nan")
    x[5] = float("inf")
    for method in ("direct", "shifted_gram"):
        norms = conv2d_grad_sqnorm(x, g, *geometry, method=method)
        alone = torch.cat([conv2d_grad_sqnorm(x[i : i + 1], g[i : i + 1], *geometry, method=method) for i in range(6)])
        assert torch.equal(norms.nan_to_num(-1), alone.nan_to_num(-1))
        assert norms[[1, 3]].isfinite().all()
        assert not norms[[0, 2, 4, 5]].isfinite().any()


def test_threads_agree_bit_for_bit() -> None:
    x, g = torch.randn(9, 32, 8, 8), torch.randn(9, 24, 8, 8)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(conv2d_grad_sqnorm(x, g, (3, 3), (1, 1), (1, 1), (1, 1), 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_gram_keeps_what_the_cancellation_leaves() -> None:
    # a gradient that sums to zero over positions, inputs with a mean: the true norm is far below its terms
    torch.manual_seed(0)
    x = torch.randn(4, 64, 32) + 10
    g = torch.randn(4, 64, 16)
    g -= g.mean(1, keepdim=True)
    exact = reference.linear_grad_sqnorm(x.double(), g.double())
    for method, allowed in (("direct", 1e-6), ("gram", 1e-4)):
        assert ((linear_grad_sqnorm(x, g, method=method) - exact) / exact).abs().max() < allowed
    constant = torch.ones(2, 8, 5)
    assert (linear_grad_sqnorm(constant, constant - 1, method="gram") >= 0).all()


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch: int) -> None:
    x, g = torch.randn(batch, 3, 6), torch.randn(batch, 3, 4)
    torch.library.opcheck(torch.ops.memloc_ext.linear_grad_sqnorm.default, (x, g))
    image, grad = torch.randn(batch, 4, 5, 5), torch.randn(batch, 6, 5, 5)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 2)
    torch.library.opcheck(torch.ops.memloc_ext.conv2d_grad_sqnorm.default, (image, grad, *geometry))
    torch.library.opcheck(torch.ops.memloc_ext.linear_grad_sqnorm.default, (x.double(), g.double()), {"method": "gram"})


def test_compile_fullgraph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, g: linear_grad_sqnorm(x * 2, g).sqrt(), fullgraph=True)
    x, g = torch.randn(3, 5, 6), torch.randn(3, 5, 4)
    torch.testing.assert_close(compiled(x, g), 2 * linear_grad_sqnorm(x, g).sqrt())


# the cost model


@pytest.mark.parametrize("geometry", geometries()[::5])
def test_direct_and_gram_counts_are_those_of_an_exhaustive_count(geometry: tuple) -> None:
    (ky, kx), (sy, sx), (py, px), (dy, dx), groups = geometry
    height, width, inputs, outputs = 11, 8, 6, 4
    rows, columns = (height + 2 * py - dy * (ky - 1) - 1) // sy + 1, (width + 2 * px - dx * (kx - 1) - 1) // sx + 1
    if rows < 1 or columns < 1:
        pytest.skip("the kernel is larger than the image")
    plan = plan_conv2d(inputs, outputs, (height, width), *geometry)
    direct = sum(1 for _ in product(range(rows * columns), range(ky * kx), range(inputs), range(outputs // groups)))
    assert plan.multiply_adds["direct"] == direct
    places = [(i * dy // sy, j * dx // sx) for i in range(ky) for j in range(kx)]
    pitch, tall = columns + max(j for _, j in places), rows + max(i for i, _ in places)
    met = {(i * dy % sy, j * dx % sx) for i in range(ky) for j in range(kx)}
    pairs = 0
    for ry, rx in met:
        inside = product(range(tall), range(pitch))
        pixels = sum(0 <= a * sy + ry - py < height and 0 <= b * sx + rx - px < width for a, b in inside)
        pairs += pixels * pixels
    positions = rows * columns
    sums = groups * ky * kx * positions * rows * pitch / 2
    products = pairs * inputs + positions * positions * outputs
    assert plan.multiply_adds["shifted_gram"] == pytest.approx(products + sums)


def test_plan_takes_the_way_that_was_measured_to_be_faster() -> None:
    assert plan_linear(1, 784, 512).method == "outer"
    assert plan_linear(64, 256, 768).method == "gram"
    assert plan_linear(256, 768, 3072).method == "gram"
    assert plan_linear(197, 192, 192).method == "direct"
    assert plan_linear(4096, 64, 64).method == "direct"
    assert plan_conv2d(256, 256, (8, 8), (3, 3), padding=(1, 1)).method == "shifted_gram"
    assert plan_conv2d(64, 128, (32, 32), (5, 5), (2, 2), (2, 2)).method == "shifted_gram"
    assert plan_conv2d(3, 64, (32, 32), (3, 3), padding=(1, 1)).method == "direct"


@pytest.mark.parametrize(
    "change", [{"stride": (0, 1)}, {"kernel_size": (9, 9)}, {"padding": (-1, 0)}, {"groups": 0}, {"groups": 2}]
)
def test_plan_refuses_what_is_no_convolution(change: dict) -> None:
    with pytest.raises(ValueError, match="plan: "):
        plan_conv2d(**{"in_channels": 3, "out_channels": 4, "size": (4, 4), "kernel_size": (3, 3), **change})


def test_planning_takes_no_time_for_large_kernels() -> None:
    big = (2**20, 2**20)
    assert plan_conv2d(1, 1, big, big, big).multiply_adds["direct"] == 2.0**40


# errors

LINEAR = {"input": torch.randn(2, 3, 4), "grad_output": torch.randn(2, 3, 5)}
CONV2D = {
    "input": torch.randn(2, 4, 6, 6),
    "grad_output": torch.randn(2, 6, 4, 4),
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 3, 4).long()}, TypeError, "input must have dtype"),
        ({"grad_output": torch.randn(2, 3, 5).double()}, TypeError, "grad_output must have dtype Float like input"),
        ({"grad_output": None}, TypeError, "grad_output must be a tensor"),
        ({"input": 3}, TypeError, "input"),
        ({"input": torch.randn(4)}, ValueError, r"must be \[batch, \*, in\] .* got \[4\] and \[2, 3, 5\]"),
        ({"grad_output": torch.randn(2, 4, 5)}, ValueError, r"got \[2, 3, 4\] and \[2, 4, 5\]"),
        ({"grad_output": torch.randn(3, 3, 5)}, ValueError, r"got \[2, 3, 4\] and \[3, 3, 5\]"),
        ({"method": "ghost"}, ValueError, "method must be auto, outer, direct or gram, got ghost"),
        ({"method": "outer"}, ValueError, "outer needs a single position"),
        ({"grad_output": torch.empty(2, 3, 5, device="meta")}, ValueError, "grad_output must be on"),
    ],
)
def test_linear_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_grad_sqnorm(**{**LINEAR, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(2, 4, 6)}, ValueError, r"must be \[batch, in, height, width\]"),
        (
            {"grad_output": torch.randn(2, 6, 5, 4)},
            ValueError,
            r"the gradient of .* got \[2, 6, 5, 4\]",
        ),
        ({"kernel_size": (0, 3)}, ValueError, r"kernel_size must be in \[1, 2\^31\), got 0"),
        ({"kernel_size": (9, 9)}, ValueError, "kernel 9 x 9"),
        ({"kernel_size": (3,)}, ValueError, "kernel_size must be two numbers, got 1"),
        ({"stride": (1, -1)}, ValueError, r"stride must be in \[1, 2\^31\), got -1"),
        ({"padding": (-1, 0)}, ValueError, r"padding must be in \[0, 2\^31\), got -1"),
        ({"padding": (2**30, 2**30), "kernel_size": (2**30, 2**30)}, ValueError, "less than 2\\^31 pixels"),
        ({"dilation": (2**40, 1)}, ValueError, r"dilation must be in \[1, 2\^31\), got 1099511627776"),
        ({"groups": 4}, ValueError, "groups must divide the 4 input and 6 output channels, got 4"),
        ({"groups": 0}, ValueError, "groups must divide"),
        ({"method": "gram"}, ValueError, "direct or shifted_gram, got gram"),
    ],
)
def test_conv2d_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conv2d_grad_sqnorm(**{**CONV2D, **change})
