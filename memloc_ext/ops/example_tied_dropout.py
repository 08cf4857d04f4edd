"""Example-tied dropout: the public function, and what PyTorch needs to know about the operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from memloc_ext.ops import _checks

_op = torch.ops.memloc_ext.example_tied_dropout.default


def example_tied_dropout(
    x: Tensor,
    example_ids: Tensor,
    num_generalization: int,
    p_mem: float,
    seed: int,
    site: int = 0,
    channel_dim: int = 1,
) -> Tensor:
    r"""Zero each example's own fixed set of memorization channels.

    The draw depends on ``seed``, ``site``, the example id and the channel only: it is the same in every epoch, batch,
    dtype, memory format and device, and the global generators are not touched. Kept activations are not rescaled.
    No mask is stored. Differentiable in ``x``, to any order, in both modes and under ``torch.func``;
    ``torch.ops.memloc_ext`` itself knows no transform but ``torch.vmap``, and refuses the others.

    On CUDA the ids are read back once to check them, which waits for the device; ``torch.ops.memloc_ext`` does not,
    and takes a negative id for the unsigned number with the same bits.

    Args:
        x: Activations, ``[batch, channels, ...]`` (or with the channels at ``channel_dim``), float16, bfloat16, float32
            or float64, any strides; the result has its memory format.
        example_ids: Dataset index of each row, ``[batch]``, or of each token, ``[batch, tokens]`` with the channels
            last. int64, at least 0, on the device of ``x``.
        num_generalization: Channels ``0 .. num_generalization - 1`` are kept for every example.
        p_mem: Probability that any other channel is kept, in ``[0, 1]``.
        seed: Names the assignment of channels to examples, any int64; save it with the model.
        site: Distinguishes layers that share a seed, in ``[0, 2**32)``.
        channel_dim: The dimension of ``x`` that holds the channels; not 0.

    Returns:
        A tensor shaped like ``x``.

    Raises:
        ValueError: If a shape, device, id, ``num_generalization``, ``p_mem``, ``site`` or ``channel_dim`` breaks the
            above.
        TypeError: If a dtype or a type does.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on example-tied dropout.
    """
    if isinstance(example_ids, Tensor):
        check_example_ids(example_ids)
    return call(x, example_ids, num_generalization, p_mem, seed, site, channel_dim)


def call(*arguments: Any) -> Tensor:
    """Run the operator on ids that `check_example_ids` has seen: the rest is checked without a wait."""
    return _checks.call(_run, "example_tied_dropout", *arguments)


def check_example_ids(example_ids: Tensor) -> None:
    """Raise ValueError if an id on a CUDA device is negative; the operator itself checks ids on the CPU."""
    if not _checks.readable(example_ids) or example_ids.numel() == 0:
        return
    smallest = int(example_ids.min())
    if smallest < 0:
        raise ValueError(f"example_tied_dropout: example_ids must be >= 0, got {smallest}")


@torch.library.register_fake("memloc_ext::example_tied_dropout")
def _(x: Tensor, example_ids: Tensor, *_: object) -> Tensor:
    if x.device != example_ids.device:  # a meta tensor brings even real ones here
        got = f"ids on {example_ids.device} and x on {x.device}"
        raise ValueError(f"example_tied_dropout: example_ids must be on the device of x; got {got}")
    return torch.empty_like(x)


def _vmap(
    run: Callable[..., Tensor],
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    example_ids: Tensor,
    num_generalization: int,
    p_mem: float,
    seed: int,
    site: int = 0,
    channel_dim: int = 1,
) -> tuple[Tensor, int]:
    x_dim, ids_dim = in_dims[:2]
    settings = (num_generalization, p_mem, seed, site)
    if ids_dim is None:
        # one set of ids: a dimension more that the mask does not depend on, right behind those of the ids
        new = example_ids.dim()
        x = x.movedim(cast(int, x_dim), new)
        rank = x.dim() - 1
        valid = -rank <= channel_dim < rank and channel_dim % rank > 0
        return run(x, example_ids, *settings, channel_dim % rank + 1 if valid else 0), new
    # ids of their own: a part of the batch
    x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    example_ids = example_ids.movedim(ids_dim, 0)
    y = run(x.flatten(0, 1), example_ids.flatten(0, 1), *settings, channel_dim)
    return y.unflatten(0, x.shape[:2]), 0


torch.library.register_vmap("memloc_ext::example_tied_dropout", functools.partial(_vmap, _op))


class _Function(torch.autograd.Function):
    """The operator multiplies by a mask: its own derivative, in both directions."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, example_ids, *ctx.settings = inputs
        ctx.save_for_backward(example_ids)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(example_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _run(grad, *ctx.saved_tensors, *ctx.settings), None, *(None for _ in ctx.settings)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _run(tangent, *ctx.saved_tensors, *ctx.settings)

    @staticmethod
    def vmap(*arguments: Any) -> tuple[Tensor, int]:
        return _vmap(_run, *arguments)


class _Recorded(torch.autograd.Function):
    """The same where no transform has to be asked, in one call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _op(*arguments)
        _Function.setup_context(ctx, arguments, output)
        return output

    backward, jvp = _Function.backward, _Function.jvp  # pyright: ignore[reportAssignmentType]


_record = cast(Any, super(torch.autograd.Function, _Recorded)).apply


def _autograd(x: Tensor, *arguments: Any) -> Tensor:
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and x.requires_grad):
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "example_tied_dropout: torch.ops.memloc_ext knows no transform of torch.func but vmap; call "
                "memloc_ext.ops.example_tied_dropout"
            )
        return _record(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, *arguments)


# not torch.library.register_autograd: what it makes takes twice the time, and loses tangents without a word
torch.library.impl("memloc_ext::example_tied_dropout", "Autograd", _autograd)


def _run(*arguments: Any) -> Tensor:
    """Run the operator in the way that costs least and knows every derivative that may be asked for."""
    if torch.compiler.is_compiling() or not isinstance(arguments[0], Tensor):
        return _op(*arguments)
    if torch._C._are_functorch_transforms_active():
        return cast(Tensor, _Function.apply(*arguments))
    return _autograd(*arguments)  # not by the dispatcher, which takes longer to get there
