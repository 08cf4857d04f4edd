"""A convolution behind example-tied dropout: the public function, and the operator as a composition of two others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memloc_ext.ops import _checks
from memloc_ext.ops.example_tied_dropout import call as drop_out
from memloc_ext.ops.example_tied_dropout import check_example_ids
from memloc_ext.ops.kept_conv2d import kept_conv2d, pairs

_op = torch.ops.memloc_ext.example_tied_conv2d.default


def example_tied_conv2d(
    x: Tensor,
    example_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    num_generalization: int,
    p_mem: float,
    seed: int,
    site: int = 0,
) -> Tensor:
    r"""Return ``conv2d(example_tied_dropout(x, example_ids, ...), weight, bias, ...)``, reading the channels kept.

    The channels kept are those of `example_tied_dropout`. On the CPU only they are read, and the multiply-adds of the
    forward pass and of both gradients are in their proportion. Where that would take longer, the library's convolution
    runs over all channels: nearly all of them kept, few positions, few outputs per group, or 16-bit values that the
    processor multiplies itself. On CUDA it always does, so nothing is saved there.

    The gradient of ``x`` is zero where a channel is not kept. Differentiable in ``x``, ``weight`` and ``bias``, to any
    order; second derivatives, forward mode and ``torch.func`` compute all channels. The same bits on every call, with
    any number of threads. Under autocast it computes in the type of autocast, as ``conv2d`` does; 16-bit values are
    multiplied and added up in float32.

    Args:
        x: What the dropout is given, ``[batch, in, height, width]``; float16, bfloat16, float32 or float64, any
            strides.
        example_ids: Dataset index of each image, ``[batch]``, int64, at least 0, on the device of ``x``.
        weight: The convolution's filters, ``[out, in / groups, kernel height, kernel width]``, of the dtype of ``x``.
        bias: ``[out]``, or None.
        stride: One number or two, at least 1.
        padding: One number or two, at least 0; the padding is zeros.
        dilation: One number or two, at least 1.
        groups: Divides ``in`` and ``out``.
        num_generalization: Channels ``0 .. num_generalization - 1`` are kept for every example.
        p_mem: Probability that any other channel is kept, in ``[0, 1]``.
        seed: Names the assignment of channels to examples, any int64.
        site: Distinguishes layers that share a seed, in ``[0, 2**32)``.

    Returns:
        ``[batch, out, rows, columns]``, contiguous.

    Raises:
        ValueError: If a shape, device, id or number breaks the above.
        TypeError: If a dtype or a type does.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on example-tied dropout.
    """
    if isinstance(example_ids, Tensor):
        check_example_ids(example_ids)
    arguments = x, example_ids, weight, bias, *pairs(stride, padding, dilation), groups
    settings = {"num_generalization": num_generalization, "p_mem": p_mem, "seed": seed, "site": site}
    transformed = torch._C._are_functorch_transforms_active()  # which would loop over a batch of operators
    operator = compose if transformed and not torch.compiler.is_compiling() else _op
    return _checks.call(operator, "example_tied_conv2d", *arguments, **settings)


def compose(
    x: Tensor,
    example_ids: Tensor,
    *layer: Any,
    num_generalization: int,
    p_mem: float,
    seed: int,
    site: int = 0,
) -> Tensor:
    """Run the operator: a mask, and a convolution that reads what it keeps."""
    settings = num_generalization, p_mem, seed, site
    try:
        keep = drop_out(x.new_ones(x.shape[:2]), example_ids, *settings) != 0
        return kept_conv2d(x, keep, *layer)
    except (RuntimeError, ValueError, TypeError) as error:
        name, _, rest = str(error).partition(": ")
        if name in ("example_tied_dropout", "kept_conv2d"):
            raise type(error)(f"example_tied_conv2d: {rest}") from None
        raise


torch.library.impl("memloc_ext::example_tied_conv2d", "CompositeImplicitAutograd", compose)
