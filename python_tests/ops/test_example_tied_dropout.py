import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memloc_ext.ops import example_tied_dropout
from memloc_ext.reference import example_tied_dropout as reference

op = torch.ops.memloc_ext.example_tied_dropout
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LARGEST_ID = 2**63 - 1


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


def ids_for(x: Tensor) -> Tensor:
    ids = torch.arange(x.shape[0], dtype=torch.int64) * 1_000_003
    if len(ids):
        ids[-1] = LARGEST_ID
    return ids.to(x.device)


def check(x: Tensor, ids: Tensor, kept: int, p_mem: float = 0.3, channel_dim: int = 1, seed: int = -5, site: int = 9):
    before = x.clone()
    y = example_tied_dropout(x, ids, kept, p_mem, seed, site, channel_dim)
    assert_same(y, reference.example_tied_dropout(x, ids, kept, p_mem, seed, site, channel_dim))
    assert y.stride() == torch.empty_like(x).stride()
    assert y.device == x.device
    assert_same(x, before)
    return y


# reference


SHAPES = [(0, 3), (1, 1), (5, 0), (3, 7), (4, 5, 6), (3, 130, 1), (2, 6, 3, 5), (2, 64, 16, 16), (3, 3, 2, 3, 4)]
SHAPES += [(2, 3000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(shape, dtype=dtype, device=device)
    for kept in {0, shape[1] // 5, shape[1]}:
        check(x, ids_for(x), kept)


VIEWS = {
    "positions off 16 bytes": lambda x: x.to(memory_format=torch.channels_last)[:, :8],
    "examples off 16 bytes": lambda x: x.flatten().as_strided((6, 8, 6, 6), (289, 1, 48, 8)),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "every second row": lambda x: x[:, :, ::2],
    "offset": lambda x: x[:, 1:],
    "every second example": lambda x: x[::2],
    "batch and channels swapped": lambda x: x.transpose(0, 1),
    "plane transposed": lambda x: x.transpose(2, 3),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channels outermost": lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "expanded channels": lambda x: x[:, :1].expand(-1, 9, -1, -1),
    "expanded batch": lambda x: x[:1].expand(6, -1, -1, -1),
    "overlapping": lambda x: x.flatten()[1:].unfold(0, 60, 7).unfold(1, 12, 5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, dtype: torch.dtype, device: torch.device) -> None:
    x = VIEWS[view](torch.randn(6, 10, 8, 8, dtype=dtype, device=device))
    check(x, ids_for(x), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 8, 13, 1030])
def test_tokens_with_an_id_per_row_or_per_token(channels: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(3, 5, channels, dtype=dtype, device=device)
    check(x, torch.tensor([4, 4, 2**40], device=device), channels // 3, channel_dim=-1)
    tokens = torch.arange(15, device=device).reshape(3, 5) % 7
    check(x, tokens, channels // 3, channel_dim=-1)
    check(x, tokens, channels // 3, channel_dim=2)
    check(x, tokens.t().contiguous().t(), 0, channel_dim=-1)
    check(x.transpose(0, 1), tokens.t(), 0, channel_dim=-1)


def test_more_than_a_block_and_more_than_the_cache(device: torch.device) -> None:
    x = torch.randn(33, 1027, 16, 17, device=device)  # 37 MB: written past the cache
    check(x, ids_for(x), 200)
    check(x.to(memory_format=torch.channels_last), ids_for(x), 1026)


def test_large_unaligned_view(device: torch.device) -> None:
    x = torch.randn(3 * 11 * 300_001 + 1, device=device)[1:].view(3, 11, 300_001)
    check(x, ids_for(x), 2)


# what the issue of the draw promises


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    batch=st.integers(0, 5),
    channels=st.integers(0, 40),
    plane=st.sampled_from([(), (1,), (3,), (4, 4), (2, 1, 5)]),
    p_mem=st.one_of(st.sampled_from([0.0, 1.0, 2.0**-40, 1 - 2.0**-40]), st.floats(0, 1)),
    seed=st.integers(-(2**63), 2**63 - 1),
    site=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_property_equals_reference(data, batch, channels, plane, p_mem, seed, site, dtype) -> None:
    values = data.draw(st.lists(st.integers(0, LARGEST_ID), min_size=batch, max_size=batch))
    ids = torch.tensor(values, dtype=torch.int64)
    kept = data.draw(st.integers(0, channels))
    order = data.draw(st.permutations(range(2 + len(plane))))
    full = (batch, channels, *plane)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    x = torch.ones([full[d] for d in order], dtype=dtype).permute(inverse)
    check(x, ids, kept, p_mem, 1, seed, site)


def test_the_draw_is_the_same_whatever_surrounds_it(device: torch.device) -> None:
    ids = torch.arange(40, device=device)
    x = torch.ones(40, 96, 4, 4, device=device)
    keep = example_tied_dropout(x, ids, 10, 0.3, 11)[:, :, 0, 0]
    order = torch.randperm(40, device=device)
    assert torch.equal(example_tied_dropout(x, ids[order], 10, 0.3, 11)[:, :, 0, 0], keep[order])
    assert torch.equal(example_tied_dropout(x[3:4], ids[3:4], 10, 0.3, 11)[0, :, 0, 0], keep[3])
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(example_tied_dropout(last, ids, 10, 0.3, 11)[:, :, 0, 0], keep)
    for dtype in DTYPES:
        assert torch.equal(example_tied_dropout(x.to(dtype), ids, 10, 0.3, 11)[:, :, 0, 0].float(), keep)
    assert torch.equal(example_tied_dropout(x[:, :, 0, 0], ids, 10, 0.3, 11), keep)


def test_threads_agree_and_the_global_generator_is_untouched() -> None:
    x = torch.randn(64, 64, 16, 16)
    ids = torch.arange(64)
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = example_tied_dropout(x, ids, 12, 0.1, 0)
        torch.set_num_threads(2)
        assert torch.equal(example_tied_dropout(x, ids, 12, 0.1, 0), one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("channels_last", [False, True])
def test_dropped_channels_are_zero_whatever_they_hold(channels_last: bool, device: torch.device) -> None:
    x = torch.full((4, 32, 3, 3), float("nan"), device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = example_tied_dropout(x, torch.arange(4, device=device), 5, 0.2, 0)
    keep = reference.keep_mask(torch.arange(4), 32, 5, 0.2, 0)[..., None, None].expand(4, 32, 3, 3)
    assert y.cpu()[keep].isnan().all()
    assert (y.cpu()[~keep] == 0).all()
    negative_zero = example_tied_dropout(-torch.zeros(1, 8, device=device), torch.zeros(1).long().to(device), 8, 0.0, 0)
    assert negative_zero.signbit().all()


def test_memory_beyond_input_and_output_is_constant() -> None:
    x = torch.randn(64, 128, 16, 16)
    ids = torch.arange(64)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op(x, ids, 25, 0.1, 0)
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(bytes for bytes in allocated if bytes > 0) == x.numel() * x.element_size()


# gradients and transforms


def test_gradients_to_second_order(device: torch.device) -> None:
    x = torch.randn(3, 6, 2, dtype=torch.float64, device=device, requires_grad=True)
    ids = ids_for(x)
    assert torch.autograd.gradcheck(lambda t: example_tied_dropout(t, ids, 2, 0.5, 1), x)
    assert torch.autograd.gradgradcheck(lambda t: example_tied_dropout(t, ids, 2, 0.5, 1), x)
    y = torch.randn(3, 6, 2, device=device)
    (grad,) = torch.autograd.grad(example_tied_dropout(x, ids, 2, 0.5, 1), x, y.double())
    assert_same(grad.float(), reference.example_tied_dropout(y, ids, 2, 0.5, 1))


def test_forward_mode_and_torch_func(device: torch.device) -> None:
    x, tangent = torch.randn(2, 4, 6, dtype=torch.float64, device=device)
    ids = ids_for(x)
    keep = reference.keep_mask(ids, 6, 2, 0.5, 1).to(device)
    f = lambda t: example_tied_dropout(t, ids, 2, 0.5, 1)  # noqa: E731
    assert torch.autograd.gradcheck(f, x.clone().requires_grad_(), check_forward_ad=True, check_batched_grad=True)
    assert_same(torch.func.jvp(f, (x,), (tangent,))[1], tangent * keep)
    cubes = torch.func.grad(lambda t: torch.func.grad(lambda u: (f(u) ** 3).sum())(t).sum())(x)
    assert_same(cubes, 6 * x * keep)
    around = torch.func.grad(lambda t: (torch.vmap(f)(torch.stack([t, 2 * t])) ** 2).sum())(x)
    assert_same(around, 10 * x * keep)
    back = torch.func.vjp(f, x)[1]  # called when the transform is over
    g = tangent.clone().requires_grad_()
    assert_same(torch.autograd.grad((back(g)[0] ** 2).sum(), g)[0], 2 * tangent * keep)


def test_the_operator_itself_has_gradients_and_tangents_but_refuses_transforms() -> None:
    x, ids = torch.randn(4, 6, requires_grad=True), torch.arange(4)
    keep = reference.keep_mask(ids, 6, 2, 0.5, 1)
    assert_same(
        torch.autograd.grad(torch.vmap(lambda t: op(t, ids, 2, 0.5, 1))(x.expand(3, 4, 6)).sum(), x)[0], 3.0 * keep
    )
    with torch.autograd.forward_ad.dual_level():
        y = op(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()), ids, 2, 0.5, 1)
        assert_same(torch.autograd.forward_ad.unpack_dual(y).tangent, x.detach() * keep)
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=r"call memloc_ext\.ops\.example_tied_dropout"):
            transform(lambda t: op(t, ids, 2, 0.5, 1).sum())(x.detach())


@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_vmap_over_x(in_dim: int, channel_dim: int, device: torch.device) -> None:
    x = torch.randn(4, 5, 6, 7, device=device)
    shape = x.movedim(in_dim, 0).shape
    ids = torch.arange(shape[1], device=device)

    def f(t: Tensor) -> Tensor:
        return example_tied_dropout(t, ids, 2, 0.4, 3, 0, channel_dim)

    expected = torch.stack([f(t) for t in x.unbind(in_dim)])
    assert_same(torch.vmap(f, in_dims=in_dim)(x), expected)


def test_vmap_over_ids_tokens_and_gradients(device: torch.device) -> None:
    x = torch.randn(4, 3, 5, 8, device=device)
    tokens = torch.arange(60, device=device).reshape(4, 3, 5)

    def f(t: Tensor, ids: Tensor) -> Tensor:
        return example_tied_dropout(t, ids, 2, 0.4, 3, 0, -1)

    expected = torch.stack([f(x[i], tokens[i]) for i in range(4)])
    assert_same(torch.vmap(f)(x, tokens), expected)
    assert_same(torch.vmap(f, (None, 0))(x[0], tokens), torch.stack([f(x[0], tokens[i]) for i in range(4)]))
    assert_same(torch.vmap(f, (1, None))(x.movedim(0, 1), tokens[0]), torch.stack([f(t, tokens[0]) for t in x]))
    assert_same(torch.vmap(f)(x[:, :0], tokens[:, :0]), x[:, :0])
    gradients = torch.vmap(torch.func.grad(lambda t, ids: (f(t, ids) ** 2).sum()))(x, tokens)
    assert_same(gradients, 2 * expected)
    hessian = torch.func.hessian(lambda t: (f(t, tokens[0, :1, :1]) ** 3).sum())(x[0, :1, :1])
    assert_same(hessian.reshape(8, 8).diagonal(), 6 * f(x[0, :1, :1], tokens[0, :1, :1]).flatten())


def test_vmap_refuses_what_the_operator_refuses() -> None:
    x = torch.randn(4, 3, 5)
    for channel_dim in (0, -2, 2, -3):
        with pytest.raises((RuntimeError, ValueError), match="channel_dim"):
            torch.vmap(lambda t, c=channel_dim: op(t, torch.arange(3), 1, 0.1, 0, 0, c))(x)


def samples(device: torch.device) -> list[tuple]:
    x = torch.randn(4, 6, 3, 3, device=device)
    ids = torch.arange(12, device=device)
    tokens = torch.randn(2, 6, 5, device=device, requires_grad=True)
    return [
        (x.clone().requires_grad_(), ids[:4], 2, 0.3, 1),
        (x.to(memory_format=torch.channels_last), ids[:4], 0, 1.0, -1, 3),
        (tokens, ids.view(2, 6), 2, 0.3, 1, 0, -1),
        (x[:0].bfloat16(), ids[:0], 2, 0.3, 1),
    ]


@pytest.mark.parametrize("index", range(4))
def test_opcheck(index: int, device: torch.device) -> None:
    torch.library.opcheck(op.default, samples(device)[index])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()

    def f(x: Tensor, ids: Tensor) -> Tensor:
        return example_tied_dropout(torch.relu(x), ids, x.shape[1] // 3, 0.3, 4) * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for batch in (4, 6):
        x = torch.randn(batch, 9, 4, 4, device=device, requires_grad=True)
        ids = torch.arange(batch, device=device)
        y = compiled(x, ids)
        assert_same(y.detach(), f(x, ids).detach())
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert_same(grad, torch.autograd.grad(f(x, ids).sum(), x)[0])


def test_export(device: torch.device) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return example_tied_dropout(x, ids, 3, 0.3, 4)

    x, ids = torch.randn(4, 9, device=device), torch.arange(4, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Model(), (x, ids), dynamic_shapes=({0: batch}, {0: batch}))
    more, more_ids = torch.randn(7, 9, device=device), torch.arange(7, device=device)
    assert_same(program.module()(more, more_ids), Model()(more, more_ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_it_gets(dtype: torch.dtype, device: torch.device) -> None:
    layer = torch.nn.Linear(8, 8).to(device)
    x = torch.randn(4, 8, device=device)
    ids = torch.arange(4, device=device)
    with torch.autocast(device.type, dtype=dtype):
        hidden = layer(x)
        y = example_tied_dropout(hidden, ids, 2, 0.3, 0)
        y.float().sum().backward()
    assert y.dtype == dtype
    assert_same(y, reference.example_tied_dropout(hidden, ids, 2, 0.3, 0))
    assert layer.weight.grad is not None
    assert example_tied_dropout(x, ids, 2, 0.3, 0).dtype == torch.float32


def test_meta_and_fake_tensors() -> None:
    y = op(torch.empty(4, 6, 2, 2, device="meta"), torch.empty(4, dtype=torch.int64, device="meta"), 2, 0.3, 1)
    assert y.shape == (4, 6, 2, 2)
    assert y.device.type == "meta"


# errors

GOOD = {"x": torch.randn(4, 6, 3), "example_ids": torch.arange(4), "num_generalization": 2, "p_mem": 0.3, "seed": 0}
BAD = [
    ({"x": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "x must have dtype"),
    ({"x": torch.ones(4, 6, dtype=torch.complex64)}, TypeError, "x must have dtype"),
    ({"x": [1.0]}, TypeError, "x"),
    ({"x": torch.ones(4)}, ValueError, r"x must be \[batch, channels, ...\].*got shape \[4\]"),
    ({"x": torch.ones(())}, ValueError, r"got shape \[\]"),
    ({"x": torch.ones([1] * 26)}, ValueError, "2 to 25 dimensions"),
    ({"example_ids": torch.arange(4).int()}, TypeError, "example_ids must have dtype int64"),
    ({"example_ids": torch.arange(4).float()}, TypeError, "example_ids must have dtype int64"),
    ({"example_ids": None}, TypeError, "example_ids"),
    ({"example_ids": torch.arange(3)}, ValueError, r"example_ids must have shape \[4\].*got \[3\]"),
    ({"example_ids": torch.arange(24).view(4, 6)}, ValueError, r"got \[4, 6\]"),
    ({"example_ids": torch.tensor(1)}, ValueError, r"got \[\]"),
    ({"example_ids": torch.arange(12).view(4, 3), "channel_dim": -1}, ValueError, r"one id per token, \[4, 6\]"),
    ({"example_ids": torch.tensor([0, 1, -1, 2])}, ValueError, "example_ids must be >= 0, got -1"),
    ({"example_ids": torch.tensor([0, 1, -(2**63), 2])}, ValueError, "got -9223372036854775808"),
    ({"example_ids": torch.arange(4, device="meta")}, ValueError, "on the device of x; got ids on meta and x on cpu"),
    ({"x": torch.ones(4, 6).to_sparse()}, TypeError, "no kernel for torch.sparse_coo on cpu"),
    ({"num_generalization": -1}, ValueError, r"num_generalization must be in \[0, 6\], got -1"),
    ({"num_generalization": 7}, ValueError, r"num_generalization must be in \[0, 6\], got 7"),
    ({"num_generalization": 1.5}, TypeError, "num_generalization"),
    ({"num_generalization": 2**70}, ValueError, "64 bits"),
    ({"p_mem": -0.1}, ValueError, r"p_mem must be in \[0, 1\], got -0.1"),
    ({"p_mem": 1.5}, ValueError, r"p_mem must be in \[0, 1\], got 1.5"),
    ({"p_mem": float("nan")}, ValueError, r"p_mem must be in \[0, 1\], got nan"),
    ({"p_mem": "x"}, TypeError, "p_mem"),
    ({"seed": 2**63}, ValueError, "64 bits"),
    ({"site": -1}, ValueError, "site must be in"),
    ({"site": 2**32}, ValueError, "site must be in"),
    ({"channel_dim": 0}, ValueError, "channel_dim must name a dimension of x after the batch, got 0"),
    ({"channel_dim": -3}, ValueError, "channel_dim"),
    ({"channel_dim": 3}, ValueError, "channel_dim"),
    ({"channel_dim": -4}, ValueError, "channel_dim"),
    ({"channel_dim": -(2**63)}, ValueError, "channel_dim"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_refused(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        example_tied_dropout(**{**GOOD, **change})


@pytest.mark.parametrize(("change", "message"), [(change, message) for change, _, message in BAD])
def test_the_operator_itself_refuses_too(change: dict, message: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        op(**{**GOOD, **change})


@pytest.mark.cuda
def test_cuda_refuses_ids_elsewhere_and_negative_ids() -> None:
    x = torch.randn(4, 6, device="cuda")
    with pytest.raises(ValueError, match="on the device of x"):
        example_tied_dropout(x, torch.arange(4), 2, 0.3, 0)
    with pytest.raises(ValueError, match="on the device of x"):
        example_tied_dropout(x.cpu(), torch.arange(4, device="cuda"), 2, 0.3, 0)
    with pytest.raises(ValueError, match=">= 0, got -7"):
        example_tied_dropout(x, torch.tensor([0, -7, 1, 2], device="cuda"), 2, 0.3, 0)


@pytest.mark.cuda
def test_cuda_equals_cpu_on_a_side_stream_and_in_a_graph() -> None:
    x = torch.randn(64, 96, 7, 7, device="cuda")
    ids = torch.arange(64, device="cuda") * 977
    expected = op(x.cpu(), ids.cpu(), 19, 0.1, 5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(x, ids, 19, 0.1, 5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = example_tied_dropout(x, ids, 19, 0.1, 5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y.cpu(), expected)
