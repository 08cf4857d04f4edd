"""Example-tied dropout: the public function, and what PyTorch needs to know about the operator."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

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
    No mask is stored. Differentiable in ``x``, to any order.

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
    return _checks.call(_op, "example_tied_dropout", *arguments)


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
        raise ValueError(
            "example_tied_dropout: example_ids must be on the device of x; "
            f"got ids on {example_ids.device} and x on {x.device}"
        )
    return torch.empty_like(x)


class _Autograd(_SingleLevelFunction):
    """The operator multiplies by a mask: its own derivative, in both directions.

    It runs below a torch.func transform, which has already singled out the level that records: a Function would ask the
    transform again.
    """

    @staticmethod
    def forward(x: Tensor, example_ids: Tensor, *settings: Any) -> Tensor:
        # A Function turns recording off; the outer levels of nested torch.func transforms record this very call.
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), _set_fwd_grad_enabled(True):
            return _op(x, example_ids, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, example_ids, *ctx.settings = inputs
        ctx.save_for_backward(example_ids)
        ctx.save_for_forward(example_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _op(grad, *ctx.saved_tensors, *ctx.settings), None, *(None for _ in ctx.settings)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _op(tangent, *ctx.saved_tensors, *ctx.settings)

    @staticmethod
    def vmap(
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
            return _op(x, example_ids, *settings, channel_dim % rank + 1 if valid else 0), new
        # ids of their own: a part of the batch
        x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        example_ids = example_ids.movedim(ids_dim, 0)
        y = _op(x.flatten(0, 1), example_ids.flatten(0, 1), *settings, channel_dim)
        return y.unflatten(0, x.shape[:2]), 0


def _autograd(*arguments: Any) -> Tensor:
    with enable_single_level_autograd_function():
        return cast(Any, _Autograd).apply(*arguments)


# not torch.library.register_autograd: what it makes knows no torch.func transform and no forward mode
torch.library.impl("memloc_ext::example_tied_dropout", "Autograd", _autograd)
torch.library.register_vmap("memloc_ext::example_tied_dropout", _Autograd.vmap)
