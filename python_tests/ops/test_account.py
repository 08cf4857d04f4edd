"""Many layers in one call, against each example alone in plain PyTorch; and the same as composed on CUDA."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from valid_arguments import VALID

from memloc_ext.ops import Groups
from memloc_ext.ops.account import CHANNEL_NORM, CONVOLUTION, LAYER_NORM, LINEAR, Geometry, Layer, account, compose

B = 3
OP = torch.ops.memloc_ext.account.default
Case = tuple[Layer, Tensor, Tensor, list[Tensor], Callable[[Tensor, Tensor], list[Tensor]]]
"""A layer, its input and gradient, statistics; and the gradients of its parameters, given those of one example."""


def linear(weight: bool, bias: bool, *, rows: bool = False, inside: bool = False) -> Case:
    """Tokens ``[batch, positions, features]``; ``rows``: ``[positions, batch, positions, features]``."""
    shape = (2, B * 2, 3) if rows else (B, 4)
    x, g = torch.randn(*shape, 5), torch.randn(*shape, 6)
    if inside:  # neighbours in memory are positions
        x, g = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, g))
    parameters = weight + 2 * bias
    layer = Layer(LINEAR, parameters, 1, 1, 2) if rows else Layer(LINEAR, parameters)

    def gradients(x: Tensor, g: Tensor) -> list[Tensor]:
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        return [t for t, wanted in ((g.t() @ x, weight), (g.sum(0), bias)) if wanted]

    return layer, x, g, [], gradients


def added() -> Case:
    g = torch.randn(B, 2, 4, 5)
    return Layer(LINEAR, 2, own=2), g, g, [], lambda x, g: [g.sum((0, 1)).flatten()]


def convolution(bias: bool, *, one: bool = False, last: bool = False) -> Case:
    size, kernel, groups = ((7,), (3,), 1) if one else ((6, 5), (3, 2), 2)
    x = torch.randn(B, 4, *size)
    weight = torch.randn(6, 4 // groups, *kernel, requires_grad=True)
    run: Any = F.conv1d if one else F.conv2d
    settings: Any = (1, 2, 1) if one else ((2, 1), (1, 0), (1, 2))
    padded: Any = dict(zip(("stride", "padding", "dilation"), settings, strict=True), groups=groups)
    g = torch.randn_like(run(x, weight, **padded))
    if last:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    numbers = (1, *kernel, 1, 1, 0, 2, 1, 1, 1) if one else (*kernel, 2, 1, 1, 0, 1, 2, 2)

    def gradients(x: Tensor, g: Tensor) -> list[Tensor]:
        own = torch.autograd.grad(run(x, weight, **padded), weight, g)[0]
        return [own.reshape(*own.shape[:2], 1, 3) if one else own, *([g.flatten(2).sum((0, 2))] if bias else [])]

    return Layer(CONVOLUTION, 1 + 2 * bias, geometry=numbers), x, g, [], gradients


def normalization(
    kind: int, shape: tuple[int, ...], own: int, parameters: int = 3, *, dim: int = 0, running: bool = False
) -> Case:
    """With the statistics of the whole batch; ``running``: with its variance."""
    x, g = 2 * torch.randn(shape) + 1, torch.randn(shape)
    dims = tuple(range(len(shape) - own, len(shape)))
    if kind == LAYER_NORM:
        mean, var = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
        wide = mean, var
    elif own:
        grouped = x.unflatten(1, (own, -1)).flatten(2)
        mean, var = grouped.mean(2), grouped.var(2, unbiased=False)
        width = shape[1] // own
        wide = tuple(t.repeat_interleave(width, 1).reshape(B, shape[1], *[1] * (len(shape) - 2)) for t in (mean, var))
    else:
        rest = (0, *range(2, len(shape)))
        mean, var = x.mean(rest), x.var(rest, unbiased=False)
        wide = tuple(t.reshape(1, -1, *[1] * (len(shape) - 2)) for t in (mean, var))
    normalized = (x - wide[0]) / (wide[1] + 0.1).sqrt()
    features = dims if kind == LAYER_NORM else (1,)
    rest = tuple(d for d in range(len(shape)) if d not in features)
    layer = Layer(kind, parameters, dim, own=own, eps=0.1 if running else -1.0)

    def gradients(x: Tensor, g: Tensor) -> list[Tensor]:
        both = ((x * g).sum(rest).flatten(), g.sum(rest).flatten())
        return [t for i, t in enumerate(both) if parameters & 1 << i]

    return layer, torch.stack([x, normalized]), g, [mean, var if running else (var + 0.1).rsqrt()], gradients


def turned(case: Case, *dims: int) -> Case:
    """Return a case whose gradients lie in memory in another order."""
    layer, x, g, statistics, gradients = case
    return layer, x, g.transpose(*dims).contiguous().transpose(*dims), statistics, gradients


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: linear(True, True),
    "linear, weight": lambda: linear(True, False),
    "linear, bias": lambda: linear(False, True),
    "rows": lambda: linear(True, True, rows=True),
    "rows, inside": lambda: linear(True, True, rows=True, inside=True),
    "inside": lambda: linear(True, True, inside=True),
    "added": added,
    "convolution": lambda: convolution(True),
    "channels last": lambda: convolution(True, last=True),
    "convolution, weight": lambda: convolution(False),
    "one dimension": lambda: convolution(True, one=True),
    "layer norm": lambda: normalization(LAYER_NORM, (B, 4, 5), 1),
    "layer norm of rows": lambda: normalization(LAYER_NORM, (2, B, 3, 2, 5), 2, dim=1),
    "layer norm, turned": lambda: turned(normalization(LAYER_NORM, (B, 4, 5), 1), 1, 2),
    "batch norm, turned": lambda: turned(normalization(CHANNEL_NORM, (B, 4, 3, 2), 0), 1, 3),
    "bias, turned": lambda: turned(linear(False, True, rows=True), 0, 3),
    "batch norm": lambda: normalization(CHANNEL_NORM, (B, 4, 3, 2), 0),
    "batch norm of vectors": lambda: normalization(CHANNEL_NORM, (B, 4), 0),
    "running": lambda: normalization(CHANNEL_NORM, (B, 4, 3, 2), 0, running=True),
    "group norm": lambda: normalization(CHANNEL_NORM, (B, 6, 5), 2),
    "scale": lambda: normalization(CHANNEL_NORM, (B, 4, 3, 2), 0, 1),
}


def by_example(layer: Layer, t: Tensor, b: int) -> Tensor:
    if layer.kind in (CONVOLUTION, CHANNEL_NORM):
        return t[b : b + 1]
    parts = t.unflatten(layer.dim, (layer.before, B, layer.after))
    return parts.select(layer.dim + 1, b).flatten(layer.dim, layer.dim + 1)


def exact(case: Case) -> list[Tensor]:
    """Return the gradients of each example, ``[batch, *]`` of each parameter."""
    layer, x, g, _, gradients = case
    x = x[1] if layer.kind in (LAYER_NORM, CHANNEL_NORM) else x
    each = [gradients(by_example(layer, x, b), by_example(layer, g, b)) for b in range(B)]
    return [torch.stack(same) for same in zip(*each, strict=True)]


def given(cases: list[Case], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor], Geometry]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x[0] if layer.kind in (LAYER_NORM, CHANNEL_NORM) else x for layer, x, *_ in cases]
    statistics = [t.to(wide) for case in cases for t in case[3]]
    return (
        [x.to(dtype) for x in inputs],
        [c[2].to(dtype) for c in cases],
        statistics,
        Geometry.of([c[0] for c in cases]),
    )


def check(results: Any, cases: list[Case], ids: Tensor | None, sums: bool, rtol: float) -> None:
    sqnorm, squares, found = results
    expected = [rows for case in cases for rows in exact(case)]
    close: Any = lambda a, b: torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol)  # noqa: E731
    assert len(sqnorm) == len(expected)
    for norms, rows in zip(sqnorm, expected, strict=True):
        close(norms, rows.flatten(1).square().sum(1))
    assert len(found) == (0 if not sums else len(expected) * (1 + (ids is not None)))
    assert len(squares) == (len(expected) if sums else 0)
    for i, total in enumerate(found[: len(squares)]):
        close(total.reshape(expected[i][0].shape), expected[i].sum(0))
        close(squares[i], expected[i].sum(0).square().sum())
    for i, by_group in enumerate(found[len(squares) :]):
        for k in range(3):
            assert ids is not None
            close(by_group[k].reshape(expected[i][0].shape), expected[i][ids == k].sum(0))


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_each_layer(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    ids = torch.tensor([2, 0, 2])
    rtol = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02}.get(dtype, 0.15)
    for groups, sums in ((None, False), (None, True), (Groups(ids, 3), True)):
        arguments = given([case], dtype)
        check(account(*arguments, groups, sums=sums), [case], ids if groups else None, sums, rtol)


@pytest.mark.parametrize("run", [OP, compose])
@pytest.mark.parametrize("sums", [False, True])
def test_many_layers(run: Callable[..., Any], sums: bool) -> None:
    torch.manual_seed(0)
    cases = [make() for make in CASES.values()]
    ids = torch.tensor([2, 0, 2])
    *tensors, geometry = given(cases, torch.float64)
    for groups in (None, ids)[: 1 + sums]:
        check(run(*tensors, *geometry, groups, 3, sums), cases, groups, sums, 1e-9)


def test_no_examples_and_no_positions() -> None:
    for x, g in ((torch.randn(0, 4, 5), torch.randn(0, 4, 6)), (torch.randn(2, 0, 5), torch.randn(2, 0, 6))):
        sqnorm, squares, (weight, bias) = account([x], [g], [], Geometry.of([Layer(LINEAR, 3)]), None, sums=True)
        assert sqnorm.shape == (2, len(x))
        assert not any(t.any() for t in (sqnorm, squares, weight, bias))
        assert weight.shape == (6, 5)


def test_opcheck() -> None:
    torch.library.opcheck(OP, tuple(VALID["account"]()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": [torch.randn(3, 4, 5)]}, "each of one or more layers must have an input"),
        ({"geometry": [1]}, "15 numbers"),
        ({"statistics": []}, "needs two statistics"),
        ({"group_ids": torch.tensor([0, 2, 0])}, r"group_ids must be in \[0, 2\), got 2"),
        ({"sums": False}, "group_ids need sums"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    names = ("inputs", "grad_outputs", "statistics", "geometry", "eps", "group_ids", "num_groups", "sums")
    with pytest.raises(RuntimeError, match=message):
        OP(**{**dict(zip(names, VALID["account"](), strict=True)), **change})


def test_threads_share_the_work() -> None:
    torch.manual_seed(0)
    cases = [make() for make in CASES.values()]
    arguments, found = given(cases, torch.float32), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(account(*arguments, None, sums=True))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, (*found[0][:2], *found[0][2]), (*found[1][:2], *found[1][2])))
    assert not any(t.requires_grad for t in found[0][2])
    assert isinstance(nn.Parameter(found[0][2][0]), nn.Parameter)
