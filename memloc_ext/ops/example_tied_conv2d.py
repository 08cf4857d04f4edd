"""A convolution behind example-tied dropout that reads the channels an example keeps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from memloc_ext.ops.example_tied_dropout import example_tied_dropout


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
    r"""Return ``conv2d(example_tied_dropout(x, example_ids, ...), weight, bias, ...)``.

    Args:
        x: What the dropout is given, ``[batch, in, height, width]``; float16, bfloat16, float32 or float64, any strides.
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
        ``[batch, out, rows, columns]``.

    Raises:
        ValueError: If a shape, device, id or number breaks the above.
        TypeError: If a dtype or a type does.
    """
    kept = example_tied_dropout(x, example_ids, num_generalization, p_mem, seed, site)
    geometry = [[n, n] if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]
    return F.conv2d(kept, weight, bias, *geometry, groups)
