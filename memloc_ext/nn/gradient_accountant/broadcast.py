"""Parameters that meet activations element by element, broadcast over the examples: positions, scales, class tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memloc_ext.nn.gradient_accountant.layer import Rule
from memloc_ext.nn.gradient_accountant.run import Weight
from memloc_ext.nn.gradient_accountant.session import Session, tensors
from memloc_ext.nn.gradient_accountant.uses import EmbeddingUse, Rows

_NAMES = "add sub rsub mul div true_divide pow maximum minimum where lerp addcmul addcdiv multiply subtract divide"
_OPERATORS = "add sub mul truediv div pow"
ELEMENTWISE = (
    *_NAMES.split(),
    *(f"{name}_" for name in _NAMES.split()),
    *(f"__{before}{name}__" for name in _OPERATORS.split() for before in ("", "r", "i")),
)


class Broadcast(Rule):
    """A parameter, repeated for every example: the gradient of the repeated one is each example's own.

    Args:
        session: See `Rule`.
        weight: The parameter or view; of a looked up one the table.
        shape: To expand to; its dimension ``place`` is that of the examples.
        place: See ``shape``.
        lookup: Indices and padding index, if ``table[indices]`` is what is repeated.
    """

    def __init__(
        self,
        session: Session,
        weight: Weight,
        shape: Sequence[int],
        place: int,
        lookup: tuple[Tensor, int] | None = None,
    ) -> None:
        super().__init__(session, [weight])
        self.shape, self.place, self.lookup = list(shape), place, lookup

    def forward(self, value: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `Rule`."""
        self.own = value.shape
        return value.expand(self.shape), ()

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `Rule`."""
        run = self.session.run
        own = [1] * (grad.dim() - len(self.own)) + list(self.own)
        rows = grad.movedim(self.place, 0)
        del own[self.place]
        repeated = [d + 1 for d, size in enumerate(own) if size == 1 and rows.shape[d + 1] != 1]
        rows = (rows.sum(repeated) if repeated else rows).reshape(len(rows), *self.own)
        if run is None:
            return (rows.sum(0),)
        if len(rows) != run.batch:
            if run.batch == 0 or len(rows) % run.batch:
                raise ValueError(
                    f"GradientAccountant: {self.name(0)} meets {len(rows)} rows in dimension {self.place}, where the "
                    f"{run.batch} examples must be; batch_dim and batch_size say otherwise"
                )
            rows = rows.unflatten(0, (run.batch, -1)).sum(1)
        if self.lookup is None:
            return (self.record(0, Rows(rows)),)
        weight, (indices, padding_idx) = self.weights[0], self.lookup
        assert weight is not None
        same = indices.expand(run.batch, *indices.shape).flatten(1)
        use = EmbeddingUse(same, rows.flatten(1).reshape(*same.shape, -1), weight.tensor.shape[0], padding_idx)
        self.record(0, use)  # its gradient is the table's, and the lookup passes that on itself
        return (rows.sum(0) if run.weight_grads else None,)


def broadcast(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle an elementwise function of activations and parameters."""
    given = list(tensors((args, kwargs)))
    others = [t for t in given if _source(session, t) is None]
    if "out" in kwargs or any(isinstance(value, tuple | list) for value in args):
        return NotImplemented
    if session.batch is None and others:
        session.see(max(others, key=lambda t: t.dim()))
    rank = max(t.dim() for t in given)
    places = {
        rank - t.dim() + session.batch_dim
        for t in others
        if t.dim() > session.batch_dim
        and session.batch is not None
        and t.shape[session.batch_dim] % max(1, session.batch) == 0
        and not session.constant(t)
    }
    if len(places) != 1:
        return NotImplemented
    place = places.pop()
    rows = max(t.shape[place - rank] for t in others if t.dim() >= rank - place)

    def repeat(t: Any) -> Any:
        source = _source(session, t)
        if source is None:
            return t
        weight, lookup = source
        shape = [1] * (rank - t.dim()) + list(t.shape)
        if shape[place] != 1:
            raise _PairedError
        shape[place] = rows
        return Broadcast(session, weight, shape, place, lookup)(t)

    try:
        return func(*map(repeat, args), **{name: repeat(value) for name, value in kwargs.items()})
    except _PairedError:
        return NotImplemented


def expand(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle ``parameter.expand(batch, ...)``, ``repeat`` where it does the same, and ``expand_as``."""
    parameter, *sizes = args
    weight = session.weight(parameter)
    if weight is None or kwargs:
        return NotImplemented
    if len(sizes) == 1 and isinstance(sizes[0], Tensor):
        sizes = list(sizes[0].shape)
    elif len(sizes) == 1 and not isinstance(sizes[0], int):
        sizes = list(sizes[0])
    place, extra = session.batch_dim, len(sizes) - parameter.dim()
    own = [1] * extra + list(parameter.shape)
    if func.__name__ == "repeat":
        if any(size != 1 and n != 1 for size, n in zip(own, sizes, strict=True)):
            return NotImplemented
        sizes = [size * n for size, n in zip(own, sizes, strict=True)]
    sizes = [own[d] if size == -1 else size for d, size in enumerate(sizes)]
    if extra < 0 or place >= len(sizes) or own[place] != 1 or sizes[place] != (session.batch or sizes[place]):
        return NotImplemented
    if session.batch is None and sizes[place] == 1:
        return NotImplemented
    return Broadcast(session, weight, sizes, place)(parameter)


class _PairedError(Exception):
    """A parameter has rows of its own where the examples are."""


def _source(session: Session, t: Any) -> tuple[Weight, tuple[Tensor, int] | None] | None:
    weight = session.weight(t)
    if weight is not None:
        return weight, None
    found = session.lookups.get(t) if isinstance(t, Tensor) else None
    return None if found is None else (found[0], (found[1], found[2]))
