from itertools import product

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv2d_ablation import RESIDUALS, VIEWS, magnitudes, to
from torch import Tensor

from memloc_ext.ops.ablation import linear_ablation
from memloc_ext.reference import ablation as reference

op = torch.ops.memloc_ext.linear_ablation.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def case(
    variants: int,
    rows: tuple[int, ...],
    inputs: int,
    outputs: int,
    residual: str = "none",
    epilogue: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list:
    make = lambda *sizes: torch.randn(*sizes).to(device, dtype)  # noqa: E731
    shapes = {"none": None, "shared": (*rows, outputs), "own": (variants, *rows, outputs)}
    tensors = [make(*rows, outputs), make(variants, *rows), make(outputs, inputs)]
    scale, shift = (make(outputs), make(outputs)) if epilogue else (None, None)
    sizes = shapes[residual]
    channels = torch.randint(inputs, (variants,)).to(device)
    return [*tensors, channels, scale, shift, None if sizes is None else make(*sizes), epilogue]


def check(arguments: list) -> None:
    actual = linear_ablation(*arguments)
    output = arguments[0]
    assert (actual.dtype, actual.device) == (output.dtype, output.device)
    assert actual.is_contiguous()
    wide = to(arguments, torch.float64)
    exact, magnitude = reference.linear_ablation(*wide), reference.linear_ablation(*magnitudes(wide))
    assert_accurate(actual, exact, magnitude, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("rows", [(1,), (2, 1), (5,), (3, 7), (2, 3, 65)])
def test_sizes(rows: tuple[int, ...], residual: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    for outputs in (1, 3, 10, 16, 17, 100, 129):
        check(case(4, rows, 9, outputs, residual, dtype=dtype, device=device))


def test_it_is_the_layer_on_the_changed_input() -> None:
    x, layer = torch.randn(4, 7, 6), torch.nn.Linear(6, 10)
    channels = torch.tensor([5, 0, 3])
    actual = linear_ablation(layer(x), -x[..., channels].movedim(-1, 0), layer.weight, channels)
    for k, channel in enumerate(channels):
        masked = x.clone()
        masked[..., channel] = 0
        torch.testing.assert_close(actual[k], layer(masked), atol=1e-5, rtol=1e-4)
    assert not actual.requires_grad


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, device: torch.device) -> None:
    arguments = case(4, (3, 5), 6, 8, residual="own", device=device)
    check([VIEWS[view](a) if isinstance(a, Tensor) else a for a in arguments])


@pytest.mark.parametrize("outputs", [768, 500, 10])
def test_more_than_the_cache(outputs: int, device: torch.device) -> None:
    check(case(40_000_000 // (4 * 130 * outputs) + 1, (130,), 12, outputs, device=device))


def test_nothing(device: torch.device) -> None:
    for variants, rows, outputs in ((0, (2, 5), 3), (2, (0, 5), 3), (2, (2, 0), 3), (2, (2, 5), 0)):
        arguments = case(variants, rows, 4, outputs, "own", device=device)
        assert linear_ablation(*arguments).shape == (variants, *rows, outputs)


def test_what_is_not_finite_stays_where_it_is(device: torch.device) -> None:
    arguments = case(3, (2, 5), 4, 20, epilogue=False, device=device)
    output, change = arguments[:2]
    output[0, 3, 2], output[1, 4, 5], change[1, 0, 0] = float("nan"), float("inf"), float("nan")
    actual, expected = linear_ablation(*arguments), reference.linear_ablation(*arguments)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@settings(deadline=None, max_examples=100)
@given(
    variants=st.integers(0, 5),
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    outputs=st.integers(0, 70),
    residual=st.sampled_from(RESIDUALS),
    epilogue=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_property_equals_reference(variants, rows, outputs, residual, epilogue, dtype) -> None:
    check(case(variants, tuple(rows), 5, outputs, residual, epilogue, dtype))


@pytest.mark.parametrize("variants", [0, 3])
def test_opcheck(variants: int, device: torch.device) -> None:
    for residual, epilogue in product(RESIDUALS, [False, True]):
        torch.library.opcheck(op, tuple(case(variants, (2, 5), 4, 6, residual, epilogue, device=device)))


def test_compile_fullgraph(device: torch.device) -> None:
    torch._dynamo.reset()
    arguments = case(3, (2, 5), 4, 6, "shared", device=device)
    compiled = torch.compile(lambda *a: linear_ablation(*a) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), 2 * linear_ablation(*arguments))


@pytest.mark.cuda
def test_cuda_takes_a_channel_that_does_not_exist_for_one_without_weights() -> None:
    arguments = case(3, (2, 5), 4, 6, device="cuda")
    arguments[3] = torch.tensor([1, 4, -1], device="cuda")
    actual = linear_ablation(*arguments)
    arguments[1][1:] = 0
    arguments[3] = torch.tensor([1, 0, 0], device="cuda")
    assert torch.equal(actual, op(*arguments))


@pytest.mark.cuda
def test_cuda_results_beyond_32_bits() -> None:
    variants, rows, outputs = 5, 2**14, 2**15
    if torch.cuda.mem_get_info()[0] < 8 * rows * outputs * 2:
        pytest.skip("needs 9 GB of the device's memory")
    output = torch.randn(rows, outputs, device="cuda").half()
    change, weight = torch.randn(variants, rows, device="cuda").half(), torch.randn(outputs, 3, device="cuda").half()
    channels = torch.tensor([0, 1, 2, 0, 1], device="cuda")
    last = linear_ablation(output, change, weight, channels)[-1, -3:]
    expected = output[-3:].float() + change[-1, -3:, None].float() * weight[:, 1].float()
    torch.testing.assert_close(last.float(), expected, atol=1e-2, rtol=1e-3)


# errors

GOOD = {
    "output": torch.randn(2, 4, 6),
    "change": torch.randn(3, 2, 4),
    "weight": torch.randn(6, 7),
    "channels": torch.tensor([0, 6, 2]),
    "scale": torch.randn(6),
    "shift": torch.randn(6),
    "residual": torch.randn(2, 4, 6),
    "relu": True,
}
BAD = [
    ({"output": torch.ones(2, 4, 6).long()}, TypeError, "output must have dtype"),
    ({"change": torch.randn(3, 2, 4).half()}, TypeError, "change must have dtype Float like output, got Half"),
    ({"channels": torch.tensor([0, 6, 2]).int()}, TypeError, "channels must have dtype int64, got Int"),
    ({"channels": torch.tensor([0, 7, 2])}, ValueError, r"channels must be in \[0, 7\), got 7"),
    ({"channels": torch.tensor([0, 1])}, ValueError, r"change must be .* with 2 channels .* got \[3, 2, 4\]"),
    ({"weight": torch.randn(6, 7, 1, 1)}, ValueError, r"weight must be \[out, in\], got \[6, 7, 1, 1\]"),
    ({"weight": torch.randn(5, 7)}, ValueError, r"output must be \[batch, \*, 5\], got \[2, 4, 6\]"),
    ({"output": torch.randn(6)}, ValueError, r"output must be \[batch, \*, 6\], got \[6\]"),
    ({"change": torch.randn(3, 2)}, ValueError, r"change must be \[variants, batch, \*\]"),
    ({"scale": torch.randn(5)}, ValueError, r"scale must have shape \[6\], got \[5\]"),
    ({"shift": torch.randn(())}, ValueError, r"shift must have shape \[6\], got \[\]"),
    ({"residual": torch.randn(2, 1, 6)}, ValueError, "residual must be shaped like output or like the result"),
    ({"change": torch.empty(3, 2, 4, device="meta")}, ValueError, "must be on"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_ablation(**{**GOOD, **change})
