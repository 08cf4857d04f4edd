"""An MLP with example-tied dropout on its hidden channels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from memloc_ext.ops.example_tied_dropout import example_tied_dropout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
    r"""Run an MLP whose hidden channels have example-tied dropout.

    Equal to ``linear(example_tied_dropout(act(linear(x, w_in, b_in)), example_ids, ...), w_out, b_out)``, with the
    same channels kept. With ``w_gate`` the gated form: the dropout is on
    ``act(linear(x, w_gate, b_gate)) * linear(x, w_in, b_in)``.

    Args:
        x: ``[batch, tokens, d]`` or ``[batch, d]``; float16, bfloat16, float32 or float64.
        example_ids: Dataset index of each row, ``[batch]``, or of each token, ``[batch, tokens]``; int64, at least 0.
        w_in: ``[h, d]``.
        b_in: ``[h]`` or None.
        w_out: ``[o, h]``.
        b_out: ``[o]`` or None.
        activation: ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
        num_generalization: Channels ``0 .. num_generalization - 1`` of ``h`` are kept for every example.
        p_mem: Probability that any other channel is kept, in ``[0, 1]``.
        seed: Names the assignment of channels to examples, any int64.
        site: Distinguishes layers that share a seed, in ``[0, 2**32)``.
        w_gate: ``[h, d]`` or None.
        b_gate: ``[h]`` or None; only with ``w_gate``.

    Returns:
        ``[batch, tokens, o]`` or ``[batch, o]``.

    Raises:
        ValueError: If ``activation`` is another, ``b_gate`` comes without ``w_gate``, or a shape or number breaks the
            above.
        TypeError: If a dtype or a type does.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"example_tied_mlp: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if w_gate is None and b_gate is not None:
        raise ValueError("example_tied_mlp: b_gate must come with w_gate, got w_gate=None")
    hidden = F.linear(x, w_in, b_in)
    if w_gate is None:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        hidden = ACTIVATIONS[activation](F.linear(x, w_gate, b_gate)) * hidden
    hidden = example_tied_dropout(hidden, example_ids, num_generalization, p_mem, seed, site, -1)
    return F.linear(hidden, w_out, b_out)
