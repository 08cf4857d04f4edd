"""Run a recorded call for many rows at a time: a row is an example in a variant; values are ``[rows, *]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memloc_ext.ablation.recording import Call, Ref, UnsupportedError, as_list

aten = torch.ops.aten

POOLS = {"avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d"}
# their first dimension is the batch, whatever its size: rows become more of it
_BATCHED = POOLS | {"convolution", "upsample_nearest2d", "upsample_bilinear2d"}
BATCH_NORMS = {"native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"}
COPIES = frozenset(("clone", "_to_copy", "alias", "detach"))
_ATTENTION = {f"_scaled_dot_product_{k}" for k in ("flash_attention_for_cpu", "flash_attention", "efficient_attention")}


def run_rows(call: Call, read: Callable[[int], Tensor]) -> list[Tensor | None]:
    """Run a call that was recorded for one example as if for each row on its own.

    Values are read, and outputs returned, as ``[rows, *shape]``; None for what is not a tensor. UnsupportedError says
    that PyTorch has no way to run it so.
    """
    leaves = list(call.leaves)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Ref)]
    given = [read(leaves[i].index) for i in places]

    function = _VMAPPED.get(call.function, call.function)

    def run(*tensors: Tensor) -> Any:
        for i, t in zip(places, tensors, strict=True):
            leaves[i] = t
        return call.run(leaves, function)

    apart = call.name in BATCH_NORMS and not normalises_by_batch(call)
    batched = places == [0] and (apart or call.name in _BATCHED)
    if call.name in _ATTENTION and all(t.dim() == 5 and t.shape[1] == given[0].shape[1] for t in given):
        batched = True
        for i, t in enumerate(leaves):
            if isinstance(t, Tensor) and t.dim() == 4 and len(t) == given[0].shape[1]:
                leaves[i] = t.expand(len(given[0]), *t.shape).flatten(0, 1)
    try:
        if _is_elementwise(call, given):
            results = run(*given)  # vmap takes as long as a small one does
        else:
            results = run(*(t.flatten(0, 1) for t in given)) if batched else torch.vmap(run)(*given)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        where = call.module or "the model"
        raise UnsupportedError(
            f"{call.name} in {where} cannot be run for many examples apart from each other"
        ) from error
    results = as_list(results)
    if not batched:
        return [t if isinstance(t, Tensor) else None for t in results]
    return [
        t.unflatten(0, (len(given[0]), -1)) if index >= 0 and t.dim() and t.numel() else None
        for t, index in zip(results, call.outputs, strict=True)
    ]


def _copy(to: Tensor, source: Tensor, *_: object) -> Tensor:
    """Return what ``aten.copy`` does, for which vmap has no rule, without its loop over the rows."""
    return source.to(to.dtype).expand_as(to)


def trimmed(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Return the weight of a convolution without the borders that meet padding alone, and the padding that is left.

    In deep layers images are smaller than filters, for which oneDNN can take a hundred times as long.
    """
    left = list(padding)
    for i, (size, pad, step, gap) in enumerate(zip(x.shape[2:], padding, stride, dilation, strict=True)):
        taps = weight.shape[2 + i]
        last = (size + 2 * pad - gap * (taps - 1) - 1) // step * step  # where the last window begins
        before, behind = -((last - pad) // gap), taps + (-size - pad) // gap
        cut = max(0, min(before, behind, pad // gap))
        weight, left[i] = weight.narrow(2 + i, cut, taps - 2 * cut), pad - cut * gap
    return weight, left


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    stride, padding, dilation, transposed, *others = rest
    if not transposed:
        weight, padding = trimmed(x, weight, stride, padding, dilation)
    return aten.convolution.default(x, weight, bias, stride, padding, dilation, transposed, *others)


# view: rows have other strides
_VMAPPED: dict[object, Callable[..., Any]] = {
    aten.view.default: aten.reshape.default,
    aten.copy.default: _copy,
    aten.convolution.default: _convolution,
}


def _is_elementwise(call: Call, given: Sequence[Tensor]) -> bool:
    """Return whether a call of values ``[rows, *shape]`` broadcasts them, and constants, just as without the rows."""
    rank = given[0].dim() if given else 0
    constants = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    return (
        call.is_pointwise
        and rank > 1  # numbers have a say of their own in the type of the result
        and all(t.dim() == rank for t in given)
        and all(t.dim() < rank for t in constants)
    )


def keeps_rows_apart(call: Call, shapes: Sequence[torch.Size]) -> bool:
    """Return whether it is plain that the first dimension of what a call reads and returns is the batch, kept apart."""
    read, written = [shapes[ref] for ref in call.refs], shapes[call.outputs[0]]
    if any(not shape or shape[0] != 1 for shape in (*read, written)):
        return False
    if call.is_pointwise or call.name in BATCH_NORMS or call.name in _BATCHED:
        return len({len(shape) for shape in (*read, written)}) == 1
    rank = len(written)
    if call.name in ("mean", "amax", "sum"):
        dims: Any = next(iter(call.args[1:]), None)
        return bool(dims) and all(d % len(read[0]) for d in dims)
    if call.name in ("addmm", "mm"):
        return isinstance(call.args[-2], Ref) and len(call.refs) == 1
    if call.name == "cat":
        parts: list[Any] = [*call.args, 0]
        return parts[1] % rank != 0
    return call.name in ("view", "alias", "clone", "native_layer_norm", "native_group_norm")


def normalises_by_batch(call: Call) -> bool:
    """Return whether a batch norm uses the statistics of what it is given: where that is a batch, examples meet."""
    return not call.name.endswith("no_training") and bool(call.args[5])
