from itertools import product

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from memloc_ext.ops.ablation import conv2d_ablation
from memloc_ext.reference import ablation as reference

op = torch.ops.memloc_ext.conv2d_ablation.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SAME = ((1, 1), (1, 1), (1, 1))  # stride, padding, dilation of a 3 x 3 convolution that keeps the size
RESIDUALS = ["none", "shared", "own"]


def case(
    variants: int,
    batch: int,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    geometry: tuple = SAME,
    residual: str = "none",
    epilogue: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list | None:
    """Return arguments, or None where the kernel is larger than the image."""
    axes = zip(size, kernel, *geometry, strict=True)
    positions = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
    if min(positions) < 1:
        return None
    shape = (batch, outputs, *positions)
    residuals = {"none": None, "shared": shape, "own": (variants, *shape)}
    make = lambda *sizes: torch.randn(*sizes).to(device, dtype)  # noqa: E731
    tensors = [make(*shape), make(variants, batch, *size), make(outputs, inputs, *kernel)]
    channels = torch.randint(max(1, inputs), (variants,)).to(device)
    scale, shift = (make(outputs), make(outputs)) if epilogue else (None, None)
    sizes = residuals[residual]
    return [*tensors, channels, *geometry, scale, shift, None if sizes is None else make(*sizes), epilogue]


def to(arguments: list, dtype: torch.dtype) -> list:
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def magnitudes(arguments: list) -> list:
    return [a.abs() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def check(arguments: list) -> Tensor:
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    actual = conv2d_ablation(*arguments)
    output = arguments[0]
    assert (actual.dtype, actual.device) == (output.dtype, output.device)
    assert actual.is_contiguous()
    wide = to(arguments, torch.float64)
    exact, magnitude = reference.conv2d_ablation(*wide), reference.conv2d_ablation(*magnitudes(wide))
    assert_accurate(actual, exact, magnitude, arguments[2][0, 0].numel() + 4)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True) if isinstance(a, Tensor))
    return actual


# what is computed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("size", [(6, 6), (8, 8), (32, 32), (1, 1), (2, 3), (4, 4), (7, 33), (40, 24), (1, 100)])
def test_sizes(size: tuple[int, int], residual: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    for outputs in (1, 13, 64):
        check(case(3, 2, 5, outputs, size, (3, 3), SAME, residual, dtype=dtype, device=device))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_examples(dtype: torch.dtype, residual: str, device: torch.device) -> None:
    torch.manual_seed(0)
    for size, geometry in (((8, 8), SAME), ((32, 32), SAME), ((9, 7), ((2, 2), (1, 1), (1, 1)))):
        arguments = case(7, 1, 5, 13, size, (3, 3), geometry, residual, dtype=dtype, device=device)
        assert arguments is not None
        arguments[0] = torch.randn(4, *arguments[0].shape[1:]).to(arguments[0])
        if residual == "shared":
            arguments[9] = torch.randn(arguments[0].shape).to(arguments[0])
        check([*arguments, torch.tensor([3, 0, 1, 1, 2, 3, 0], device=device)])


def test_examples_that_do_not_exist() -> None:
    arguments = case(3, 1, 5, 4, (6, 6), (3, 3))
    assert arguments is not None
    with pytest.raises(ValueError, match=r"examples must be in \[0, 1\), got 2"):
        conv2d_ablation(*arguments, torch.tensor([0, 2, 0]))
    with pytest.raises(ValueError, match=r"examples must have shape \[3\] like channels, got \[2\]"):
        conv2d_ablation(*arguments, torch.tensor([0, 0]))
    with pytest.raises((TypeError, ValueError), match="examples must have dtype int64"):
        conv2d_ablation(*arguments, torch.tensor([0, 0, 0], dtype=torch.int32))


def test_geometries(device: torch.device) -> None:
    torch.manual_seed(0)
    kernels = [
        ((1, 1), (0, 0)),
        ((3, 3), (1, 1)),
        ((5, 5), (2, 2)),
        ((3, 2), (1, 0)),
        ((7, 7), (3, 5)),
        ((31, 31), (15, 15)),
    ]
    checked = 0
    for (kernel, padding), stride, dilation, size in product(
        kernels, [(1, 1), (2, 2), (3, 1)], [(1, 1), (2, 3)], [(6, 6), (11, 8), (32, 32), (33, 40)]
    ):
        arguments = case(2, 3, 4, 17, size, kernel, (stride, padding, dilation), "shared", device=device)
        if arguments is not None:
            check(arguments)
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(88, 101), (171, 60), (3, 7000)])
def test_images_beyond_the_shared_memory_of_a_gpu(
    size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    for stride in (1, 2):
        check(case(2, 1, 3, 9, size, (3, 3), ((stride, stride), (1, 1), (1, 1)), dtype=dtype, device=device))


def test_it_is_the_layer_on_the_changed_input() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(4, 6, 9, 9), torch.nn.Conv2d(6, 10, 3, padding=1)
    norm = torch.nn.BatchNorm2d(10).eval()
    norm.running_mean, norm.running_var = torch.randn(10), torch.rand(10) + 0.5
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    channels = torch.tensor([5, 0, 3])
    change = -x[:, channels].transpose(0, 1)
    actual = conv2d_ablation(layer(x), change, layer.weight, channels, *SAME, scale, shift, None, True)
    for k, channel in enumerate(channels):
        masked = x.clone()
        masked[:, channel] = 0
        torch.testing.assert_close(actual[k], torch.relu(norm(layer(masked))), atol=1e-5, rtol=1e-4)
    assert not actual.requires_grad


@pytest.mark.parametrize("epilogue", range(5))
def test_each_part_of_the_epilogue_may_be_left_out(epilogue: int, device: torch.device) -> None:
    arguments = case(3, 2, 4, 9, (6, 6), (3, 3), residual="own", device=device)
    arguments[7 + epilogue : 8 + epilogue] = [False if epilogue == 3 else None] if epilogue < 4 else []
    check(arguments)


VIEWS = {
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.transpose(-1, 0).contiguous().transpose(-1, 0),
    "expanded": lambda t: t[:1].expand(t.shape),
    "offset": lambda t: torch.cat([t.flatten(), t.flatten()[:1]])[1:].view(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, device: torch.device) -> None:
    arguments = case(4, 3, 5, 8, (8, 8), (3, 3), residual="own", device=device)
    check([VIEWS[view](a) if isinstance(a, Tensor) else a for a in arguments])


@pytest.mark.parametrize("size", [(16, 16), (24, 30), (6, 6)])
def test_more_than_the_cache(size: tuple[int, int], device: torch.device) -> None:
    variants = 40_000_000 // (4 * 2 * 64 * size[0] * size[1]) + 1
    check(case(variants, 2, 3, 64, size, (3, 3), device=device))


def test_nothing(device: torch.device) -> None:
    for variants, batch, outputs in ((0, 2, 3), (2, 0, 3), (2, 2, 0), (0, 0, 0)):
        arguments = case(variants, batch, 4, outputs, (5, 5), (3, 3), residual="own", device=device)
        assert conv2d_ablation(*arguments).shape == (variants, batch, outputs, 5, 5)


def test_what_is_not_finite_stays_where_it_is(device: torch.device) -> None:
    arguments = case(3, 2, 4, 20, (6, 6), (3, 3), device=device)
    output, change = arguments[:2]
    output[0, 3, 2, 2], output[1, 7, 5, 5], change[1, 0, 0, 0] = float("nan"), float("inf"), float("nan")
    arguments[-1] = False
    actual, expected = conv2d_ablation(*arguments), reference.conv2d_ablation(*arguments)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    with_relu = conv2d_ablation(*arguments[:-1], True)
    assert torch.equal(with_relu.isnan(), torch.relu(expected).isnan())


@settings(deadline=None, max_examples=100)
@given(
    data=st.data(),
    variants=st.integers(0, 4),
    batch=st.integers(0, 3),
    outputs=st.integers(1, 30),  # plain PyTorch has no convolution without outputs
    residual=st.sampled_from(RESIDUALS),
    epilogue=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_property_equals_reference(data, variants, batch, outputs, residual, epilogue, dtype) -> None:
    pair = lambda low, high: (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))  # noqa: E731
    geometry = (pair(1, 3), pair(0, 4), pair(1, 3))
    arguments = case(variants, batch, 3, outputs, pair(1, 20), pair(1, 6), geometry, residual, epilogue, dtype)
    if arguments is not None:
        check(arguments)


def test_threads_agree_bit_for_bit() -> None:
    arguments = case(5, 3, 4, 24, (9, 9), (3, 3), residual="own")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(conv2d_ablation(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


# how PyTorch sees it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variants", [0, 3])
def test_opcheck(variants: int, dtype: torch.dtype, device: torch.device) -> None:
    for residual, epilogue in product(RESIDUALS, [False, True]):
        geometry = ([2, 1], [1, 1], [1, 2])
        arguments = case(variants, 2, 4, 6, (5, 7), (3, 3), geometry, residual, epilogue, dtype, device)
        torch.library.opcheck(op, tuple(arguments))


def test_compile_fullgraph(device: torch.device) -> None:
    torch._dynamo.reset()
    arguments = case(3, 2, 4, 6, (5, 5), (3, 3), residual="shared", device=device)
    compiled = torch.compile(lambda *a: conv2d_ablation(*a) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), 2 * conv2d_ablation(*arguments))


def test_the_operator_does_not_pretend_to_a_derivative() -> None:
    arguments = case(3, 2, 4, 6, (5, 5), (3, 3))
    arguments[0].requires_grad_()
    assert not conv2d_ablation(*arguments).requires_grad
    with pytest.raises(NotImplementedError, match="conv2d_ablation: there is no derivative"):
        op(*arguments).sum().backward()


def test_meta_tensors() -> None:
    arguments = [a.to("meta") if isinstance(a, Tensor) else a for a in case(3, 2, 4, 6, (5, 5), (3, 3))]
    assert op(*arguments).shape == (3, 2, 6, 5, 5)


def test_autocast_leaves_it_alone() -> None:
    arguments = case(3, 2, 4, 6, (5, 5), (3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv2d_ablation(*arguments), conv2d_ablation(*arguments))
        assert conv2d_ablation(*arguments).dtype == torch.float32


@pytest.mark.cuda
def test_cuda_equals_cpu_on_a_side_stream_and_in_a_graph() -> None:
    arguments = case(9, 4, 6, 50, (9, 11), (3, 3), residual="shared", device="cuda")
    expected = conv2d_ablation(*[a.cpu() if isinstance(a, Tensor) else a for a in arguments])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            actual = conv2d_ablation(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.cuda
def test_cuda_takes_a_channel_that_does_not_exist_for_one_without_weights() -> None:
    arguments = case(3, 2, 4, 6, (5, 5), (3, 3), device="cuda")
    arguments[3] = torch.tensor([1, 4, -1], device="cuda")
    actual = conv2d_ablation(*arguments)
    arguments[1][1:] = 0
    arguments[3] = torch.tensor([1, 0, 0], device="cuda")
    assert torch.equal(actual, op(*arguments))


# errors

GOOD = {
    "output": torch.randn(2, 6, 4, 5),
    "change": torch.randn(3, 2, 4, 5),
    "weight": torch.randn(6, 7, 3, 3),
    "channels": torch.tensor([0, 6, 2]),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "scale": torch.randn(6),
    "shift": torch.randn(6),
    "residual": torch.randn(2, 6, 4, 5),
    "relu": True,
}
BAD = [
    ({"output": torch.ones(2, 6, 4, 5).long()}, TypeError, "output must have dtype"),
    ({"output": 3}, TypeError, "output"),
    ({"change": torch.randn(3, 2, 4, 5).half()}, TypeError, "change must have dtype Float like output, got Half"),
    ({"weight": torch.randn(6, 7, 3, 3).double()}, TypeError, "weight must have dtype Float like output"),
    ({"scale": torch.randn(6).double()}, TypeError, "scale must have dtype Float like output, got Double"),
    ({"channels": torch.tensor([0, 6, 2]).int()}, TypeError, "channels must have dtype int64, got Int"),
    ({"channels": None}, TypeError, "channels"),
    ({"channels": torch.tensor([[0, 6, 2]])}, ValueError, r"channels must have shape \[variants\], got \[1, 3\]"),
    ({"channels": torch.tensor([0, 7, 2])}, ValueError, r"channels must be in \[0, 7\), got 7"),
    ({"channels": torch.tensor([0, -1, 2])}, ValueError, r"channels must be in \[0, 7\), got -1"),
    ({"channels": torch.tensor([0, 1])}, ValueError, r"change must be .* with 2 channels .* got \[3, 2, 4, 5\]"),
    ({"weight": torch.randn(6, 7, 3)}, ValueError, r"weight must be \[out, in, height, width\], got \[6, 7, 3\]"),
    ({"weight": torch.randn(5, 7, 3, 3)}, ValueError, r"output must be \[batch, 5, rows, columns\]"),
    ({"weight": torch.randn(6, 7, 9, 3)}, ValueError, "output must be the convolution's, .* kernel 9 x 3"),
    ({"weight": torch.randn(6, 7, 0, 3)}, ValueError, r"kernel_size must be in \[1, 2\^31\), got 0"),
    ({"change": torch.randn(3, 1, 4, 5)}, ValueError, r"change must be \[variants, batch, height, width\]"),
    ({"change": torch.randn(3, 2, 5, 5)}, ValueError, r"output must be the convolution's, got \[2, 6, 4, 5\]"),
    ({"stride": (2, 1)}, ValueError, "output must be the convolution's"),
    ({"stride": (0, 1)}, ValueError, r"stride must be in \[1, 2\^31\), got 0"),
    ({"stride": (1, 1, 1)}, ValueError, "stride must be two numbers, got 3"),
    ({"padding": (-1, 1)}, ValueError, r"padding must be in \[0, 2\^31\), got -1"),
    ({"dilation": (1, 2**40)}, ValueError, r"dilation must be in \[1, 2\^31\)"),
    ({"scale": torch.randn(5)}, ValueError, r"scale must have shape \[6\], got \[5\]"),
    ({"shift": torch.randn(6, 1)}, ValueError, r"shift must have shape \[6\], got \[6, 1\]"),
    ({"residual": torch.randn(2, 6, 4, 1)}, ValueError, r"residual must be shaped like output or like the result"),
    ({"residual": torch.randn(2, 2, 6, 4, 5)}, ValueError, "residual must be shaped"),
    ({"change": torch.empty(3, 2, 4, 5, device="meta")}, ValueError, "must be on"),
    ({"relu": "yes"}, TypeError, "relu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conv2d_ablation(**{**GOOD, **change})


@pytest.mark.parametrize("change", [change for change, _, _ in BAD])
def test_the_operator_itself_refuses_too(change: dict) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        op(**{**GOOD, **change})


def test_the_plain_way_is_a_convolution() -> None:
    change, weight = torch.randn(3, 2, 4, 5), GOOD["weight"]
    plain = functional.conv2d(change[1, :, None], weight[:, 6:], padding=1)
    actual = conv2d_ablation(torch.zeros(2, 6, 4, 5), change, weight, GOOD["channels"], *SAME)
    torch.testing.assert_close(actual[1], plain, atol=1e-5, rtol=1e-5)
