import pytest
import torch

from memloc_ext.ops import example_tied_mlp
from memloc_ext.reference import example_tied_mlp as reference

SETTINGS = {"num_generalization": 4, "p_mem": 0.3, "seed": 1, "site": 2}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_matches_the_reference(activation: str, gated: bool) -> None:
    make = torch.Generator().manual_seed(0)
    x, w_in, b_in, w_out, b_out, w_gate, b_gate = (
        torch.randn(size, generator=make, dtype=torch.float64, requires_grad=True)
        for size in [(3, 5, 6), (20, 6), (20,), (7, 20), (7,), (20, 6), (20,)]
    )
    gate = {"w_gate": w_gate, "b_gate": b_gate} if gated else {}
    ids = torch.tensor([4, 0, 4])
    arguments = (x, ids, w_in, b_in, w_out, b_out)
    actual, expected = (
        f(*arguments, activation=activation, **SETTINGS, **gate) for f in (example_tied_mlp, reference.example_tied_mlp)
    )
    torch.testing.assert_close(actual, expected)
    inputs = [x, w_in, b_in, w_out, b_out, *gate.values()]
    grad = torch.randn(expected.shape, generator=make, dtype=torch.float64)
    for own, other in zip(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(own, other)
