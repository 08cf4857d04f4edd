from typing import Any

import pytest
import torch
from accuracy import assert_stable, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memloc_ext.ops import example_tied_mlp, kept_mlp
from memloc_ext.reference import example_tied_mlp as reference
from memloc_ext.reference.example_tied_dropout import keep_mask

op = torch.ops.memloc_ext.example_tied_mlp.default
ACTIVATIONS = list(reference.ACTIVATIONS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SETTINGS: dict[str, Any] = {"activation": "gelu", "num_generalization": 19, "p_mem": 0.3, "seed": 1, "site": 2}


@pytest.fixture(params=["kept", "dense"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing, whatever they cost in nets as small as these."""
    choose(monkeypatch, request.param)
    return request.param


def choose(patch: pytest.MonkeyPatch, way: str) -> None:
    patch.setattr(kept_mlp, "RUN_ROWS", 0 if way == "kept" else 1e9)
    patch.setattr(kept_mlp, "ROWS", 0 if way == "kept" else 1e9)


def arguments(
    shape: tuple[int, ...] = (3, 5),
    ids: Any = (4, 0, 2**40),
    d: int = 6,
    h: int = 40,
    o: int = 7,
    biases: bool = True,
    gated: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    **changes: Any,
) -> dict[str, Any]:
    make = torch.Generator().manual_seed(0)

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=make).to(device, dtype).requires_grad_()

    weights = {"w_in": tensor(h, d), "b_in": tensor(h) if biases else None}
    weights |= {"w_out": tensor(o, h), "b_out": tensor(o) if biases else None}
    if gated:
        weights |= {"w_gate": tensor(h, d), "b_gate": tensor(h) if biases else None}
    return {"x": tensor(*shape, d), "example_ids": torch.tensor(ids, device=device), **weights, **SETTINGS, **changes}


def detached(given: dict[str, Any]) -> dict[str, Any]:
    return {name: t.detach() if isinstance(t, Tensor) else t for name, t in given.items()}


def results(f: Any, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """The output, and the gradients of everything."""
    y = f(**given)
    inputs = [t for t in given.values() if isinstance(t, Tensor) and t.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
    return y.detach(), *torch.autograd.grad(y, inputs, grad)


def check(given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Hold the output and all gradients against the reference."""
    before = {name: t.detach().clone() for name, t in given.items() if isinstance(t, Tensor)}
    actual = results(example_tied_mlp, given)
    for own, expected in zip(actual, results(reference.example_tied_mlp, given), strict=True):
        assert own.dtype == expected.dtype
        assert own.is_contiguous()
        torch.testing.assert_close(own, expected)
    for name, t in before.items():
        assert torch.equal(t, given[name].detach())
    return actual


# reference


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_reference(activation: str, gated: bool, biases: bool, way: str, device: torch.device) -> None:
    check(arguments(activation=activation, gated=gated, biases=biases, device=device))


IDS = {
    "a row each": ((4,), (4, 0, 4, 9)),
    "equal neighbours": ((4,), (4, 4, 4, 9)),
    "repeated examples": ((4, 3), (2, 0, 2, 2)),
    "packed": ((2, 5), ((1, 1, 1, 7, 7), (7, 7, 3, 3, 3))),
    "an id per token": ((2, 3), ((1, 2, 1), (2, 1, 2))),
    "one example": ((1, 9), (5,)),
    "no examples": ((0, 3), ()),
    "no tokens": ((2, 0), (1, 2)),
    "no rows": ((0,), ()),
}


@pytest.mark.parametrize("case", IDS)
def test_rows_tokens_and_runs(case: str, way: str, device: torch.device) -> None:
    shape, ids = IDS[case]
    given = arguments(shape, ids, gated=True, device=device)
    given["example_ids"] = given["example_ids"].long()
    check(given)


@pytest.mark.parametrize("p_mem", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kept", [0, 19, 40])
def test_nothing_or_everything_kept(kept: int, p_mem: float, way: str, device: torch.device) -> None:
    _, _, by_w_in, _, by_w_out, _ = check(arguments(num_generalization=kept, p_mem=p_mem, device=device))
    mask = keep_mask(torch.tensor([4, 0, 2**40]), 40, kept, p_mem, 1, 2).any(0)
    assert (by_w_in.cpu()[~mask] == 0).all()  # exactly
    assert (by_w_out.cpu()[:, ~mask] == 0).all()


@pytest.mark.parametrize("sizes", [{"d": 0}, {"h": 0, "num_generalization": 0}, {"o": 0}, {"d": 1, "o": 1}])
def test_empty_and_single_sizes(sizes: dict[str, Any], way: str, device: torch.device) -> None:
    check(arguments(**sizes, device=device))


@pytest.mark.parametrize("names", ["x example_ids w_in b_in w_out b_out w_gate b_gate", "b_in b_out b_gate"])
def test_any_strides(names: str, way: str, device: torch.device) -> None:
    given = arguments(gated=True, device=device)

    def apart(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1).transpose(0, -2).contiguous().transpose(0, -2)[..., 0]

    views = {name: apart(t) if name in names.split() else t for name, t in given.items()}
    for own, expected in zip(results(example_tied_mlp, views), results(example_tied_mlp, given), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("gated", [False, True])
def test_the_channels_kept_are_those_of_the_dropout(gated: bool, way: str, device: torch.device) -> None:
    h, ids = 300, torch.tensor([[3, 3, 3, 0], [0, 2**62, 2**62, 3]])
    column, eye = torch.ones(h, 1, device=device), torch.eye(h, device=device)
    gate = column if gated else None
    for kept, p_mem, seed, site in ((0, 0.1, -(2**63), 2**32 - 1), (60, 0.1, 0, 0), (299, 0.9, 2**63 - 1, 5)):
        settings: dict[str, Any] = {
            "num_generalization": kept,
            "p_mem": p_mem,
            "seed": seed,
            "site": site,
            "activation": "relu",
        }
        x = torch.ones(2, 4, 1, device=device)
        y = example_tied_mlp(x, ids.to(device), column, None, eye, None, **settings, w_gate=gate)
        assert torch.equal(y.cpu(), keep_mask(ids, h, kept, p_mem, seed, site).float())


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    way=st.sampled_from(["kept", "dense"]),
    batch=st.integers(0, 4),
    tokens=st.integers(0, 20),
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)),
    p_mem=st.floats(0, 1),
    activation=st.sampled_from(ACTIVATIONS),
    biases=st.booleans(),
    gated=st.booleans(),
)
def test_property_equals_reference(data, way, batch, tokens, sizes, p_mem, activation, biases, gated) -> None:
    d, h, o = sizes
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=batch * tokens, max_size=batch * tokens)))
    settings = {"p_mem": p_mem, "num_generalization": data.draw(st.integers(0, h)), "activation": activation}
    given = arguments((batch, tokens), (), d, h, o, biases, gated, **settings)
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, way)
        given["example_ids"] = ids.long().view(batch, tokens)
        check(given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_accuracy_in_every_dtype(gated: bool, dtype: torch.dtype, way: str, device: torch.device) -> None:
    given = arguments((8, 40), tuple(range(8)), 48, 150, 33, gated=gated, dtype=dtype, device=device)
    given |= {"num_generalization": 20, "p_mem": 0.2}
    exact, off = (
        results(reference.example_tied_mlp, {name: change(value) for name, value in given.items()})
        for change in (as_double, lambda value: moved_leaf(value, dtype))
    )
    for own, rounded, true in zip(results(example_tied_mlp, given), off, exact, strict=True):
        assert own.dtype == dtype
        assert_stable(own, rounded, true)


def as_double(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double().requires_grad_() if floats else value


def moved_leaf(value: Any, dtype: torch.dtype) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return moved(value, dtype).requires_grad_() if floats else value


def test_the_same_bits_on_every_call(way: str, device: torch.device) -> None:
    given = arguments((6, 50), (0, 1, 2, 3, 4, 5), 40, 200, 40, dtype=torch.float32, device=device, gated=True)
    first = results(example_tied_mlp, given)
    for _ in range(3):
        assert all(map(torch.equal, results(example_tied_mlp, given), first))


def test_the_cheaper_way_is_taken_and_saves_what_is_kept() -> None:
    def saved(tokens: int, p_mem: float) -> int:
        given = arguments((4, tokens), (0, 1, 2, 3), 64, 512, 64, biases=False, p_mem=p_mem, num_generalization=50)
        arguments_of_call = {t.untyped_storage().data_ptr() for t in given.values() if isinstance(t, Tensor)}
        elements = []

        def pack(t: Tensor) -> None:
            if t.is_floating_point() and t.untyped_storage().data_ptr() not in arguments_of_call:
                elements.append(t.numel())

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: pytest.fail("not for a backward pass")):
            example_tied_mlp(**given)
        return sum(elements)

    kept = keep_mask(torch.arange(4), 512, 50, 0.1, 1, 2).sum().item()
    assert saved(128, 0.1) == 2 * 128 * kept
    assert saved(1, 0.1) == 2 * 4 * 512
    assert saved(128, 1.0) == 2 * 4 * 128 * 512


# gradients and transforms


def test_gradients_to_second_order(way: str, device: torch.device) -> None:
    given = arguments((2, 3), (4, 0), 3, 20, 2, gated=True, device=device, num_generalization=17)
    names = [name for name, t in given.items() if isinstance(t, Tensor) and t.is_floating_point()]

    def f(*tensors: Tensor) -> Tensor:
        changed: dict[str, Any] = given | dict(zip(names, tensors, strict=True))
        return example_tied_mlp(**changed)

    inputs = [given[name] for name in names]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_a_pass_of_many_gradients(way: str) -> None:
    given = arguments()
    inputs = [t for t in given.values() if isinstance(t, Tensor) and t.is_floating_point()]
    y = example_tied_mlp(**given)
    grads = torch.stack([y.detach(), y.detach().sin()])
    found = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    for each, grad in enumerate(grads):
        one_by_one = torch.autograd.grad(y, inputs, grad, retain_graph=True)
        torch.testing.assert_close(tuple(t[each] for t in found), one_by_one)


def test_checkpointing(way: str) -> None:
    given = arguments(gated=True)
    actual = results(lambda **given: checkpoint(example_tied_mlp, **given, use_reentrant=False), given)
    torch.testing.assert_close(actual, results(example_tied_mlp, given))


@pytest.mark.parametrize("names", [("x",), ("w_out",), ("b_in", "w_gate"), ("w_in", "b_out", "b_gate")])
def test_some_gradients_alone(names: tuple[str, ...], way: str, device: torch.device) -> None:
    given = arguments(gated=True, device=device)
    for name, t in given.items():
        if isinstance(t, Tensor) and t.is_floating_point():
            t.requires_grad_(name in names)
    inputs = [given[name] for name in names]
    actual, expected = (
        torch.autograd.grad(f(**given).square().sum(), inputs) for f in (example_tied_mlp, reference.example_tied_mlp)
    )
    for own, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(own, other)


def test_transforms_of_torch_func(way: str) -> None:
    given = detached(arguments())

    def f(x: Tensor, w_in: Tensor, g: Any = example_tied_mlp) -> Tensor:
        return g(**given | {"x": x, "w_in": w_in})

    x, w_in = given["x"], given["w_in"]
    expected = f(x, w_in, reference.example_tied_mlp)
    torch.testing.assert_close(torch.vmap(f, (0, None))(torch.stack([x, x]), w_in)[1], expected)
    gradients = torch.func.grad(lambda w: f(x, w).square().sum())(w_in)
    w = w_in.clone().requires_grad_()
    (own,) = torch.autograd.grad(f(x, w, reference.example_tied_mlp).square().sum(), w)
    torch.testing.assert_close(gradients, own)
    torch.testing.assert_close(
        torch.func.jvp(lambda w: f(x, w).square().sum(), (w_in,), (w_in,))[1], (own * w_in).sum()
    )


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool, way: str, device: torch.device) -> None:
    given = arguments(gated=gated, dtype=torch.float32, device=device)
    torch.library.opcheck(op, (), given)
    weights = {"w_gate": None, "b_gate": None} | detached(given)
    grad = torch.randn(3, 5, 7, device=device)
    needed = [True] * 5 + [gated] * 2
    torch.library.opcheck(
        torch.ops.memloc_ext.example_tied_mlp_backward.default, (grad,), {**weights, "needed": needed}
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool, way: str, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: example_tied_mlp(**given) * 2, fullgraph=True, dynamic=dynamic)
    for ids in ((4, 0, 9), (1, 1, 3, 2)):
        given = arguments((len(ids), 5), ids, gated=True, device=device)
        expected = results(lambda **given: reference.example_tied_mlp(**given) * 2, given)
        for own, other in zip(results(compiled, given), expected, strict=True):
            torch.testing.assert_close(own, other)


def test_a_compiled_backward_pass_refuses_second_derivatives() -> None:
    given = arguments(dtype=torch.float32)
    values = [given.pop(name) for name in ("x", "example_ids", "w_in", "b_in", "w_out", "b_out")]
    more = (None, None, [True] * 5 + [False] * 2)
    with pytest.raises(RuntimeError, match=r"without torch\.compile"):
        torch.ops.memloc_ext.example_tied_mlp_backward(torch.ones(3, 5, 7), *values, *given.values(), *more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_linear_does(dtype: torch.dtype, way: str, device: torch.device) -> None:
    given = arguments(gated=True, dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=dtype):
        y = example_tied_mlp(**given)
        assert y.dtype == op(**given).dtype == dtype
        assert example_tied_mlp(**arguments(dtype=torch.float64, device=device)).dtype == torch.float64
    y.float().square().sum().backward()
    low: dict[str, Any] = {
        n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()
    }
    assert torch.equal(y, example_tied_mlp(**low))
    for name, t in given.items():
        assert not isinstance(t, Tensor) or name == "example_ids" or t.grad is not None


# errors


def ones(*sizes: int) -> Tensor:
    return torch.ones(sizes, dtype=torch.float64)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.ones(3, 5, 6, dtype=torch.int64)}, TypeError, "x must have dtype float16, .* got torch.int64"),
    ({"x": ones(6)}, ValueError, r"x must be \[batch, tokens, d\] or \[batch, d\], got shape \[6\]"),
    ({"x": None}, TypeError, "x"),
    ({"x": torch.ones(3, 5, 6).to_sparse()}, TypeError, "x must be a tensor with strides, got torch.sparse_coo"),
    ({"w_in": torch.ones(40, 6).half()}, TypeError, "w_in must have dtype torch.float64, that of x, got torch.float16"),
    ({"w_in": ones(40)}, ValueError, r"w_in must have 2 dimensions, got shape \[40\]"),
    ({"w_in": ones(40, 7)}, ValueError, r"w_in must have shape \[40, 6\], got \[40, 7\]"),
    ({"b_in": ones(6)}, ValueError, r"b_in must have shape \[40\], got \[6\]"),
    ({"w_out": ones(7, 6)}, ValueError, r"w_out must have shape \[7, 40\], got \[7, 6\]"),
    ({"b_out": ones(40)}, ValueError, r"b_out must have shape \[7\], got \[40\]"),
    ({"w_gate": ones(6, 40)}, ValueError, r"w_gate must have shape \[40, 6\], got \[6, 40\]"),
    ({"b_gate": ones(40)}, ValueError, "b_gate must come with w_gate"),
    ({"w_out": ones(7, 40).to("meta")}, ValueError, "w_out must be on the device of x, cpu, got meta"),
    ({"example_ids": torch.tensor([0, 1, -3])}, ValueError, "example_ids must be >= 0, got -3"),
    ({"example_ids": torch.tensor([0, 1])}, ValueError, r"example_ids must have shape \[3\], or one id per token"),
    ({"example_ids": torch.zeros(5, 3).long()}, ValueError, r"example_ids .* got \[5, 3\]"),
    ({"example_ids": torch.zeros(3)}, TypeError, "example_ids must have dtype int64, got torch.float32"),
    ({"activation": "tanh"}, ValueError, "activation must be one of relu, gelu, gelu_tanh, silu, got 'tanh'"),
    ({"activation": None}, TypeError, "activation"),
    ({"num_generalization": 41}, ValueError, r"num_generalization must be in \[0, 40\], got 41"),
    ({"num_generalization": -1}, ValueError, r"num_generalization must be in \[0, 40\], got -1"),
    ({"p_mem": 1.1}, ValueError, r"p_mem must be in \[0, 1\], got 1.1"),
    ({"p_mem": float("nan")}, ValueError, r"p_mem must be in \[0, 1\], got nan"),
    ({"site": 2**32}, ValueError, r"site must be in \[0, 4294967295\], got 4294967296"),
    ({"seed": 2**63}, ValueError, "must fit in 64 bits"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors(case: int) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=f"example_tied_mlp: .*{message}"):
        example_tied_mlp(**arguments() | change)


def test_a_gradient_of_another_shape_is_refused() -> None:
    given = detached(arguments())
    values = [given.pop(name) for name in ("x", "example_ids", "w_in", "b_in", "w_out", "b_out")]
    more = (None, None, [True] * 5 + [False] * 2)
    for grad, message in (
        (torch.ones(3, 5, 6).double(), r"grad_output must have shape \[3, 5, 7\], got \[3, 5, 6\]"),
        (torch.ones(3, 5, 7), "grad_output must have dtype torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.memloc_ext.example_tied_mlp_backward(grad, *values, *given.values(), *more)
