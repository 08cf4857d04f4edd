"""Per-example gradient norms on CUDA, against float64."""

from collections.abc import Iterator

import pytest
import torch
from test_grad_sqnorm import assert_conv2d_norms, assert_linear_norms, geometries, output
from torch import Tensor

from memloc_ext.ops import conv2d_grad_sqnorm, linear_grad_sqnorm
from memloc_ext.reference import grad_sqnorm as reference

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SAME = ((3, 3), (1, 1), (1, 1), (1, 1))  # kernel, stride, padding, dilation of a convolution that keeps the size
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_linear(x: Tensor, g: Tensor, method: str) -> None:
    actual = linear_grad_sqnorm(x.cuda(), g.cuda(), method=method)
    assert (actual.dtype, actual.shape, actual.is_cuda) == (computed(x.dtype), x.shape[:1], True)
    assert_linear_norms(actual.cpu(), x.cpu(), g.cpu(), method)


def check_conv2d(x: Tensor, g: Tensor, method: str, *geometry) -> None:
    actual = conv2d_grad_sqnorm(x.cuda(), g.cuda(), *geometry, method=method)
    assert (actual.dtype, actual.shape, actual.is_cuda) == (computed(x.dtype), x.shape[:1], True)
    assert_conv2d_norms(actual.cpu(), x.cpu(), g.cpu(), method, *geometry)


# what is computed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "direct", "gram"])
@pytest.mark.parametrize("positions", [(), (1,), (7,), (3, 5), (2, 3, 4), (1024,)])
def test_linear(positions: tuple[int, ...], method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for inputs, outputs in ((19, 33), (1, 1), (130, 70), (3, 5)):
        x, g = torch.randn(3, *positions, inputs, dtype=dtype), torch.randn(3, *positions, outputs, dtype=dtype)
        check_linear(x, g, method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(5, 70, 13), (2, 5001, 9003), (70000, 3, 2)])
def test_outer(batch: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(batch, inputs, dtype=dtype), torch.randn(batch, outputs, dtype=dtype)
    check_linear(x, g, "outer")
    check_linear(torch.randn(batch, 2 * inputs + 1, dtype=dtype).cuda()[:, 1::2], g.cuda(), "outer")


@pytest.mark.parametrize("method", ["auto", "direct", "shifted_gram"])
@pytest.mark.parametrize("last", [False, True])
def test_conv2d_geometries(last: bool, method: str) -> None:
    torch.manual_seed(0)
    checked = 0
    for geometry in geometries():
        x = torch.randn(2, 6, 11, 8)
        g = output(x, 4, *geometry)
        if g is not None:
            memory = {"memory_format": LAST} if last else {}
            check_conv2d(x.to(**memory), g.to(**memory), method, *geometry)
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["direct", "shifted_gram"])
@pytest.mark.parametrize(
    "shape", [(3, 64, 6, 6, 40), (2, 1, 32, 32, 5), (2, 17, 1, 1, 3), (1, 40, 4, 1, 40), (2, 20, 9, 9, 130)]
)
def test_conv2d_shapes(shape: tuple[int, ...], method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, channels, height, width, outputs = shape
    x, g = torch.randn(batch, channels, height, width), torch.randn(batch, outputs, height, width)
    check_conv2d(x.to(dtype), g.to(dtype), method, *SAME, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["direct", "shifted_gram"])
def test_strides(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(3, 12, 9, 9, dtype=dtype, device="cuda"), torch.randn(3, 24, 9, 9, dtype=dtype, device="cuda")
    check_conv2d(x, g, method, *SAME, 12)
    check_conv2d(x.to(memory_format=LAST), g, method, *SAME, 3)
    check_conv2d(x, g.to(memory_format=LAST), method, *SAME, 1)
    wide = torch.randn(3, 12, 9, 20, dtype=dtype, device="cuda")[..., 1:19:2]
    check_conv2d(wide, g[:1].expand(3, -1, -1, -1), method, *SAME, 2)
    check_conv2d(x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1), g, method, *SAME, 1)
    linear = "gram" if method == "shifted_gram" else method
    rows = torch.randn(19, 4, 2 * 9, dtype=dtype, device="cuda").transpose(0, 1)[:, :, ::2].transpose(1, 2)
    check_linear(rows, torch.randn(1, 1, 11, dtype=dtype, device="cuda").expand(4, 9, 11), linear)
    check_linear(rows[:, :8].unflatten(1, (2, 4)).transpose(1, 2), rows[:, 1:].unflatten(1, (4, 2)), linear)


@pytest.mark.parametrize("method", ["auto", "direct", "gram"])
def test_nothing_is_zero(method: str) -> None:
    conv2d = "shifted_gram" if method == "gram" else method
    for x, g in (((0, 4, 3), (0, 4, 5)), ((2, 0, 3), (2, 0, 5)), ((2, 4, 0), (2, 4, 5)), ((2, 4, 3), (2, 4, 0))):
        norms = linear_grad_sqnorm(torch.randn(x, device="cuda"), torch.randn(g, device="cuda"), method=method)
        assert torch.equal(norms.cpu(), torch.zeros(x[0]))
    for batch, inputs, outputs in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x, g = torch.randn(batch, inputs, 5, 5, device="cuda"), torch.randn(batch, outputs, 5, 5, device="cuda")
        norms = conv2d_grad_sqnorm(x, g, (1, 1), (1, 1), (0, 0), (1, 1), 1, method=conv2d)
        assert torch.equal(norms.cpu(), torch.zeros(batch))


@pytest.mark.parametrize("method", ["direct", "gram"])
def test_more_than_one_chunk_of_scratch(method: str) -> None:
    torch.manual_seed(0)
    check_linear(torch.randn(40, 1024, 9), torch.randn(40, 1024, 5), method)  # bands of positions, chunks of examples
    check_linear(torch.randn(5000, 7, 3), torch.randn(5000, 7, 4), method)
    conv2d = "shifted_gram" if method == "gram" else method
    x, g = torch.randn(2, 40, 32, 32), torch.randn(2, 40, 32, 32)
    check_conv2d(x, g, conv2d, *SAME, 40)  # chunks of groups
    x, g = torch.randn(1, 3, 300, 40), torch.randn(1, 2, 150, 20)
    check_conv2d(x, g, conv2d, (3, 3), (2, 2), (1, 1), (1, 1), 1)


def test_more_examples_than_blocks_so_that_one_takes_several_tiles() -> None:
    check_linear(torch.randn(9000, 2, 200), torch.randn(9000, 2, 3), "direct")


def test_rows_longer_than_a_band() -> None:
    check_conv2d(torch.randn(1, 2, 3, 300), torch.randn(1, 3, 3, 300), "shifted_gram", *SAME, 1)


def test_gram_keeps_what_the_cancellation_leaves() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(4, 64, 32, device="cuda") + 10, torch.randn(4, 64, 16, device="cuda")
    g -= g.mean(1, keepdim=True)
    exact = reference.linear_grad_sqnorm(x.double(), g.double())
    for method, allowed in (("direct", 1e-6), ("gram", 1e-4)):
        assert ((linear_grad_sqnorm(x, g, method=method) - exact) / exact).abs().max() < allowed
    constant = torch.ones(2, 8, 5, device="cuda")
    assert (linear_grad_sqnorm(constant, constant - 1, method="gram") >= 0).all()


def test_rounding_makes_no_norm_negative() -> None:
    g = torch.randn(64, 5, 4, device="cuda")
    norms = linear_grad_sqnorm(torch.ones(64, 5, 3, device="cuda"), g - g.mean(1, keepdim=True), method="gram")
    assert (norms >= 0).all()
    assert (norms < 1e-5).all()


def test_what_is_not_finite_stays_with_its_example() -> None:
    x, g = torch.randn(6, 20, 7, 7, device="cuda"), torch.randn(6, 9, 7, 7, device="cuda")
    x[[0, 2, 4]] = float("nan")
    x[5] = float("inf")
    for method in ("direct", "shifted_gram"):
        norms = conv2d_grad_sqnorm(x, g, *SAME, 1, method=method)
        assert norms[[1, 3]].isfinite().all()
        assert not norms[[0, 2, 4, 5]].isfinite().any()


def test_offsets_beyond_32_bits() -> None:
    far = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 3 * far:
        pytest.skip("needs 4 GiB of the device's memory, and some more")
    memory = torch.empty(far + 64, dtype=torch.float16, device="cuda")
    x = memory.as_strided((2, 3, 4), (far, 4, 1)).normal_()
    g = torch.randn(2, 3, 5, device="cuda").half()
    for method in ("direct", "gram"):
        check_linear(x, g, method)
    apart = memory.as_strided((1, 2, 1, 6), (1, far, 1, 1))  # channels
    grad = torch.randn(1, 3, 1, 6, device="cuda").half()
    for method in ("direct", "shifted_gram"):
        check_conv2d(apart, grad, method, (1, 1), (1, 1), (0, 0), (1, 1), 1)


# how it runs

CALLS = [
    ("direct", "direct"),
    ("gram", "shifted_gram"),
]


def both(x: Tensor, g: Tensor, method: tuple[str, str]) -> list[Tensor]:
    rows = [t.flatten(2).transpose(1, 2) for t in (x, g)]
    linear, conv2d = method
    return [linear_grad_sqnorm(*rows, method=linear), conv2d_grad_sqnorm(x, g, *SAME, 1, method=conv2d)]


@pytest.mark.parametrize("method", CALLS)
def test_the_same_bits_twice(method: tuple[str, str]) -> None:
    x, g = torch.randn(37, 48, 16, 16, device="cuda"), torch.randn(37, 40, 16, 16, device="cuda")
    for first, second in zip(both(x, g, method), both(x, g, method), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("method", CALLS)
def test_on_a_side_stream_and_in_a_graph(method: tuple[str, str]) -> None:
    x, g = torch.randn(64, 24, 8, 8, device="cuda"), torch.randn(64, 32, 8, 8, device="cuda")
    expected = both(x.cpu(), g.cpu(), method)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = both(x, g, method)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = both(x, g, method)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close([t.cpu() for t in aside], expected, rtol=1e-5, atol=0)
    graph.replay()
    torch.testing.assert_close([t.cpu() for t in captured], expected, rtol=1e-5, atol=0)
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close([t.cpu() for t in captured], [4 * t for t in expected], rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", CALLS)
def test_autocast_and_autograd_leave_it_alone(method: tuple[str, str]) -> None:
    x, g = torch.randn(5, 24, 8, 8, device="cuda"), torch.randn(5, 32, 8, 8, device="cuda")
    expected = both(x, g, method)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        cast = both(x, g, method)
    for actual, plain in zip(cast, expected, strict=True):
        assert torch.equal(actual, plain)
    operator = torch.ops.memloc_ext.conv2d_grad_sqnorm
    direct = operator(x.requires_grad_(), g, *map(list, SAME), 1, method=method[1])
    assert torch.equal(direct.detach(), expected[1])


def test_scratch_is_bounded() -> None:
    x, g = torch.randn(64, 4096, 8, device="cuda"), torch.randn(64, 4096, 8, device="cuda")
    linear_grad_sqnorm(x[:1], g[:1], method="gram")  # makes the library's own workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_grad_sqnorm(x, g, method="gram")
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20  # the Grams of one example take 128 MiB


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch: int) -> None:
    x, g = torch.randn(batch, 3, 6, device="cuda"), torch.randn(batch, 3, 4, device="cuda")
    torch.library.opcheck(torch.ops.memloc_ext.linear_grad_sqnorm.default, (x, g))
    torch.library.opcheck(torch.ops.memloc_ext.linear_grad_sqnorm.default, (x.half(), g.half()), {"method": "gram"})
    image, grad = torch.randn(batch, 4, 5, 5, device="cuda"), torch.randn(batch, 6, 5, 5, device="cuda")
    torch.library.opcheck(
        torch.ops.memloc_ext.conv2d_grad_sqnorm.default, (image, grad, [3, 3], [1, 1], [1, 1], [1, 1], 2)
    )


def test_operands_on_two_devices_are_refused() -> None:
    x, g = torch.randn(2, 3, 4, device="cuda"), torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="grad_output must be on the device of input"):
        linear_grad_sqnorm(x, g)
    with pytest.raises(ValueError, match="grad_output must be on the device of input"):
        linear_grad_sqnorm(x.cpu(), g.cuda())
    with pytest.raises(ValueError, match="direct or shifted_gram, got gram"):
        conv2d_grad_sqnorm(x[..., None], x[..., None], (1, 1), (1, 1), (0, 0), (1, 1), 1, method="gram")
