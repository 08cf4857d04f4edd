"""An MLP with example-tied dropout: the public function, what PyTorch needs to know, and the generator's plan."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from memloc_ext.ops import _checks
from memloc_ext.ops.example_tied_dropout import call as drop_out
from memloc_ext.ops.example_tied_dropout import check_example_ids
from memloc_ext.ops.kept_mlp import (
    ACTIVATIONS,
    Plan,
    Weights,
    backward,
    composition,
    forward,
    kept_mlp,
    plan,
)

_op = torch.ops.memloc_ext.example_tied_mlp.default
_backward_op = torch.ops.memloc_ext.example_tied_mlp_backward.default


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
    r"""Run an MLP whose hidden channels have example-tied dropout, computing those that are kept.

    Equal to ``linear(example_tied_dropout(act(linear(x, w_in, b_in)), example_ids, ...), w_out, b_out)`` to rounding,
    with the same channels kept. With ``w_gate`` the gated form: the dropout is on
    ``act(linear(x, w_gate, b_gate)) * linear(x, w_in, b_in)``.

    Multiply-adds and the activations saved for the backward pass are in proportion to the channels kept, per run of
    rows with equal ids. Where runs are too short, or nearly all is kept, dense products and a mask take less time and
    are taken. The same bits on every call. On CUDA one launch has the products of up to 96 runs, 16-bit types on tensor
    cores; float32 takes cuBLAS's products for each run where TF32 is allowed. The ids and the lists of kept channels
    are waited for, so that no graph can capture it.

    Differentiable in ``x`` and all weights, to any order: higher ones and the transforms of ``torch.func`` take dense
    products. Under ``torch.compile`` the hidden channels are computed again in the backward pass, and second
    derivatives are refused. Under autocast it computes in the type of autocast, as ``linear`` does.

    Args:
        x: ``[batch, tokens, d]`` or ``[batch, d]``; float16, bfloat16, float32 or float64.
        example_ids: Dataset index of each row, ``[batch]``, or of each token, ``[batch, tokens]``. int64, at least 0,
            on the device of ``x``.
        w_in: ``[h, d]``, as all weights of the dtype and on the device of ``x``.
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
        ValueError: If a shape, device, id, name or number breaks the above.
        TypeError: If a dtype or a type does.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on example-tied dropout.
    """
    settings = (activation, num_generalization, p_mem, seed, site)
    arguments = (x, example_ids, w_in, b_in, w_out, b_out, *settings, w_gate, b_gate)
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return _checks.call(_composed if transformed else _op, "example_tied_mlp", *arguments)


class Arguments(NamedTuple):
    """The operator's arguments."""

    x: Tensor
    example_ids: Tensor
    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    activation: str
    num_generalization: int
    p_mem: float
    seed: int
    site: int = 0
    w_gate: Tensor | None = None
    b_gate: Tensor | None = None

    @property
    def weights(self) -> Weights:
        """Those of the MLP."""
        return Weights(*self[2:6], self.w_gate, self.b_gate)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What there are gradients of, in their order."""
        return self.x, *self.weights

    def dropout(self, hidden: Tensor, example_ids: Tensor) -> Tensor:
        """Zero what examples do not keep of hidden channels, which are the last dimension."""
        return drop_out(hidden, example_ids, *self[7:11], -1)

    @property
    def result_shape(self) -> list[int]:
        """Of the output."""
        return [*self.x.shape[:-1], self.w_out.shape[0]]

    def check(self) -> None:
        """Raise unless the arguments go together; the values of ids are not looked at."""
        x, ids = self.x, self.example_ids
        for name in ("x", "example_ids", "w_in", "w_out"):
            _require(getattr(self, name) is not None, f"{name} must be a tensor, got None")
        floating = {"x": x} | {name: t for name, t in self.weights._asdict().items() if t is not None}
        for name, t in {**floating, "example_ids": ids}.items():
            _require(t.layout == torch.strided, f"{name} must be a tensor with strides, got {t.layout}")
            _require(t.device == x.device, f"{name} must be on the device of x, {x.device}, got {t.device}")
        known = x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        _require(known, f"x must have dtype float16, bfloat16, float32 or float64, got {x.dtype}")
        for name, t in floating.items():
            _require(t.dtype == x.dtype, f"{name} must have dtype {x.dtype}, that of x, got {t.dtype}")
        _require(ids.dtype == torch.int64, f"example_ids must have dtype int64, got {ids.dtype}")
        sizes = list(x.shape)
        _require(x.dim() in (2, 3), f"x must be [batch, tokens, d] or [batch, d], got shape {sizes}")
        tokens = f", or one id per token, {sizes[:2]}" if x.dim() == 3 else ""
        _require(
            list(ids.shape) in (sizes[:1], sizes[:-1]),
            f"example_ids must have shape {sizes[:1]}{tokens}, to go with x of shape {sizes}, got {list(ids.shape)}",
        )
        for name in ("w_in", "w_out"):
            _require(
                floating[name].dim() == 2, f"{name} must have 2 dimensions, got shape {list(floating[name].shape)}"
            )
        d, h, o = sizes[-1], self.w_in.shape[0], self.w_out.shape[0]
        wanted = {"w_in": [h, d], "b_in": [h], "w_out": [o, h], "b_out": [o], "w_gate": [h, d], "b_gate": [h]}
        for name, shape in wanted.items():
            if name in floating:
                got = list(floating[name].shape)
                _require(got == shape, f"{name} must have shape {shape}, got {got}")
        _require(self.w_gate is not None or self.b_gate is None, "b_gate must come with w_gate, got b_gate alone")
        names, p_mem, g = ", ".join(ACTIVATIONS), self.p_mem, self.num_generalization
        _require(self.activation in ACTIVATIONS, f"activation must be one of {names}, got {self.activation!r}")
        _require(0 <= g <= h, f"num_generalization must be in [0, {h}], got {g}")
        _require(0 <= p_mem <= 1, f"p_mem must be in [0, 1], got {p_mem}")
        _require(0 <= self.site < 2**32, f"site must be in [0, 4294967295], got {self.site}")

    def plan(self) -> Plan:
        """Return the plan of least time."""
        ids, g, h = self.example_ids.flatten(), self.num_generalization, len(self.w_in)
        smallest = int(ids.min()) if ids.numel() else 0
        _require(smallest >= 0, f"example_ids must be >= 0, got {smallest}")
        tokens = self.x.shape[1] if self.x.dim() > self.example_ids.dim() + 1 else 1
        runs, lengths = ids.unique_consecutive(return_counts=True)
        row_ids, lengths = ids.repeat_interleave(tokens), (lengths * tokens).tolist()
        ones = self.x.new_ones(1, dtype=torch.float16).expand(len(runs), h)
        dropout, mask = (lambda hidden: self.dropout(hidden, row_ids)), (lambda: self.dropout(ones, runs) != 0)
        return plan(dropout, mask, lengths, g, self.p_mem * (h - g), h)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(f"example_tied_mlp: {message}")  # as from C++: `_checks.call` gives it its type


def _composed(*given: Any) -> Tensor:
    """Run the MLP in dense products, which know every transform."""
    arguments = Arguments(*given)
    arguments.check()
    x, ids = arguments.x, arguments.example_ids
    check_example_ids(ids)
    return composition(x, arguments.weights, arguments.activation, lambda hidden: arguments.dropout(hidden, ids))


def _kernel(*given: Any) -> Tensor:
    arguments = Arguments(*given)
    arguments.check()
    x = arguments.x
    y, _ = forward(x.flatten(0, -2), arguments.weights, arguments.activation, arguments.plan())
    return y.view(arguments.result_shape)


def _backward_kernel(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    arguments, needed = Arguments(*given[:-1]), given[-1]
    _check_backward(grad, arguments)
    rows, weights, activation, plan = (
        arguments.x.flatten(0, -2),
        arguments.weights,
        arguments.activation,
        arguments.plan(),
    )
    _, values = forward(rows, weights, activation, plan)
    by_rows, *grads = backward(grad.flatten(0, -2), rows, weights, values, activation, plan, needed)
    by_x = None if by_rows is None else by_rows.view(arguments.x.shape)
    return tuple(grad.new_empty(0) if t is None else t for t in (by_x, *grads))


def _check_backward(grad: Tensor, arguments: Arguments) -> None:
    arguments.check()
    x, shape = arguments.x, arguments.result_shape
    _require(list(grad.shape) == shape, f"grad_output must have shape {shape}, got {list(grad.shape)}")
    _require(grad.dtype == x.dtype, f"grad_output must have dtype {x.dtype}, that of x, got {grad.dtype}")
    _require(grad.device == x.device, f"grad_output must be on the device of x, {x.device}, got {grad.device}")
    _require(grad.layout == torch.strided, f"grad_output must be a tensor with strides, got {grad.layout}")


for _key in ("CPU", "CUDA"):
    torch.library.impl("memloc_ext::example_tied_mlp", _key, _kernel)
    torch.library.impl("memloc_ext::example_tied_mlp_backward", _key, _backward_kernel)


@torch.library.register_fake("memloc_ext::example_tied_mlp")
def _(*given: Any) -> Tensor:
    arguments = Arguments(*given)
    arguments.check()
    return arguments.x.new_empty(arguments.result_shape)


@torch.library.register_fake("memloc_ext::example_tied_mlp_backward")
def _(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    arguments, needed = Arguments(*given[:-1]), given[-1]
    _check_backward(grad, arguments)
    wanted = (t if need else None for t, need in zip(arguments.inputs, needed, strict=True))
    return tuple(grad.new_empty(0 if t is None else t.shape) for t in wanted)


class _Traced(torch.autograd.Function):
    """The operator where its values are not known: the backward pass computes the hidden channels again."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        arguments = Arguments(*given)
        ctx.settings = arguments[6:11]
        ctx.save_for_backward(arguments.example_ids, *arguments.inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*given)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ids, x, *weights, w_gate, b_gate = ctx.saved_tensors
        need = ctx.needs_input_grad
        needed = [need[0], *need[2:6], *need[11:]]
        grads = _backward_op(grad, x, ids, *weights, *ctx.settings, w_gate, b_gate, needed)
        by_x, *by_weights = (t if need else None for t, need in zip(grads, needed, strict=True))
        return by_x, None, *by_weights[:4], *(None for _ in ctx.settings), *by_weights[4:]


def _autograd(*given: Any) -> Tensor:
    arguments = Arguments(*given)
    x = arguments.x
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments.inputs)
    if torch._C._are_functorch_transforms_active() and (differentiated or forward_ad._current_level >= 0):
        raise RuntimeError(
            "example_tied_mlp: torch.ops.memloc_ext knows no transform of torch.func but vmap; call "
            "memloc_ext.ops.example_tied_mlp"
        )
    if forward_ad._current_level >= 0:
        return _composed(*given)
    if not differentiated:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*given)
    arguments.check()
    if x.is_meta or type(x) not in (Tensor, torch.nn.Parameter) or _get_current_dispatch_mode() is not None:
        return cast(Tensor, _Traced.apply(*arguments))
    return kept_mlp(x, arguments.activation, arguments.plan(), *arguments.weights)


def _refuse_gradients(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (grad, *given)):
        raise RuntimeError(
            "example_tied_mlp: a compiled backward pass has no derivatives; compute second ones without torch.compile"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(grad, *given)


torch.library.impl("memloc_ext::example_tied_mlp", "Autograd", _autograd)
torch.library.impl("memloc_ext::example_tied_mlp_backward", "Autograd", _refuse_gradients)
_checks.register_autocast("example_tied_mlp")
