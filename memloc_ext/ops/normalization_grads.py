"""Per-example gradients of the scale and shift of a normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from memloc_ext.ops._checks import call_without_graph, check_devices, result_dtype

_op = torch.ops.memloc_ext.normalization_grads.default


def normalization_grads(input: Tensor, grad_output: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the gradients of scale and shift of ``(input - mean) * rstd * scale + shift``, of each example.

    One pass over ``input`` and ``grad_output``. Which normalisation it is, the statistics say: those of batch
    normalisation are ``[1, channels, 1]``, of group normalisation ``[batch, channels, 1]``, of layer normalisation
    ``[batch, 1, positions]``; its tokens ``[batch, positions, channels]`` are given transposed, which takes no copy.
    The results are detached.

    Args:
        input: What the layer was given, ``[batch, channels, positions]``; float16, bfloat16, float32 or float64. A copy
            is made of strides where neither channels nor positions are neighbours in memory.
        grad_output: Gradient of the loss by what it returned, of the same shape and dtype.
        mean: Of the normalised elements; its shape is that of ``input``, or 1 where it is shared. Float64 for float64
            inputs, else float32. Zero for a normalisation by the root mean square.
        rstd: One by their standard deviation, likewise.

    Returns:
        Of ``scale`` and of ``shift``, ``[batch, channels]`` each, of the dtype of ``mean``: *sums* over the positions
        of ``grad_output * (input - mean) * rstd`` and of ``grad_output``. Runs of positions are added up in float64.

    Raises:
        ValueError: If a shape or device breaks the above.
        TypeError: If a dtype or a type does.
    """
    return call_without_graph(_op, "normalization_grads", input, grad_output, mean, rstd)


@torch.library.register_fake("memloc_ext::normalization_grads")
def _(input: Tensor, grad_output: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    check_devices("normalization_grads", input=input, grad_output=grad_output, mean=mean, rstd=rstd)
    scale = input.new_empty(input.shape[:2], dtype=result_dtype(input))
    return scale, torch.empty_like(scale)
