import pytest
import torch
from torch import Tensor

from memloc_ext.ops import example_tied_conv2d
from memloc_ext.reference import example_tied_conv2d as reference
from memloc_ext.reference.example_tied_dropout import keep_mask

op = torch.ops.memloc_ext.example_tied_conv2d
SETTINGS = {"num_generalization": 4, "p_mem": 0.1, "seed": -5, "site": 9}


def example(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return images, ids of which two are equal, filters and bias: 7 of 25 channels are kept on average."""
    make = torch.Generator().manual_seed(0)
    sizes = (4, 25, 11, 7), (18, 25, 3, 3), (18,)
    x, weight, bias = (torch.randn(size, generator=make, dtype=dtype).to(device) for size in sizes)
    return x, torch.tensor([3, 2**63 - 1, 3, 0], device=device), weight, bias


def outcome(function, inputs: tuple[Tensor, ...], *layer, **options) -> list[Tensor]:
    """Return a result and the gradients of images, filters and bias for a fixed one of the result."""
    x, ids, weight, bias = inputs
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    y = function(leaves[0], ids, *leaves[1:], *layer, **options)
    grad = torch.sin(torch.arange(y.numel(), dtype=torch.float64).view(y.shape)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize(
    ("num_generalization", "p_mem"), [(4, 0.1), (0, 0.1), (0, 0.0), (25, 0.0), (7, 1.0), (24, 0.5)]
)
def test_matches_the_reference(num_generalization: int, p_mem: float, device: torch.device) -> None:
    inputs, options = example(device), {**SETTINGS, "num_generalization": num_generalization, "p_mem": p_mem}
    keep = keep_mask(inputs[1], 25, num_generalization, p_mem, -5, 9).to(device)
    for layer in ((), (2, 1), ((1, 2), (0, 2), (2, 1))):
        ours, exact = (
            outcome(f, inputs, *layer, **options) for f in (example_tied_conv2d, reference.example_tied_conv2d)
        )
        torch.testing.assert_close(ours, exact)
        assert not ours[1][~keep].any()


def test_channels_last_and_groups(device: torch.device) -> None:
    x, ids, weight, bias = example(device)
    last = torch.channels_last
    inputs = x.to(memory_format=last), ids, weight.to(memory_format=last), bias
    options = {**SETTINGS, "num_generalization": 0}
    for layer, given in (
        ((1, 1), inputs),
        ((1, 1, 1, 5), (x, ids, torch.randn(80, 5, 3, 3).to(weight), bias.new_ones(80))),
    ):
        ours, exact = (
            outcome(f, given, *layer, **options) for f in (example_tied_conv2d, reference.example_tied_conv2d)
        )
        torch.testing.assert_close(ours, exact)
        assert ours[0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_float(dtype: torch.dtype) -> None:
    inputs = example(dtype=dtype)
    ours = outcome(example_tied_conv2d, inputs, 1, 1, **SETTINGS)
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    exact = outcome(lambda *a, **o: reference.example_tied_conv2d(*a, **o).to(dtype), wide, 1, 1, **SETTINGS)
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.dtype == dtype
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=unit, atol=unit * float(expected.abs().max()) / 100
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_kept_is_not_read(value: float, device: torch.device) -> None:
    x, ids, weight, bias = example(device)
    keep = keep_mask(ids, 25, 4, 0.1, -5, 9).to(device)[..., None, None]
    clean, spoilt = (
        outcome(example_tied_conv2d, (torch.where(keep, x, v), ids, weight, bias), 1, 1, **SETTINGS)
        for v in (0.0, value)
    )
    assert all(map(torch.equal, clean, spoilt))


def test_gradients_to_second_order(device: torch.device) -> None:
    x, ids, weight, bias = (t.requires_grad_() if t.is_floating_point() else t for t in example(device))
    few = [t.detach().requires_grad_() for t in (x[1:2, :, :2, :2], weight[:1], bias[:1])]
    f = lambda x, weight, bias: example_tied_conv2d(x, ids[1:2], weight, bias, 1, 1, **SETTINGS)  # noqa: E731
    assert torch.autograd.gradcheck(f, few, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, few)
    y = (example_tied_conv2d(x, ids, weight, bias, **SETTINGS) ** 2).sum()
    exact = (reference.example_tied_conv2d(x, ids, weight, bias, **SETTINGS) ** 2).sum()
    ours, expected = (torch.autograd.grad(t, (x, weight, bias), create_graph=True) for t in (y, exact))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t[0].sum(), (weight, bias)) for t in (ours, expected)))


def test_only_what_is_asked_for_has_a_gradient() -> None:
    x, ids, weight, bias = example()
    for wanted in (x, weight, bias):
        wanted.requires_grad_()
        y = example_tied_conv2d(x, ids, weight, bias, **SETTINGS)
        exact = reference.example_tied_conv2d(x, ids, weight, bias, **SETTINGS)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), wanted) for t in (y, exact)))
        wanted.requires_grad_(False)
    assert not example_tied_conv2d(x, ids, weight, bias, **SETTINGS).requires_grad


def test_torch_func(device: torch.device) -> None:
    x, ids, weight, bias = example(device)
    keep = keep_mask(ids, 25, 4, 0.1, -5, 9).to(x)[..., None, None]
    ours, exact = (
        lambda x: example_tied_conv2d(x, ids, weight, bias, **SETTINGS),
        lambda x: torch.conv2d(x * keep, weight, bias),
    )
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (x.sin(),)), torch.func.jvp(exact, (x,), (x.sin(),)))
    both = torch.stack([x, x.cos()])
    torch.testing.assert_close(torch.vmap(ours)(both), torch.stack([exact(x) for x in both]))
    loss = lambda w, x, i: example_tied_conv2d(x[None], i[None], w, **SETTINGS).square().sum()  # noqa: E731
    expected = [torch.func.grad(lambda w, x=x: torch.conv2d(x, w).square().sum())(weight) for x in x * keep]
    actual = torch.vmap(torch.func.grad(loss), (None, 0, 0))(weight, x, ids)
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    x, ids, weight, bias = example(device, dtype)
    torch.library.opcheck(op.default, (x.requires_grad_(), ids, weight.requires_grad_(), bias, [2, 2]), SETTINGS)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    x, ids, weight, bias = example(device)

    def f(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return example_tied_conv2d(torch.relu(x), ids, weight, bias, padding=1, **SETTINGS) * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (4, 3):
        inputs = x[:batch], ids[:batch], weight, bias
        torch.testing.assert_close(outcome(compiled, inputs), outcome(f, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_conv2d(dtype: torch.dtype, device: torch.device) -> None:
    x, ids, weight, bias = (t.float() if t.is_floating_point() else t for t in example(device))
    with torch.autocast(device.type, dtype=dtype):
        y, *grads = outcome(example_tied_conv2d, (x, ids, weight, bias), **SETTINGS)
    assert y.dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in grads)
    narrow = (t.to(dtype) if t.is_floating_point() else t for t in (x, ids, weight, bias))
    expected, *_ = outcome(example_tied_conv2d, tuple(narrow), **SETTINGS)
    assert torch.equal(y, expected)


def test_meta_tensors() -> None:
    inputs = (t.to("meta") for t in example())
    assert op(*inputs, [2, 2], **SETTINGS).shape == (4, 18, 5, 3)


# errors

GOOD = dict(zip(("x", "example_ids", "weight", "bias"), example(), strict=True)) | SETTINGS
BAD = [
    ({"x": torch.ones(4, 25, 11, 7, dtype=torch.int64)}, TypeError, "x must have dtype"),
    ({"x": torch.ones(4, 25, 11)}, ValueError, "x must be"),
    ({"x": torch.ones(4)}, ValueError, "x must be"),
    ({"x": [1.0]}, TypeError, "x"),
    ({"x": torch.ones(4, 25, 11, 7).to_sparse()}, TypeError, "no kernel for"),
    ({"example_ids": torch.arange(4).int()}, TypeError, "example_ids must have dtype int64"),
    ({"example_ids": torch.arange(3)}, ValueError, r"example_ids must have shape \[4\]"),
    ({"example_ids": torch.arange(28).view(4, 7)}, ValueError, r"example_ids must have shape \[4\]"),
    ({"example_ids": torch.tensor([0, 1, -1, 2])}, ValueError, "example_ids must be >= 0, got -1"),
    ({"example_ids": None}, TypeError, "example_ids"),
    ({"weight": torch.ones(18, 25, 3, 3)}, TypeError, "weight must have dtype Double like x, got Float"),
    ({"weight": torch.ones(18, 24, 3, 3).double()}, ValueError, "weight must have 25 input channels per group, got 24"),
    ({"weight": torch.ones(18, 25, 12, 3).double()}, ValueError, "must fit into the padded image of 11 x 7"),
    ({"bias": torch.ones(3).double()}, ValueError, r"bias must have shape \[18\], got \[3\]"),
    ({"stride": 0}, ValueError, "stride must be in"),
    ({"stride": 1.5}, TypeError, "stride"),
    ({"stride": (1, 1, 1)}, ValueError, "stride must be two numbers, got 3"),
    ({"padding": -1}, ValueError, "padding must be in"),
    ({"padding": "same"}, TypeError, "padding"),
    ({"dilation": 0}, ValueError, "dilation must be in"),
    ({"groups": 2}, ValueError, "groups must divide the 25 input and 18 output channels, got 2"),
    ({"num_generalization": 26}, ValueError, r"num_generalization must be in \[0, 25\], got 26"),
    ({"num_generalization": 2**70}, ValueError, "64 bits"),
    ({"p_mem": 1.5}, ValueError, r"p_mem must be in \[0, 1\], got 1.5"),
    ({"p_mem": float("nan")}, ValueError, r"p_mem must be in \[0, 1\], got nan"),
    ({"site": -1}, ValueError, "site must be in"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_refused(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"example_tied_conv2d: .*{message}"):
        example_tied_conv2d(**{**GOOD, **change})


@pytest.mark.cuda
def test_cuda_refuses_ids_elsewhere_and_negative_ids() -> None:
    x, ids, weight, bias = example("cuda")
    with pytest.raises(ValueError, match="on the device of x"):
        example_tied_conv2d(x, ids.cpu(), weight, bias, **SETTINGS)
    with pytest.raises(ValueError, match=">= 0, got -7"):
        example_tied_conv2d(x, ids - 7 * (ids == 0), weight, bias, **SETTINGS)
