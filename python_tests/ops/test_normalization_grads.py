import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memloc_ext.ops import normalization_grads
from memloc_ext.reference.normalization_grads import normalization_grads as reference

OP = torch.ops.memloc_ext.normalization_grads.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def statistics(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.randn(shape, dtype=dtype, device=x.device), torch.rand(shape, dtype=dtype, device=x.device) + 0.5


def check(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> None:
    before = [t.clone() for t in (x, g, mean, rstd)]
    results = normalization_grads(x, g, mean, rstd)
    wide = [t.cpu().double() for t in (x, g, mean, rstd)]
    exact = reference(*wide)
    magnitudes = reference((wide[0] - wide[2]).abs(), wide[1].abs(), torch.zeros_like(wide[2]), wide[3])
    for actual, truth, magnitude in zip(results, exact, magnitudes, strict=True):
        assert (actual.dtype, actual.device, actual.shape) == (rstd.dtype, x.device, x.shape[:2])
        assert_accurate(actual.cpu(), truth, magnitude, x.shape[2] + 3)
    assert all(torch.equal(t, copy) for t, copy in zip((x, g, mean, rstd), before, strict=True))


KINDS = {
    "batch": lambda b, c, p: (1, c, 1),
    "group": lambda b, c, p: (b, c, 1),
    "layer": lambda b, c, p: (b, 1, p),
    "all": lambda b, c, p: (b, c, p),
    "one": lambda b, c, p: (1, 1, 1),
}
SHAPES = [(0, 3, 4), (2, 0, 3), (2, 3, 0), (1, 1, 1), (3, 7, 1), (5, 3, 4), (4, 130, 33), (2, 5, 1000), (2, 1000, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels_inside", [False, True])
def test_matches_the_reference(channels_inside: bool, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        x, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        if channels_inside:
            x, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, g))
        check(x, g, *statistics(x, KINDS[kind](*shape)))


def test_statistics_are_shared_each_in_its_own_way(device: torch.device) -> None:
    x, g = torch.randn(3, 17, 40, device=device), torch.randn(3, 17, 40, device=device)
    for inside in (False, True):
        if inside:
            x, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, g))
        zero = torch.zeros(1, 1, 1, device=device)
        check(x, g, zero, statistics(x, (3, 1, 40))[1])
        check(x, g, zero, statistics(x, (3, 17, 1))[1])
        check(x, g, statistics(x, (1, 17, 1))[0], statistics(x, (3, 1, 40))[1])


VIEWS = {
    "every second position": lambda x: x[:, :, ::2],
    "every second channel": lambda x: x[:, ::2],
    "offset": lambda x: x[:, 1:, 1:],
    "batch and channels swapped": lambda x: x.transpose(0, 1),
    "batch innermost": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "positions before the batch": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "expanded": lambda x: x[:1, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x = VIEWS[view](torch.randn(6, 10, 14, device=device).to(dtype))
    g = torch.randn(x.shape, device=device).to(dtype)
    for kind in KINDS.values():
        mean, rstd = statistics(x, kind(*x.shape))
        check(x, g, mean, rstd)
        check(g, x, mean.transpose(1, 2).contiguous().transpose(1, 2), rstd)


def test_long_sums_are_as_accurate_as_float64_of_their_parts(device: torch.device) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(2, 3, 200_001, device=device) + 100, torch.randn(2, 3, 200_001, device=device)
    check(x, g, x.mean(2, keepdim=True), 1 / x.std(2, keepdim=True))
    x, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, g))
    check(x, g, x.mean(1, keepdim=True), 1 / x.std(1, keepdim=True))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 40), st.integers(0, 40)),
    shared=st.lists(st.booleans(), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    dtype=st.sampled_from(DTYPES),
)
def test_property_equals_reference(shape, shared, order, dtype) -> None:
    x, g = (torch.randn([shape[d] for d in order]).to(dtype) for _ in range(2))
    inverse = sorted(range(3), key=order.__getitem__)
    x, g = x.permute(inverse), g.permute(inverse)
    own = tuple(1 if one else size for one, size in zip(shared, x.shape, strict=True))
    check(x, g, *statistics(x, own))


def test_are_the_gradients_of_a_normalisation(device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, 7, dtype=torch.float64, device=device)
    weight, bias = (torch.randn(6, dtype=torch.float64, device=device).requires_grad_() for _ in range(2))
    g = torch.randn_like(x)
    out = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-12)
    expected = torch.autograd.grad(out, (weight, bias), g)
    mean, std = x.mean((0, 2), keepdim=True), x.var((0, 2), keepdim=True, correction=0).sqrt()
    for rows, total in zip(normalization_grads(x, g, mean, 1 / std), expected, strict=True):
        torch.testing.assert_close(rows.sum(0), total)


def test_threads_agree() -> None:
    x, g = torch.randn(64, 32, 64), torch.randn(64, 32, 64)
    stats = statistics(x, (1, 32, 1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = normalization_grads(x, g, *stats)
        torch.set_num_threads(2)
        assert all(map(torch.equal, normalization_grads(x, g, *stats), one))
    finally:
        torch.set_num_threads(threads)


def test_is_detached() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert not any(t.requires_grad for t in normalization_grads(x, x, *statistics(x, (1, 3, 1))))


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch: int, device: torch.device) -> None:
    x, g = torch.randn(batch, 3, 6, device=device), torch.randn(batch, 3, 6, device=device)
    torch.library.opcheck(OP, (x, g, *statistics(x, (1, 3, 1))))
    torch.library.opcheck(OP, (x.double(), g.double(), *statistics(x.double(), (batch, 3, 1))))
    tokens = (x.bfloat16().transpose(1, 2), g.bfloat16().transpose(1, 2), *statistics(x, (batch, 1, 3)))
    torch.library.opcheck(OP, tokens)


def test_compile_fullgraph(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *rest: normalization_grads(x * 2, *rest), fullgraph=True)
    x, g = torch.randn(3, 5, 6, device=device), torch.randn(3, 5, 6, device=device)
    stats = statistics(x, (1, 5, 1))
    for actual, expected in zip(compiled(x, g, *stats), normalization_grads(x * 2, g, *stats), strict=True):
        torch.testing.assert_close(actual, expected)


# errors

X = torch.randn(2, 3, 4)
GOOD = {"input": X, "grad_output": X, "mean": torch.zeros(1, 3, 1), "rstd": torch.ones(1, 3, 1)}
BAD = [
    ({"input": X.long()}, TypeError, "input must have dtype float16, bfloat16, float32 or float64, got Long"),
    ({"input": [1.0]}, TypeError, "input"),
    ({"input": X[0]}, ValueError, r"input must be \[batch, channels, positions\], got \[3, 4\]"),
    ({"grad_output": X.double()}, TypeError, "grad_output must have dtype Float to go with input, got Double"),
    ({"grad_output": X[:1]}, ValueError, r"grad_output must have the shape of input, \[2, 3, 4\], got \[1, 3, 4\]"),
    ({"grad_output": X.to("meta")}, ValueError, "grad_output must be on"),
    ({"mean": torch.zeros(1, 3, 1).half()}, TypeError, "mean must have dtype Float"),
    ({"mean": torch.zeros(3)}, ValueError, r"mean must have the shape of input, \[2, 3, 4\], or 1 where it is shared"),
    ({"rstd": torch.zeros(1, 2, 1)}, ValueError, r"rstd must have the shape .* got \[1, 2, 1\]"),
    ({"rstd": None}, TypeError, "rstd"),
    ({"input": X.to_sparse()}, TypeError, "no kernel for torch.sparse_coo"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_refused(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalization_grads(**{**GOOD, **change})


@pytest.mark.parametrize("change", [change for change, _, _ in BAD])
def test_the_operator_itself_refuses_too(change: dict) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        OP(**{**GOOD, **change})


@pytest.mark.cuda
def test_cuda_refuses_statistics_elsewhere() -> None:
    with pytest.raises(ValueError, match="mean must be on the device of input"):
        normalization_grads(X.cuda(), X.cuda(), GOOD["mean"], GOOD["rstd"].cuda())


@pytest.mark.cuda
def test_cuda_on_a_side_stream_and_in_a_graph() -> None:
    x, g = torch.randn(64, 96, 49, device="cuda"), torch.randn(64, 96, 49, device="cuda")
    stats = statistics(x, (1, 96, 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = OP(x, g, *stats)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = OP(x, g, *stats)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))
