"""An MLP with example-tied dropout on its hidden channels, spelled out: dense products and a mask."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from memloc_ext.reference.example_tied_dropout import example_tied_dropout

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def example_tied_mlp(
    x: Tensor,
    example_ids: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
    num_generalization: int,
    p_mem: float,
    seed: int,
    site: int = 0,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
) -> Tensor:
    """Return the MLP's output; arguments as in `memloc_ext.ops.example_tied_mlp`."""
    hidden = F.linear(x, w_in, b_in)
    if w_gate is None:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        hidden = ACTIVATIONS[activation](F.linear(x, w_gate, b_gate)) * hidden
    hidden = example_tied_dropout(hidden, example_ids, num_generalization, p_mem, seed, site, -1)
    return F.linear(hidden, w_out, b_out)
