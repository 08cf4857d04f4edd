import math

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memloc_ext.ops import channel_saliency
from memloc_ext.reference import channel_saliency as reference

op = torch.ops.memloc_ext.channel_saliency
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAST = torch.channels_last


def check(activation: Tensor, grad: Tensor, channel_dim: int = 1) -> None:
    actual = channel_saliency(activation, grad, channel_dim)
    computed = torch.float64 if activation.dtype == torch.float64 else torch.float32
    assert (actual.dtype, actual.device, actual.is_contiguous()) == (computed, activation.device, True)
    a, g = activation.double(), grad.double()
    exact, magnitude = (reference.channel_saliency(*pair, channel_dim) for pair in ((a, g), (a.abs(), g.abs())))
    assert_accurate(actual, exact, magnitude, math.prod(a.shape) // max(1, exact.numel()))


# reference

SHAPES = [(1, 1), (5, 3), (4, 300), (4, 5, 6), (3, 130, 1), (2, 6, 3, 5), (2, 64, 16, 16), (3, 3, 2, 3, 4)]
SHAPES += [(3, 20, 4, 4), (2, 5, 7, 7), (1, 2, 90, 91), (1, 3, 20000), (2, 1, 5, 5), (2, 257, 33)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    activation, grad = torch.randn(2, *shape).to(device, dtype)
    for channel_dim in range(1, len(shape)):
        check(activation, grad, channel_dim)
        check(activation, grad, channel_dim - len(shape))
    if len(shape) == 2:
        assert torch.equal(
            channel_saliency(activation, grad), activation.to(torch.promote_types(dtype, torch.float32)) * grad
        )


VIEWS = {
    "channels_last": lambda x: x.to(memory_format=LAST),
    "part of channels_last": lambda x: x.to(memory_format=LAST)[:, :, 1:6, 2:],
    "positions off 16 bytes": lambda x: x.to(memory_format=LAST)[:, :8],
    "examples off 16 bytes": lambda x: x.flatten().as_strided((6, 8, 6, 6), (289, 1, 48, 8)),
    "every second row": lambda x: x[:, :, ::2],
    "every second column": lambda x: x[..., ::2],
    "offset": lambda x: x[:, 1:],
    "off 16 bytes": lambda x: x.flatten()[1 : 6 * 6 * 71 + 1].view(6, 6, 71),
    "every second example": lambda x: x[::2],
    "batch and channels swapped": lambda x: x.transpose(0, 1),
    "plane transposed": lambda x: x.transpose(2, 3),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded plane": lambda x: x[:, :, :1, :1].expand(-1, -1, 8, 8),
    "expanded batch": lambda x: x[:1].expand(6, -1, -1, -1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    activation, grad = (VIEWS[view](x.to(device, dtype)) for x in torch.randn(2, 6, 12, 6, 6).unbind())
    check(activation, grad)
    check(activation, grad.contiguous())
    check(activation.contiguous(), grad)
    check(activation, grad, -1)


def test_channels_last_is_read_where_it_lies() -> None:
    activation, grad = (x.to(memory_format=LAST) for x in torch.randn(2, 8, 64, 16, 16))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op(activation, grad)
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(size for size in allocated if size > 0) == 8 * 64 * 4


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 3, 4, 0)])
def test_nothing_sums_to_zero(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape, device=device)
    assert torch.equal(channel_saliency(x, x), torch.zeros(shape[:2], device=device))


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    shape=st.lists(st.integers(0, 7), min_size=2, max_size=5),
    dtype=st.sampled_from(DTYPES),
)
def test_property_equals_reference(data, shape: list[int], dtype: torch.dtype) -> None:
    def drawn() -> Tensor:
        order = data.draw(st.permutations(range(len(shape))))
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return torch.randn([shape[d] for d in order]).to(dtype).permute(inverse)

    channel_dim = data.draw(st.integers(1, len(shape) - 1)) - data.draw(st.sampled_from([0, len(shape)]))
    check(drawn(), drawn(), channel_dim)


def test_long_sums_keep_their_digits(device: torch.device) -> None:
    for memory_format in (torch.contiguous_format, LAST):
        activation = torch.full((1, 4, 512, 512), 0.1, device=device).to(memory_format=memory_format)
        actual = channel_saliency(activation, torch.ones_like(activation)).double()
        exact = activation.double().sum((2, 3))
        assert ((actual - exact) / exact).abs().max() < 1e-6


def test_what_is_not_finite_stays_with_its_channel(device: torch.device) -> None:
    for memory_format in (torch.contiguous_format, LAST):
        activation = torch.randn(2, 40, 5, 5, device=device).to(memory_format=memory_format)
        activation[0, 3, 2, 2], activation[1, 7, 0, 0] = float("nan"), float("inf")
        finite = channel_saliency(activation, torch.ones_like(activation)).isfinite()
        assert (~finite).nonzero().tolist() == [[0, 3], [1, 7]]


def test_threads_agree_bit_for_bit() -> None:
    activation, grad = torch.randn(2, 9, 70, 16, 16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(channel_saliency(activation, grad))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


# gradients and transforms


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_gradients_to_second_order(channel_dim: int, device: torch.device) -> None:
    pair = [torch.randn(3, 4, 2, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, g: channel_saliency(a, g, channel_dim), pair)
    assert torch.autograd.gradgradcheck(lambda a, g: channel_saliency(a, g, channel_dim), pair)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_the_inputs(dtype: torch.dtype, device: torch.device) -> None:
    activation = torch.randn(3, 4, 5, device=device).to(dtype).requires_grad_()
    grad = torch.randn(3, 4, 5, device=device).to(dtype)
    sums = channel_saliency(activation, grad)
    sums.sum().backward()
    assert activation.grad is not None
    assert torch.equal(activation.grad, grad)


def samples(device: torch.device) -> list[tuple]:
    x, y = torch.randn(2, 4, 6, 3, 3, device=device)
    return [
        (x.clone().requires_grad_(), y.clone().requires_grad_()),
        (x.to(memory_format=LAST), y.to(memory_format=LAST), -3),
        (x.half().requires_grad_(), y.half(), -1),
        (x[:0].bfloat16(), y[:0].bfloat16()),
        (x[:, :, 0, 0].double(), y[:, :, 0, 0].double().requires_grad_()),
    ]


@pytest.mark.parametrize("index", range(5))
def test_opcheck(index: int, device: torch.device) -> None:
    torch.library.opcheck(op.default, samples(device)[index])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()

    def f(x: Tensor, y: Tensor) -> Tensor:
        return channel_saliency(torch.relu(x), y).abs()

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for batch in (4, 6):
        x, y = torch.randn(2, batch, 9, 4, 4, device=device).unbind()
        x.requires_grad_()
        torch.testing.assert_close(compiled(x, y), f(x, y))
        (grad,) = torch.autograd.grad(compiled(x, y).sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(f(x, y).sum(), x)[0])


# errors

GOOD = {"activation": torch.randn(4, 6, 3), "grad": torch.randn(4, 6, 3)}
BAD = [
    ({"activation": torch.ones(4, 6, 3).long()}, TypeError, "activation must have dtype float16, .*, got Long"),
    ({"activation": [1.0]}, TypeError, "activation"),
    ({"grad": None}, TypeError, "grad must be a tensor, got None"),
    ({"grad": torch.randn(4, 6, 3).double()}, TypeError, "grad must have dtype Float like activation, got Double"),
    ({"grad": torch.randn(4, 6)}, ValueError, r"grad must have the shape of activation, \[4, 6, 3\], got \[4, 6\]"),
    ({"grad": torch.randn(4, 6, 1)}, ValueError, r"got \[4, 6, 1\]"),
    ({"grad": torch.empty(4, 6, 3, device="meta")}, ValueError, "got grad on meta and activation on cpu"),
    ({"activation": torch.ones(4), "grad": torch.ones(4)}, ValueError, r"2 to 25 dimensions, got shape \[4\]"),
    ({"activation": torch.ones([1] * 26), "grad": torch.ones([1] * 26)}, ValueError, "2 to 25 dimensions"),
    ({"activation": torch.ones(4, 6, 3).to_sparse()}, TypeError, "no kernel for torch.sparse_coo on cpu"),
    ({"channel_dim": 0}, ValueError, "channel_dim must name a dimension of activation after the batch, got 0"),
    ({"channel_dim": -3}, ValueError, "channel_dim"),
    ({"channel_dim": 3}, ValueError, "channel_dim"),
    ({"channel_dim": -(2**63)}, ValueError, "channel_dim"),
    ({"channel_dim": 2**63}, ValueError, "64 bits"),
    ({"channel_dim": 1.5}, TypeError, "channel_dim"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_refused(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        channel_saliency(**{**GOOD, **change})


@pytest.mark.cuda
def test_cuda_refuses_a_gradient_elsewhere() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match="grad must be on the device of activation"):
        channel_saliency(x.cuda(), x)
    with pytest.raises(ValueError, match="grad must be on the device of activation"):
        channel_saliency(x, x.cuda())


@pytest.mark.cuda
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_cuda_on_a_side_stream_and_in_a_graph_the_same_bits(memory_format: torch.memory_format) -> None:
    activation, grad = (x.to("cuda", memory_format=memory_format) for x in torch.randn(2, 64, 96, 14, 14))
    expected = channel_saliency(activation, grad)
    torch.testing.assert_close(expected.cpu(), channel_saliency(activation.cpu(), grad.cpu()), rtol=1e-5, atol=1e-5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = channel_saliency(activation, grad)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = channel_saliency(activation, grad)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(aside, expected)
    assert torch.equal(captured, expected)


@pytest.mark.cuda
def test_cuda_offsets_beyond_32_bits() -> None:
    far = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 3 * far:
        pytest.skip("needs 4 GiB of the device's memory, and some more")
    memory = torch.empty(far + 64, dtype=torch.float16, device="cuda")
    for strides in ((far, 9, 3, 1), (3, far, 6, 1), (1, 6, far, 2), (0, 1, far, 3)):
        x = (
            memory.as_strided((2, 2, 2, 3), strides).normal_()
            if strides[0]
            else memory.as_strided((2, 2, 2, 3), strides)
        )
        check(x, torch.randn(2, 2, 2, 3, device="cuda").half())
