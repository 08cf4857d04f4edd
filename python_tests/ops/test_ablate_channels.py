import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memloc_ext.ops import ablate_channels, ablate_channels_
from memloc_ext.reference import ablation as reference

op = torch.ops.memloc_ext.ablate_channels.default
op_ = torch.ops.memloc_ext.ablate_channels_.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sets(rows: int, channels: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Draw offsets and channels: none in some rows, some twice."""
    counts = torch.randint(0, 2 + channels // 2, (rows,)) if channels else torch.zeros(rows, dtype=torch.int64)
    counts[::3] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return offsets.to(device), torch.randint(max(1, channels), (int(counts.sum()),)).to(device)


def check(x: Tensor, forks: int = 1, channel_dim: int = 1) -> None:
    channels = x.shape[channel_dim]
    offsets, off = sets(forks * len(x), channels, x.device)
    before = x.clone()
    for baseline in (None, torch.randn(channels).to(x)):
        y = ablate_channels(x, offsets, off, baseline, channel_dim)
        expected = reference.ablate_channels(x, offsets, off, baseline, channel_dim)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))
        if len(x) > 0:
            assert y[0].stride() == torch.empty_like(x[0]).stride()
        if forks == 1:
            changed = x.clone()
            assert ablate_channels_(changed, offsets, off, baseline, channel_dim) is changed
            torch.testing.assert_close(changed, expected, rtol=0, atol=0, equal_nan=True)


SHAPES = [
    (0, 3),
    (1, 1),
    (5, 0),
    (3, 7),
    (7, 1),
    (4, 5, 6),
    (3, 130, 1),
    (2, 6, 3, 5),
    (2, 64, 16, 16),
    (3, 3, 2, 3, 4),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=device)
    for forks in (1, 2, 5):
        check(x, forks)
        check(x, forks, -1)


VIEWS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every second column": lambda x: x[..., ::2],
    "every second example": lambda x: x[::2],
    "batch and channels swapped": lambda x: x.transpose(0, 1),
    "plane transposed": lambda x: x.transpose(2, 3),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1, :, :1].expand(6, -1, 4, -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x = VIEWS[view](torch.randn(6, 10, 8, 8, dtype=dtype, device=device))
    for forks in (1, 3):
        for channel_dim in (1, 2, -1):
            check(x, forks, channel_dim)


def test_any_strides_of_offsets_channels_and_baseline(device: torch.device) -> None:
    torch.manual_seed(0)
    x, baseline = torch.randn(6, 10, 3, device=device), torch.randn(10, device=device)
    offsets, off = sets(6, 10, device)
    apart = [t.repeat_interleave(2)[::2] for t in (offsets, off, baseline)]
    assert torch.equal(ablate_channels(x, *apart), reference.ablate_channels(x, offsets, off, baseline))


@pytest.mark.parametrize("view", ["contiguous", "every second column"])
def test_large_planes(view: str, device: torch.device) -> None:
    x = torch.randn(2, 3, 130, 140, device=device)
    check(x if view == "contiguous" else VIEWS[view](x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_more_than_the_cache(memory_format: torch.memory_format, device: torch.device) -> None:
    check(torch.randn(9, 130, 16, 17, device=device).to(memory_format=memory_format), 40)


def test_in_place_through_a_view_leaves_the_rest_alone(device: torch.device) -> None:
    whole = torch.randn(6, 10, 4, 4, device=device)
    before, part = whole.clone(), whole[1:4, 2:8, :, 1:3]
    offsets, off = sets(3, 6, device)
    expected = reference.ablate_channels(part, offsets, off)
    ablate_channels_(part, offsets, off)
    before[1:4, 2:8, :, 1:3] = expected
    assert torch.equal(whole, before)


def test_switched_off_whatever_it_holds(device: torch.device) -> None:
    x = torch.full((2, 3, 4), float("nan"), device=device)
    offsets, off = torch.tensor([0, 1, 3], device=device), torch.tensor([2, 0, 1], device=device)
    y = ablate_channels(x, offsets, off)
    assert torch.equal(y[:, :, 0].isnan().cpu(), torch.tensor([[True, True, False], [False, False, True]]))


@settings(deadline=None, max_examples=100)
@given(
    data=st.data(),
    batch=st.integers(0, 4),
    forks=st.integers(1, 3),
    channels=st.integers(0, 9),
    plane=st.sampled_from([(), (1,), (3,), (4, 4), (2, 1, 5)]),
    dtype=st.sampled_from(DTYPES),
)
def test_property_equals_reference(data, batch, forks, channels, plane, dtype) -> None:
    full = (batch, channels, *plane)
    order = data.draw(st.permutations(range(len(full))))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    check(torch.randn([full[d] for d in order]).to(dtype).permute(inverse), forks)


# gradients and transforms


@pytest.mark.parametrize("forks", [1, 3])
def test_gradients_to_second_order(forks: int, device: torch.device) -> None:
    x = torch.randn(2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    offsets, off = sets(2 * forks, 4, device)
    baseline = torch.randn(4, dtype=torch.float64, device=device)
    f = lambda t: ablate_channels(t, offsets, off, baseline) ** 2  # noqa: E731
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    (grad,) = torch.autograd.grad(ablate_channels(x, offsets, off).sum(), x)
    ones = torch.ones_like(x).repeat(forks, 1, 1)
    assert torch.equal(grad, reference.ablate_channels(ones, offsets, off).unflatten(0, (forks, 2)).sum(0))


def test_in_place_counts_as_a_change_and_records_no_gradient() -> None:
    offsets, off = sets(3, 4)
    x = torch.randn(3, 4)
    version = x._version
    assert ablate_channels_(x, offsets, off)._version == version + 1
    x.requires_grad_()
    with pytest.raises(ValueError, match="input must not require a gradient"):
        ablate_channels_(x, offsets, off)
    with torch.no_grad():
        ablate_channels_(x, offsets, off)
    saved = torch.ones(3, 4, requires_grad=True).exp()
    with pytest.raises(ValueError, match="input must not require a gradient"):
        ablate_channels_(saved, offsets, off)


@pytest.mark.parametrize("forks", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format: torch.memory_format, forks: int, device: torch.device) -> None:
    x = torch.randn(4, 6, 3, 2, device=device).to(memory_format=memory_format)
    offsets, off = sets(4 * forks, 6, device)
    torch.library.opcheck(op, (x.clone().requires_grad_(), offsets, off, None))
    torch.library.opcheck(op, (x, offsets, off, torch.randn(6, device=device), 1))
    torch.library.opcheck(op, (x[:0], offsets[:1], off[:0], None))
    if forks == 1:
        torch.library.opcheck(op_, (x, offsets, off, torch.randn(6, device=device)))


def test_compile_fullgraph(device: torch.device) -> None:
    torch._dynamo.reset()

    def f(x: Tensor, offsets: Tensor, off: Tensor) -> Tensor:
        return ablate_channels_(ablate_channels(torch.relu(x), offsets, off) * 2 + 1, offsets, off)

    x = torch.randn(4, 6, 3, device=device)
    offsets, off = sets(4, 6, device)
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x, offsets, off), f(x, offsets, off))


@pytest.mark.cuda
def test_cuda_ignores_what_is_out_of_range_and_the_function_refuses_it() -> None:
    x = torch.randn(2, 3, 4, device="cuda")
    offsets, off = torch.tensor([-5, 2, 9], device="cuda"), torch.tensor([0, -1, 3, 2], device="cuda")
    expected = x.clone()
    expected[0, 0] = expected[1, 2] = 0
    assert torch.equal(op(x, offsets, off, None), expected)
    expected[0, 0] = x[0, 0]  # the first channel is no row's
    assert torch.equal(op(x, torch.tensor([1, 2, 9], device="cuda"), off, None), expected)
    with pytest.raises(ValueError, match="offsets must go from 0 to 4"):
        ablate_channels(x, offsets, off)
    with pytest.raises(ValueError, match=r"channels must be in \[0, 3\), got -1"):
        ablate_channels(x, torch.tensor([0, 2, 4], device="cuda"), off)


@pytest.mark.cuda
def test_cuda_in_a_graph() -> None:
    x = torch.randn(4, 6, 5, 5, device="cuda")
    offsets, off = sets(12, 6, "cuda")
    expected = op(x.cpu(), offsets.cpu(), off.cpu(), None)
    op(x, offsets, off, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ablate_channels(x, offsets, off)
    graph.replay()
    assert torch.equal(y.cpu(), expected)


# errors

GOOD = {"input": torch.randn(2, 6, 3), "offsets": torch.tensor([0, 1, 3]), "channels": torch.tensor([5, 0, 2])}
BAD = [
    ({"input": torch.ones(2, 6, 3).long()}, TypeError, "input must have dtype"),
    ({"input": 3}, TypeError, "input"),
    ({"input": torch.ones(2)}, ValueError, r"input must be \[batch, channels, ...\] .* got shape \[2\]"),
    ({"input": torch.ones([1] * 25)}, ValueError, "2 to 24 dimensions"),
    ({"offsets": torch.tensor([0, 1, 3]).int()}, TypeError, "offsets must have dtype int64, got Int"),
    ({"channels": torch.tensor([0.0, 1, 3])}, TypeError, "channels must have dtype int64, got Float"),
    ({"offsets": torch.tensor([[0, 1, 3]])}, ValueError, r"offsets must have one dimension, got shape \[1, 3\]"),
    ({"offsets": torch.tensor([0, 3, 3, 3])}, ValueError, "offsets must"),
    ({"offsets": torch.tensor([0])}, ValueError, "offsets must"),
    ({"offsets": torch.tensor([]).long()}, ValueError, "offsets must have one element more than there are rows"),
    ({"offsets": torch.tensor([1, 1, 3])}, ValueError, "offsets must start at 0, got 1"),
    ({"offsets": torch.tensor([0, 4, 3])}, ValueError, "offsets must not decrease, got 3 after 4"),
    ({"offsets": torch.tensor([0, 1, 2])}, ValueError, "offsets must end at 3, .* got 2"),
    ({"channels": torch.tensor([5, 6, 2])}, ValueError, r"channels must be in \[0, 6\), got 6"),
    ({"channels": torch.tensor([5, -1, 2])}, ValueError, r"channels must be in \[0, 6\), got -1"),
    ({"baseline": torch.randn(3)}, ValueError, r"baseline must have shape \[6\], got \[3\]"),
    ({"baseline": torch.randn(6).half()}, TypeError, "baseline must have dtype Float like input, got Half"),
    ({"channel_dim": 0}, ValueError, "channel_dim must name a dimension of input after the batch, got 0"),
    ({"channel_dim": 3}, ValueError, "channel_dim"),
    ({"channel_dim": -4}, ValueError, "channel_dim"),
    ({"offsets": torch.empty(3, dtype=torch.int64, device="meta")}, ValueError, "must be on"),
]


@pytest.mark.parametrize("function", [ablate_channels, ablate_channels_])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_refuses_and_leaves_the_input_alone(function, change: dict, error: type[Exception], message: str) -> None:
    arguments = {**GOOD, **change}
    before = arguments["input"].clone() if isinstance(arguments["input"], Tensor) else None
    with pytest.raises(error, match=message):
        function(**arguments)
    assert before is None or torch.equal(arguments["input"], before)


def test_in_place_refuses_an_expanded_input_and_forks() -> None:
    with pytest.raises(ValueError, match="input must not be expanded, got stride 0 along 0"):
        ablate_channels_(torch.randn(1, 6).expand(2, 6), GOOD["offsets"], GOOD["channels"])
    with pytest.raises(ValueError, match="offsets must have 3 elements, one more than the 2 rows of input, got 5"):
        ablate_channels_(torch.randn(2, 6), torch.tensor([0, 1, 1, 2, 3]), GOOD["channels"])
