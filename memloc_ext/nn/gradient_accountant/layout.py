"""Where the examples are in an activation, and where a function leaves them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view", "ravel"))
"""Functions that keep the order of the elements."""
MOVES = frozenset(
    [
        "permute",
        "transpose",
        "t",
        "T",
        "mT",
        "H",
        "mH",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "adjoint",
        "squeeze",
        "unsqueeze",
        "select",
        "narrow",
        "__getitem__",
        "chunk",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unsafe_chunk",
        "unsafe_split",
        "hsplit",
        "vsplit",
        "dsplit",
        "unbind",
        "expand",
        "expand_as",
        "broadcast_to",
        "flip",
        "fliplr",
        "flipud",
        "roll",
        "rot90",
        "index_select",
        "unfold",
        "diagonal",
        "as_strided",
        "swapaxes_",
        "transpose_",
        "squeeze_",
        "unsqueeze_",
        "t_",
        "__get__",
    ]
)
"""Functions that pick elements by place: what they do to the examples' numbers, they do to the examples."""
ALONG = {
    **dict.fromkeys(
        [
            "gather",
            "scatter",
            "scatter_",
            "scatter_add",
            "scatter_add_",
            "scatter_reduce",
            "cumsum",
            "cumprod",
            "sort",
            "argsort",
        ],
        1,
    ),
    **dict.fromkeys(["index_add", "index_add_", "index_copy", "index_copy_"], 1),
    **dict.fromkeys(["topk", "kthvalue", "take_along_dim"], 2),
}
"""Functions that pick or mix elements along one dimension, and the place of its number among their arguments."""
SCATTERS = frozenset(
    [
        "take",
        "msort",
        "index_put",
        "index_put_",
        "masked_scatter",
        "masked_scatter_",
        "masked_select",
        "bincount",
        "unique",
        "repeat_interleave",
        "histc",
        "nonzero",
    ]
)
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


@dataclass(frozen=True)
class Layout:
    """Place of the examples: index ``(i * batch + b) * after + j`` of dimension ``dim`` belongs to example ``b``.

    Attributes:
        dim: From 0.
        before: Number of ``i``.
        batch: Number of examples.
        after: Number of ``j``.
    """

    dim: int
    before: int
    batch: int
    after: int

    @property
    def size(self) -> int:
        """Of the dimension."""
        return self.before * self.batch * self.after

    @property
    def rows_first(self) -> bool:
        """Whether the tensor is ``[batch * after, *]``, so that an example's part is a slice of it."""
        return self.dim == 0 and self.before == 1

    def of(self, batch: int) -> Layout:
        """Return the layout for fewer examples, each of which takes the place of several."""
        return replace(self, batch=batch, after=self.after * (self.batch // batch))

    def first(self, t: Tensor) -> Tensor:
        """Return activations of this layout as ``[batch, *]``."""
        if self.before == self.after == 1:
            return t.movedim(self.dim, 0)
        return t.unflatten(self.dim, (self.before, self.batch, self.after)).movedim(self.dim + 1, 0)


def after(layout: Layout, func: Any, source: Tensor, result: Tensor, args: Any, kwargs: Any) -> Layout | None:
    """Return the layout of what a function returned, or None where the examples cannot be told.

    Args:
        layout: Of ``source``.
        func: The function.
        source: The activation among its arguments, of most dimensions.
        result: A tensor that it returned.
        args: Its arguments.
        kwargs: Its arguments by name.
    """
    name = getattr(func, "__name__", "")
    if result.dim() == 0:
        return None
    if layout.batch < 2:  # every element is of the one example, or there is none
        dims = [d for d, size in enumerate(result.shape) if layout.batch == 1 or size == 0]
        return Layout(dims[0], 1, layout.batch, result.shape[dims[0]] if layout.batch else 1) if dims else None
    if name in RESHAPES:
        return _reshaped(layout, source.shape, result.shape)
    if name in SCATTERS:
        return None
    if name == "embedding":  # appends a dimension
        return layout
    if name == "einsum":
        return _contracted(layout, source, args)
    if name in ALONG:
        given = kwargs.get("dim", args[ALONG[name]] if len(args) > ALONG[name] else -1)
        if not isinstance(given, int) or given % max(1, source.dim()) == layout.dim:
            return None
    if result.dim() == source.dim():
        return layout if result.shape[layout.dim] == layout.size else None
    return _reduced(layout, func, source, result, args, kwargs)


def _reshaped(layout: Layout, old: Sequence[int], new: Sequence[int]) -> Layout | None:
    """Return the layout of the same elements in another shape: the examples' digit keeps its weight."""
    weight = layout.after * math.prod(old[layout.dim + 1 :])
    below = 1
    for dim in range(len(new) - 1, -1, -1):
        above = below * new[dim]
        if weight < above or dim == 0:
            whole = weight >= below > 0 and weight % below == 0 and above % max(1, weight * layout.batch) == 0
            if not whole:
                return None
            return Layout(dim, above // max(1, weight * layout.batch), layout.batch, weight // below)
        below = above
    return None


def _contracted(layout: Layout, source: Tensor, args: Any) -> Layout | None:
    """Return where ``einsum`` leaves the examples: where their letter is."""
    equation, *operands = args
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    operands = list(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    letters = next((part for part, t in zip(inputs.split(","), operands, strict=False) if t is source), "")
    place = output.find(letters[layout.dim]) if letters else -1
    return replace(layout, dim=place) if place >= 0 else None


def moved(
    layout: Layout, func: Any, source: Tensor, results: Sequence[Tensor], args: Any, kwargs: Any
) -> list[Layout | None]:
    """Return the layouts of what a function of `MOVES` returned: it is called again, on the examples' numbers."""
    if layout.batch < 2:
        return [after(layout, func, source, result, args, kwargs) for result in results]
    numbers = _numbers(layout, source)
    try:
        outcome = func(*(numbers if a is source else a for a in args), **kwargs)
        outcome = [outcome] if isinstance(outcome, Tensor) else list(outcome)
    except (RuntimeError, ValueError, TypeError, IndexError):
        outcome = []
    if len(outcome) != len(results):
        return [None] * len(results)
    return [_read(layout, numbers, out) for out in outcome]


def _read(layout: Layout, numbers: Tensor, out: Tensor) -> Layout | None:
    if out.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr():  # a view: its strides tell
        dims = [d for d in range(out.dim()) if out.stride(d) != 0 and out.shape[d] > 1]
        if len(dims) != 1 or out.stride(dims[0]) != 1 or out.shape[dims[0]] != layout.size:
            return None
        return replace(layout, dim=dims[0])
    for dim in range(out.dim()):  # few functions copy
        place = replace(layout, dim=dim)
        if out.shape[dim] == layout.size and torch.equal(out, _numbers(place, out)):
            return place
    return None


def _numbers(layout: Layout, like: Tensor) -> Tensor:
    """Return, for every element of a tensor, its index in the dimension of the examples, as a view."""
    shape = [1] * like.dim()
    shape[layout.dim] = layout.size
    return torch.arange(layout.size, device=like.device).reshape(shape).expand(like.shape)


def _reduced(layout: Layout, func: Any, source: Tensor, result: Tensor, args: Any, kwargs: Any) -> Layout | None:
    """Return where a function that changes the number of dimensions leaves them: where a larger batch shows."""
    sizes = [d for d, size in enumerate(result.shape) if size == layout.size]
    if not sizes or (len(sizes) == 1 and list(source.shape).count(layout.size) == 1):  # no other can be meant
        return replace(layout, dim=sizes[0]) if sizes else None
    shape = list(source.shape)
    shape[layout.dim] += 1
    larger = torch.empty(shape, dtype=source.dtype, device="meta")

    def swap(value: Any) -> Any:
        return larger if value is source else value

    try:
        out = func(*map(swap, args), **{name: swap(value) for name, value in kwargs.items()})
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError):
        return None
    for candidate in (out,) if isinstance(out, Tensor) else out:
        if isinstance(candidate, Tensor) and candidate.dim() == result.dim():
            grown = [d for d, (a, b) in enumerate(zip(candidate.shape, result.shape, strict=True)) if a != b]
            if len(grown) == 1 and result.shape[grown[0]] == layout.size:
                return replace(layout, dim=grown[0])
    return None
