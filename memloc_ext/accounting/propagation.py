"""Where the examples are in an activation, and where a function leaves them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memloc_ext.accounting.example_axis import ExampleAxis, Picked, picked

RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view", "ravel"))
"""Functions that keep the order of the elements."""
_MOVES = """
    permute transpose t T mT H mH movedim moveaxis swapaxes swapdims adjoint squeeze unsqueeze select narrow
    __getitem__ chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit unbind
    expand expand_as broadcast_to flip fliplr flipud roll rot90 index_select unfold diagonal swapaxes_
    transpose_ squeeze_ unsqueeze_ t_ __get__
"""
MOVES = frozenset(_MOVES.split())
"""Functions that pick elements by place: what they do to the examples' numbers, they do to the examples."""
_DIM_FIRST = """
    gather scatter scatter_ scatter_add scatter_add_ scatter_reduce cumsum cumprod sort argsort index_add
    index_add_ index_copy index_copy_
"""
_DIM_SECOND = "topk kthvalue take_along_dim"
ALONG = dict.fromkeys(_DIM_FIRST.split(), 1) | dict.fromkeys(_DIM_SECOND.split(), 2)
"""Functions that pick or mix elements along one dimension, and the place of its number among their arguments."""
_ORDERS = frozenset(("sort", "argsort", "topk"))  # which say last what they picked
_SCATTERS = """
    take msort index_put index_put_ masked_scatter masked_scatter_ masked_select bincount unique repeat_interleave
    histc nonzero as_strided
"""
SCATTERS = frozenset(_SCATTERS.split())
"""Functions that may put rows anywhere, by what is in tensors."""
_NAMES = "add sub rsub mul div true_divide pow maximum minimum where lerp addcmul addcdiv multiply subtract divide"
_OPERATORS = "add sub mul truediv div pow"
ELEMENTWISE = frozenset(
    (
        *_NAMES.split(),
        *(f"{name}_" for name in _NAMES.split()),
        *(f"__{before}{name}__" for name in _OPERATORS.split() for before in ("", "r", "i")),
    )
)
"""Functions of elements that are in the same place, or broadcast."""


def after(
    func: Any, args: Any, kwargs: Any, given: Sequence[tuple[Tensor, ExampleAxis]], results: Sequence[Tensor]
) -> list[ExampleAxis | None]:
    """Return where the examples are in what a function returned; None where that cannot be told.

    Sizes that happen to be equal must not matter: a function that moves elements is called again on the examples'
    numbers, and any other one is asked which dimension of its result grows with the batch.

    Args:
        func: The function.
        args: Its arguments.
        kwargs: Its arguments by name.
        given: Its arguments that belong to examples, in known places.
        results: What it returned.
    """
    name = getattr(func, "__name__", "")
    source, axis = max(given, key=lambda pair: pair[0].dim())
    if axis.batch < 2:
        return [_only(axis.batch, result) for result in results]
    if name in RESHAPES:
        return [_reshaped(axis, source.shape, result.shape) for result in results]
    if name in SCATTERS or not any(result.dim() for result in results):
        return [None] * len(results)
    if name in MOVES and args and source is args[0]:
        return _moved(axis, func, source, results, args, kwargs)
    if name in ALONG:
        if name in _ORDERS and source.dim() == 1:
            return [picked(axis, results[-1])] * len(results)
        along = kwargs.get("dim", args[ALONG[name]] if len(args) > ALONG[name] else -1)
        if not isinstance(along, int) or along % max(1, source.dim()) == axis.dim:
            return [None] * len(results)
    if name in ELEMENTWISE and len(args) + len(kwargs) > 1:  # ``where`` of a condition alone counts
        places = {aligned(place, t, results[0]) for t, place in given if t.dim()}
        return [places.pop() if len(places) == 1 else None]
    return _grown(func, args, kwargs, given, results)


def writes(name: str) -> bool:
    """Return whether a method writes to its tensor."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def picks(name: str, args: Any, given: Sequence[Tensor]) -> bool:
    """Return whether a function puts elements in places that its arguments' values tell, not their shapes alone."""
    if name in MOVES or name == "__setitem__":
        return len(given) > 1 or (name.endswith("item__") and _has_list(args[1]))
    return name in SCATTERS or (name in ALONG and not name.startswith("cum"))


def _has_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(map(_has_list, index)))


def _only(batch: int, result: Tensor) -> ExampleAxis | None:
    """Return the axis of the one example, of which every element is, or of none."""
    dims = [d for d, size in enumerate(result.shape) if batch == 1 or size == 0]
    return ExampleAxis(dims[0], 1, batch, result.shape[dims[0]] if batch else 1) if dims else None


def aligned(axis: ExampleAxis, source: Tensor, result: Tensor) -> ExampleAxis | None:
    """Return the axis of elements in the same places, counted from the last dimension."""
    dim = axis.dim + result.dim() - source.dim()
    return replace(axis, dim=dim) if dim >= 0 and result.shape[dim] == axis.size else None


def axis_of_base(axis: ExampleAxis, part: Tensor, base: Tensor) -> ExampleAxis | None:
    """Return the axis of a tensor of which a part has this axis; None if that is not a plain slice."""
    if part is base:
        return axis
    if part.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
        return None
    step = part.stride(axis.dim)
    dims = [d for d, size in enumerate(base.shape) if size == axis.size and base.stride(d) == step]
    return replace(axis, dim=dims[0]) if len(dims) == 1 else None


def _reshaped(axis: ExampleAxis, old: Sequence[int], new: Sequence[int]) -> ExampleAxis | None:
    """Return the axis of the same elements in another shape: the examples' digit keeps its weight."""
    if isinstance(axis, Picked):
        return axis if list(old[: axis.dim + 1]) == list(new[: axis.dim + 1]) else None
    weight = axis.after * math.prod(old[axis.dim + 1 :])
    below = 1
    for dim in range(len(new) - 1, -1, -1):
        above = below * new[dim]
        if weight < above or dim == 0:
            if not (weight >= below > 0 and weight % below == 0 and above % max(1, weight * axis.batch) == 0):
                return None
            return ExampleAxis(dim, above // max(1, weight * axis.batch), axis.batch, weight // below)
        below = above
    return None


def _moved(
    axis: ExampleAxis, func: Any, source: Tensor, results: Sequence[Tensor], args: Any, kwargs: Any
) -> list[ExampleAxis | None]:
    """Return the axes of what a function of `MOVES` returned: it is called again, on the examples' numbers."""
    numbers = _numbers(axis, source)
    try:
        outcome = func(*(numbers if a is source else a for a in args), **kwargs)
        outcome = [outcome] if isinstance(outcome, Tensor) else list(outcome)
    except (RuntimeError, ValueError, TypeError, IndexError):
        outcome = []
    if len(outcome) != len(results):
        return [None] * len(results)
    return [_read(axis, numbers, out) for out in outcome]


def _read(axis: ExampleAxis, numbers: Tensor, out: Tensor) -> ExampleAxis | None:
    if out.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr():  # a view: its strides tell
        dims = [d for d in range(out.dim()) if out.stride(d) != 0 and out.shape[d] > 1]
        if len(dims) == 1 and out.stride(dims[0]) == 1 and out.shape[dims[0]] == axis.size:
            return replace(axis, dim=dims[0])
    for dim in range(out.dim()):  # few functions copy
        place = replace(axis, dim=dim)
        if out.shape[dim] == axis.size and torch.equal(out, _numbers(place, out)):
            return place
    return picked(axis, out)


def _numbers(axis: ExampleAxis, like: Tensor) -> Tensor:
    """Return, for every element of a tensor, its index in the dimension of the examples, as a view."""
    shape = [1] * like.dim()
    shape[axis.dim] = axis.size
    return torch.arange(axis.size, device=like.device).reshape(shape).expand(like.shape)


_kept: dict[Any, list[int | None]] = {}  # what `_grown` found out
_KEPT = 4096  # calls


def _grown(
    func: Any, args: Any, kwargs: Any, given: Sequence[tuple[Tensor, ExampleAxis]], results: Sequence[Tensor]
) -> list[ExampleAxis | None]:
    """Return where a function leaves the examples: in the one dimension that is larger with one more of them."""
    axes = {id(t): axis for t, axis in given}
    axis = given[0][1]
    if any(replace(other, dim=0) != replace(axis, dim=0) for _, other in given):
        return [None] * len(results)
    key = (func, _key(args, axes), _key(kwargs, axes))
    try:
        dims = _kept.get(key)
    except TypeError:  # an argument that cannot be hashed
        key, dims = None, None
    if dims is None:
        dims = _growing(func, args, kwargs, axes, results)
        if key is not None:
            if len(_kept) >= _KEPT:
                _kept.clear()
            _kept[key] = dims
    return [None if dim is None else replace(axis, dim=dim) for dim in dims]


def _growing(
    func: Any, args: Any, kwargs: Any, axes: Mapping[int, ExampleAxis], results: Sequence[Tensor]
) -> list[int | None]:
    axis = next(iter(axes.values()))

    def larger(value: Any, others: bool) -> Any:
        if isinstance(value, Tensor):
            shape, own = list(value.shape), axes.get(id(value))
            if own is not None:
                shape[own.dim] += 1
            elif others and value.dim() > axis.dim and shape[axis.dim] == axis.size:
                shape[axis.dim] += 1
            return torch.empty(shape, dtype=value.dtype, device="meta")
        if isinstance(value, tuple | list):
            items = [larger(item, others) for item in value]
            return items if isinstance(value, list) else tuple(items)
        return {name: larger(item, others) for name, item in value.items()} if isinstance(value, dict) else value

    for others in (False, True):  # constants that must have a row for each example: expanded ones, initial states
        try:
            with torch.no_grad():
                outcome = func(*larger(args, others), **larger(kwargs, others))
        except Exception:  # what needs the values, or sizes that fit the batch
            continue
        outcome = [t for t in (outcome if isinstance(outcome, tuple | list) else [outcome]) if isinstance(t, Tensor)]
        if len(outcome) == len(results):
            return [_larger(result.shape, out.shape, axis) for result, out in zip(results, outcome, strict=True)]
    return [None] * len(results)


def _larger(old: Sequence[int], new: Sequence[int], axis: ExampleAxis) -> int | None:
    """Return the only dimension that is larger, if it is of the examples and of nothing else."""
    if len(old) != len(new):
        return None
    changed = [dim for dim, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    size = axis.size
    return changed[0] if len(changed) == 1 and (old[changed[0]], new[changed[0]]) == (size, size + 1) else None


def _key(value: Any, axes: Mapping[int, ExampleAxis]) -> Any:
    """Return what of an argument matters to `_grown`, to be hashed."""
    if isinstance(value, Tensor):
        axis = axes.get(id(value))
        return value.shape, value.dtype, -1 if axis is None else axis.dim
    if isinstance(value, tuple | list):
        return tuple(_key(item, axes) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item, axes)) for name, item in value.items())
    return type(value), value
