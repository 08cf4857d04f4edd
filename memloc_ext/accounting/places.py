"""Where the examples are in the tensors that are seen while an accountant is open."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.accounting.backward_pass import Repeated
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.members import Members
from memloc_ext.accounting.propagation import ELEMENTWISE, MOVES, after, aligned, axis_of_base, picks, writes
from memloc_ext.batches import tensors_of

# what these return may be of the examples, though no tensor is given to them
_DATA = ("rand", "normal", "bernoulli", "empty", "multinomial", "poisson", "tensor", "as_tensor", "asarray", "from")
# of their second argument only shape or type counts
_SHAPED_LIKE = frozenset(("expand_as", "view_as", "reshape_as", "type_as", "to"))
_SHARED = object()  # of a tensor that is the same for all examples
_UNKNOWN = object()  # of a tensor that nothing is remembered of


class TensorMemory:
    """What is known of tensors, by identity; plain dictionaries compare tensors, and those of PyTorch are slow."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def get(self, t: Tensor) -> Any:
        """Return what is known of a tensor, or `_UNKNOWN`."""
        entry = self._entries.get(id(t))
        return _UNKNOWN if entry is None or entry[0]() is not t else entry[1]

    def put(self, t: Tensor, value: Any) -> None:
        """Remember something of a tensor."""
        key, entries = id(t), self._entries

        def forget(gone: weakref.ref[Tensor]) -> None:
            entry = entries.get(key)
            if entry is not None and entry[0] is gone:
                del entries[key]

        entries[key] = (weakref.ref(t, forget), value)


class Places:
    """Where the examples are in every tensor.

    A tensor belongs to examples, by an `ExampleAxis` or in a way that cannot be told (None), or it is the same for all
    of them. Only what is computed from the model's inputs belongs to examples, whatever the sizes of other tensors;
    outside of the model, what was not made inside of the ``with`` is an input, too.

    Args:
        model: Its parameters and buffers are the same for all examples.
        batch_dim: Dimension of the examples in the model's inputs.
    """

    def __init__(self, model: nn.Module, batch_dim: int) -> None:
        super().__init__()
        self.members = Members.of(model)
        self.parameters = {id(parameter): parameter for parameter in self.members.parameters.values()}
        self.batch_dim = batch_dim
        self.depth = 0  # of calls of the model that are under way
        self.picks = False  # whether the model picked from what belongs to examples by what is in tensors
        self._places = TensorMemory()  # an ExampleAxis, None, _SHARED, or Repeated: shared too
        self._fixed = {*self.parameters, *map(id, self.members.buffers)}

    def add_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take more parameters for the model's."""
        added = {id(parameter): parameter for parameter in parameters}
        self.parameters.update(added)
        self._fixed.update(added)

    def remember_inputs(self, inputs: Iterable[Tensor], batch: int | None, shared: Iterable[Tensor]) -> None:
        """Say of the model's inputs that they have a row for each example, or are the same for all of them."""
        for t in inputs:
            size = t.shape[self.batch_dim]
            self._places.put(t, ExampleAxis(self.batch_dim, 1, size, 1) if size == batch else _SHARED)
        for t in shared:
            self._places.put(t, _SHARED)

    def source(self, t: Tensor) -> Repeated | None:
        """Return which parameter a tensor repeats, or looks up the same rows of for all examples, or None."""
        place = self._places.get(t)
        return place if isinstance(place, Repeated) else None

    def remember(self, t: Tensor, place: ExampleAxis | Repeated) -> None:
        """Say where the examples are in a tensor, or what it repeats for all of them."""
        self._places.put(t, place)

    def axis(self, t: Tensor) -> ExampleAxis | None:
        """Return where the examples are in a tensor, or None if that cannot be told or it is the same for all."""
        place = self._place_of(t)
        return place if isinstance(place, ExampleAxis) else None

    def shared(self, t: Tensor) -> bool:
        """Return whether a tensor is the same for all examples."""
        place = self._place_of(t)
        return place is _SHARED or isinstance(place, Repeated)

    def _place_of(self, t: Tensor) -> Any:
        """Return what is known of a tensor: of one that was made where it could not be seen, by what it is."""
        place = self._places.get(t)
        if place is _SHARED and t._base is not None and isinstance(self._places.get(t._base), ExampleAxis | None):
            return None  # what it is a view of was written to
        if place is not _UNKNOWN:
            return place
        if id(t) in self._fixed or self.parameter_of(t) is not None or (t.dim() == 0 and not t.requires_grad):
            return _SHARED
        if self.depth:
            return _SHARED if t.is_leaf else None
        return ExampleAxis(self.batch_dim, 1, t.shape[self.batch_dim], 1) if t.dim() > self.batch_dim else None

    def parameter_of(self, t: Tensor) -> nn.Parameter | None:
        """Return the parameter that a tensor is or is a view of, or None."""
        if not t.requires_grad:
            return None
        return self.parameters.get(id(t if t.is_leaf or not t._is_view() else t._base))

    def place_results(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], result: Any) -> None:
        """Find out where the examples are in what a function returned."""
        if name.startswith("new_") or name in _SHAPED_LIKE:
            given = given[:1] if name in _SHAPED_LIKE else []
        own = [t for t in given if not self.shared(t)]
        self.picks |= bool(own) and self.depth > 0 and picks(name, args, given)
        written = args[0] if args and isinstance(args[0], Tensor) and writes(name) else kwargs.get("out")
        if isinstance(written, Tensor):
            self._place_written(name, written, args, own)
            if name in MOVES and not self.shared(written):  # its dimensions are others now
                self._places.put(written, None)
        results = [result] if isinstance(result, Tensor) else tensors_of(result)
        results = [t for t in results if self._places.get(t) is _UNKNOWN]
        if not results:
            return
        places: Sequence[Any] = [None] * len(results)
        known = [(t, axis) for t in own if (axis := self.axis(t)) is not None]
        if known:
            places = after(func, args, kwargs, known, results)
        elif not own:
            if not given and not self.depth and name.startswith(_DATA):
                return  # may be the data, made by hand
            places = [_SHARED] * len(results)
        for t, place in zip(results, places, strict=True):
            self._places.put(t, place)

    def _place_written(self, name: str, written: Tensor, args: Any, own: list[Tensor]) -> None:
        """Find out where the examples are in a tensor, the same for all of them until now, that is written to."""
        base = written if written._base is None else written._base
        values = [t for t in own if t is not written and t is not base]
        if not values or id(base) in self._fixed or not self.shared(base):
            return
        axis = self.axis(values[0])
        part = written
        if name == "__setitem__":
            with torch.no_grad():
                part = written[args[1]]
        elif name != "copy_" and name not in ELEMENTWISE:
            axis = None
        if axis is not None and len(values) == 1:
            axis = aligned(axis, values[0], part)
        self._places.put(base, None if axis is None else axis_of_base(axis, part, base))
        if written is not base:
            self._places.put(written, axis if part is written else None)
