import itertools
from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memloc_ext.ops.kept_conv2d import kept_conv2d

OPS = torch.ops.memloc_ext
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SAME = ([1, 1], [1, 1], [1, 1], 1)


def some_of(batch: int, channels: int, kept: int = 1) -> Tensor:
    """Return a mask that keeps so many channels of each example, and none of the last one."""
    keep = torch.zeros(batch, channels, dtype=torch.bool)
    for b in range(batch - 1):
        keep[b, torch.randperm(channels)[:kept]] = True
    return keep


def skips(x: Tensor, keep: Tensor, weight: Tensor, *geometry) -> bool:
    """Return whether the operator takes its own kernel, not the library's convolution."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        OPS.kept_conv2d(x, keep, weight, None, *geometry)
    return not any(event.key == "aten::convolution" for event in profile.key_averages())


def results(x: Tensor, keep: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, *geometry) -> list[Tensor]:
    """Return the convolution of zeros where a channel is not kept, and its gradients by ``x`` and ``weight``."""
    with torch.enable_grad():
        x, weight = torch.where(keep[..., None, None], x, 0).requires_grad_(), weight.clone().requires_grad_()
        y = torch.conv2d(x, weight, bias, *geometry)
    by_x, by_weight = torch.autograd.grad(y, (x, weight), grad)
    return [y.detach(), torch.where(keep[..., None, None], by_x, 0), by_weight]


def check(x: Tensor, keep: Tensor, weight: Tensor, bias: Tensor | None, *geometry) -> None:
    """Hold the operator and its gradients against float64; where a channel is not kept there are NaNs."""
    groups = geometry[-1]
    y = torch.conv2d(x.double(), weight.double(), None, *geometry)
    grad = torch.randn(y.shape).to(x)
    wide = [t if t is None or t.dtype == torch.bool else t.double() for t in (x, keep, weight, bias, grad)]
    exact = results(*wide, *geometry)
    magnitude = results(*(t if t is None or t.dtype == torch.bool else t.abs() for t in wide), *geometry)
    poisoned = torch.where(keep[..., None, None], x, float("nan"))
    if x.is_contiguous(memory_format=torch.channels_last):
        poisoned = poisoned.to(memory_format=torch.channels_last)
    ours = [
        OPS.kept_conv2d(poisoned, keep, weight, bias, *geometry),
        OPS.kept_conv2d_input_grad(grad, keep, weight, x.shape[2:], *geometry),
        OPS.kept_conv2d_weight_grad(grad, poisoned, keep, weight.shape[2:], *geometry),
    ]
    offsets, outputs = weight[0, 0].numel() if weight.numel() else 0, len(weight) // groups
    terms = [weight[:1].numel() + 1, outputs * offsets, y[:, :1].numel()]
    for actual, expected, size, count in zip(ours, exact, magnitude, terms, strict=True):
        assert actual.dtype == x.dtype
        assert actual.is_contiguous()
        assert_accurate(actual, expected, size, count)
    assert not ours[1][~keep].any()


def geometries() -> Iterator[tuple]:
    for kernel, stride, padding, dilation in itertools.product(
        [(1, 1), (3, 3), (2, 5)], [[1, 1], [2, 3]], [[0, 0], [2, 1]], [[1, 1], [2, 1]]
    ):
        yield kernel, (stride, padding, dilation, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_geometries(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    for kernel, geometry in geometries():
        for height, width in ((13, 9), (9, 21)):
            x, weight = torch.randn(3, 11, height, width, dtype=dtype), torch.randn(15, 11, *kernel, dtype=dtype)
            bias = torch.randn(15, dtype=dtype) if height < width else None
            keep = some_of(3, 11)
            check(*(t if t is None else t.to(device) for t in (x, keep, weight, bias)), *geometry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 40, 6, 6, 33), (2, 64, 1, 1, 48), (4, 48, 2, 2, 16), (1, 20, 17, 3, 1)])
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if torch.empty(0, device=device).is_cuda and dtype.itemsize == 2:
        pytest.skip("the library's sums, in whatever it adds up 16 bits")
    torch.manual_seed(0)
    batch, channels, height, width, outputs = shape
    x, weight = torch.randn(batch, channels, height, width).to(dtype), torch.randn(outputs, channels, 3, 3).to(dtype)
    keep = some_of(batch + 1, channels)[:batch]
    bias = torch.randn(outputs).to(dtype)
    check(*(t.to(device) for t in (x, keep, weight, bias)), *SAME)
    check(*(t.to(device) for t in (x, torch.ones_like(keep), weight, bias)), *SAME)


def test_sums_longer_than_a_chain_and_images_in_parts() -> None:
    torch.manual_seed(0)
    keep = some_of(3, 300, 60)
    check(torch.randn(3, 300, 23, 17), keep, torch.randn(520, 300, 3, 3), torch.randn(520), *SAME)
    check(torch.randn(3, 5, 150, 41), some_of(3, 5), torch.randn(40, 5, 2, 3), None, [2, 1], [1, 0], [1, 2], 1)


def test_a_kernel_longer_than_a_chain() -> None:
    x, weight = torch.full((2, 30, 45, 41), 0.37), torch.full((20, 30, 40, 40), 0.37)  # roundings all go the same way
    keep = some_of(2, 30, 2)
    assert skips(x, keep, weight, [1, 1], [0, 0], [1, 1], 1)
    check(x, keep, weight, None, [1, 1], [0, 0], [1, 1], 1)


def test_channels_last_views_and_groups(device: torch.device) -> None:
    torch.manual_seed(0)
    x, weight, keep = torch.randn(3, 12, 9, 9), torch.randn(16, 12, 3, 3), some_of(3, 12).to(device)
    last = torch.channels_last
    check(x.to(device, memory_format=last), keep, weight.to(device, memory_format=last), None, *SAME)
    check(torch.randn(3, 12, 9, 20, device=device)[..., 1:19:2], keep, weight.to(device), None, *SAME)
    keep = some_of(12, 3).t()  # strided; some groups keep nothing
    check(x.to(device), keep.to(device), torch.randn(48, 4, 3, 3, device=device), None, *SAME[:3], 3)


def test_nothing(device: torch.device) -> None:
    x, weight = torch.randn(0, 3, 5, 5, device=device), torch.randn(4, 3, 3, 3, device=device)
    check(x, torch.ones(0, 3, dtype=torch.bool, device=device), weight, None, *SAME)
    x, keep, bias = torch.randn(2, 3, 5, 5), torch.zeros(2, 3, dtype=torch.bool), torch.randn(4)
    y = kept_conv2d(x.to(device), keep.to(device), weight, bias.to(device), padding=1)
    assert torch.equal(y.cpu(), bias.view(1, 4, 1, 1).expand(2, 4, 5, 5))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), batch=st.integers(0, 4), groups=st.integers(1, 2), share=st.sampled_from([0.1, 0.3, 1.0]))
def test_property(data, batch: int, groups: int, share: float) -> None:
    pair = lambda low, high: [data.draw(st.integers(low, high)), data.draw(st.integers(low, high))]  # noqa: E731
    kernel, stride, padding, dilation = pair(1, 5), pair(1, 3), pair(0, 3), pair(1, 2)
    size = pair(1, 14)
    if any(d * (k - 1) >= n + 2 * p for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)):
        return
    inputs, outputs = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    x = torch.randn(batch, groups * inputs, *size, dtype=torch.float64)
    weight = torch.randn(groups * outputs, inputs, *kernel, dtype=torch.float64)
    keep = torch.rand(x.shape[:2]) < share
    for dtype in (torch.float64, torch.float32):
        check(x.to(dtype), keep, weight.to(dtype), None, stride, padding, dilation, groups)


def test_skips_where_that_pays() -> None:
    x, weight = torch.randn(4, 50, 16, 16), torch.randn(32, 50, 3, 3)
    assert skips(x, some_of(4, 50, 14), weight, *SAME)
    assert skips(
        x[:3, :11, :5, :3], some_of(3, 11), weight[:15, :11], *SAME
    )  # the fewest positions of `test_geometries`
    assert not skips(x, some_of(4, 50, 50) | True, weight, *SAME)
    assert not skips(x[..., :2, :2], some_of(4, 50, 14), weight, *SAME)
    assert not skips(x, some_of(4, 50, 14), torch.randn(50, 1, 3, 3), *SAME[:3], 50)


def test_an_example_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    x, keep, weight = torch.randn(5, 20, 9, 9), some_of(5, 20, 4), torch.randn(30, 20, 3, 3)
    y = kept_conv2d(x, keep, weight, padding=1)
    for b in range(5):
        alone = kept_conv2d(x[b : b + 1], keep[b : b + 1], weight, padding=1)
        assert torch.equal(y[b : b + 1], alone)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads_agree_bit_for_bit(batch: int) -> None:
    torch.manual_seed(0)
    x, keep, weight = torch.randn(batch, 70, 12, 12), some_of(batch + 1, 70, 9)[:batch], torch.randn(40, 70, 3, 3)
    grad = torch.randn(batch, 40, 12, 12)
    threads, first = torch.get_num_threads(), None
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            ours = (
                OPS.kept_conv2d(x, keep, weight, None, *SAME),
                OPS.kept_conv2d_input_grad(grad, keep, weight, [12, 12], *SAME),
                OPS.kept_conv2d_weight_grad(grad, x, keep, [3, 3], *SAME),
            )
            first = first or ours
            assert all(map(torch.equal, ours, first))
    finally:
        torch.set_num_threads(threads)


def samples(device: torch.device) -> list[tuple]:
    x = torch.randn(3, 12, 6, 6, device=device)
    keep, weight = some_of(3, 12, 2).to(device), torch.randn(16, 12, 3, 3, device=device)
    bias, grad = torch.randn(16, device=device), torch.randn(3, 16, 3, 6, device=device)
    geometry = ([2, 1], [1, 1], [1, 1], 1)
    return [
        ("kept_conv2d", x.clone().requires_grad_(), keep, weight.clone().requires_grad_(), bias, *geometry),
        ("kept_conv2d", x.bfloat16(), keep, weight.bfloat16().requires_grad_(), None, *geometry),
        ("kept_conv2d_input_grad", grad, keep, weight, [6, 6], *geometry),
        ("kept_conv2d_weight_grad", grad, x, keep, [3, 3], *geometry),
    ]


@pytest.mark.parametrize("index", range(4))
def test_opcheck(index: int, device: torch.device) -> None:
    name, *arguments = samples(device)[index]
    torch.library.opcheck(getattr(OPS, name).default, tuple(arguments))


def test_gradients_have_no_derivative_of_their_own() -> None:
    for name, first, *rest in samples(torch.device("cpu"))[2:]:
        result = getattr(OPS, name)(first.requires_grad_(), *rest)
        with pytest.raises(NotImplementedError, match=f"{name}: there is no derivative"):
            result.sum().backward()


# errors

GOOD = {
    "x": torch.randn(2, 4, 5, 5), "keep": torch.ones(2, 4) > 0, "weight": torch.randn(6, 4, 3, 3), "bias": None,
    "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
}  # fmt: skip
BAD = [
    ({"x": torch.ones(2, 4, 5, 5).int()}, "x must have dtype float16, bfloat16, float32 or float64, got Int"),
    ({"x": torch.ones(2, 4, 5)}, r"x must be \[batch, in, height, width\], got \[2, 4, 5\]"),
    ({"weight": torch.ones(6, 4, 3, 3).double()}, "weight must have dtype Float like x, got Double"),
    ({"weight": torch.ones(6, 4, 3)}, r"weight must be \[out, in / groups, height, width\], got \[6, 4, 3\]"),
    ({"weight": torch.ones(6, 3, 3, 3)}, "weight must have 4 input channels per group, got 3"),
    (
        {"weight": torch.ones(6, 4, 8, 3)},
        "a kernel of 8 x 3 with dilation 1 x 1 must fit into the padded image of 7 x 7",
    ),
    ({"weight": torch.ones(0, 4, 3, 3)}, "weight must have at least one output and input channel, got 0 and 4"),
    ({"weight": torch.ones(6, 4, 0, 3)}, "kernel_size must be in"),
    ({"bias": torch.ones(5)}, r"bias must have shape \[6\], got \[5\]"),
    ({"bias": torch.ones(6).half()}, "bias must have dtype Float like x, got Half"),
    ({"keep": torch.ones(2, 4)}, "keep must have dtype bool, got Float"),
    ({"keep": torch.ones(2, 5) > 0}, r"keep must have shape \[2, 4\], got \[2, 5\]"),
    ({"keep": torch.ones(4) > 0}, r"keep must have shape \[2, 4\], got \[4\]"),
    ({"stride": [0, 1]}, "stride must be in"),
    ({"stride": [1]}, "stride must be two numbers, got 1"),
    ({"padding": [-1, 1]}, "padding must be in"),
    ({"padding": [2**30, 2**30]}, "padding must leave an image of less than"),
    ({"dilation": [1, 4]}, "a kernel of 3 x 3 with dilation 1 x 4 must fit into the padded image"),
    ({"groups": 0}, "groups must divide the 4 input and 6 output channels, got 0"),
    ({"groups": 4}, "groups must divide the 4 input and 6 output channels, got 4"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"kept_conv2d: {message}"):
        OPS.kept_conv2d(**{**GOOD, **change})


def test_bad_gradients_are_refused() -> None:
    x, grad, keep, weight = GOOD["x"], torch.ones(2, 6, 5, 5), GOOD["keep"], GOOD["weight"]
    with pytest.raises(RuntimeError, match=r"kept_conv2d_input_grad: grad must have shape \[2, 6, 5, 5\], got"):
        OPS.kept_conv2d_input_grad(grad[..., :4], keep, weight, [5, 5], *SAME)
    with pytest.raises(RuntimeError, match="kept_conv2d_input_grad: input_size must be two numbers, got 1"):
        OPS.kept_conv2d_input_grad(grad, keep, weight, [5], *SAME)
    with pytest.raises(RuntimeError, match=r"kept_conv2d_weight_grad: grad must have shape \[2, 6, 5, 5\], got"):
        OPS.kept_conv2d_weight_grad(grad[..., :4], x, keep, [3, 3], *SAME)
    with pytest.raises(RuntimeError, match="kept_conv2d_weight_grad: grad must have dtype Float like x, got Double"):
        OPS.kept_conv2d_weight_grad(grad.double(), x, keep, [3, 3], *SAME)
