"""Sees every PyTorch function that is called while an accountant is open, and lets a rule run those with parameters."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memloc_ext.nn.gradient_accountant.in_parts import in_parts
from memloc_ext.nn.gradient_accountant.layout import ELEMENTWISE, MOVES, Layout, after, moved
from memloc_ext.nn.gradient_accountant.places import UNKNOWN, Places
from memloc_ext.nn.gradient_accountant.run import Repeated, Run, Weight

Handler = Callable[..., Any]
# what gradient checkpointing recomputes inside of these is to be seen
_BACKWARD = {
    function: in_parts(function) for function in (torch.autograd.backward, torch.autograd.grad, Tensor.backward)
}
# what these return may be of the examples, though no tensor is given to them
_DATA = ("rand", "normal", "bernoulli", "empty", "multinomial", "poisson", "tensor", "as_tensor", "asarray", "from")

# called all the time, mostly for numbers
_QUESTIONS = frozenset(
    (
        *("__get__", "__set__", "dim", "size", "numel", "__len__", "stride", "is_floating_point", "is_contiguous"),
        "_set_grad_enabled",
    )
)
_PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, slice, type(...)))
_SHARED = object()
_SHAPED_LIKE = frozenset(("expand_as", "view_as", "reshape_as", "type_as"))  # of the second only shape or type counts
_FORWARD_PASSES = 16  # whose outputs are kept for a backward pass


class Session(TorchFunctionMode):
    """What one ``with`` of an accountant knows.

    A tensor belongs to examples, by a `Layout` or in a way that cannot be told (None), or it is the same for all of
    them. While the model runs, what is computed from its inputs belongs to examples, and nothing else; outside of it,
    so do tensors of unknown origin.

    Args:
        model: Its parameters that require gradients are accounted.
        batch_dim: Dimension of the examples in the model's inputs.
        handlers: Function, or name of one, to its handler: ``handler(session, function, args, kwargs)`` runs it or
            returns NotImplemented to have it run as if nobody looked.
    """

    def __init__(self, model: nn.Module, batch_dim: int, handlers: Mapping[Any, Handler]) -> None:
        super().__init__()
        self.parameters = {id(parameter): parameter for parameter in model.parameters()}
        self.whole: dict[str, nn.Parameter] = {}  # by name, where the model keeps parts
        self.batch: int | None = None  # of the last forward pass
        self.calls: Counter[int] = Counter()
        self.run: Run | None = None
        self.outputs: deque[list[Tensor]] = deque(maxlen=_FORWARD_PASSES)
        self._model, self._batch_dim, self._handlers = model, batch_dim, handlers
        self._places = Places()  # a Layout, None, _SHARED, or Repeated: shared too
        self._buffers = list(model.buffers())
        self._fixed = {*self.parameters, *map(id, self._buffers)}
        self._inside = 0

    def enter_model(self, inputs: object) -> None:
        """Take the number of examples from the model's inputs, and these for what belongs to examples."""
        self._inside += 1
        if self._inside > 1:
            return
        given = [t for t in tensors(inputs) if t.dim() > self._batch_dim]
        sizes = [t.shape[self._batch_dim] for t in given]
        batch = next((size for size in sizes if size != 1), 1)  # what has one row may be for all
        if given and self.run is None:
            self.batch = batch
        for t, size in zip(given, sizes, strict=True):
            if size == self.batch:
                self._places.put(t, Layout(self._batch_dim, 1, size, 1))

    def leave_model(self, output: object) -> None:
        """Keep what the model returned, until a backward pass went through it."""
        self._inside -= 1
        if self.run is None and self._inside == 0:
            returned = [t for t in tensors(output) if t.requires_grad and t.dim() > 0]
            if returned:
                self.outputs.append(returned)

    def drop_outputs(self, nodes: Collection[object]) -> None:
        """Forget what the model returned in a forward pass that a backward pass went through."""
        kept = [outputs for outputs in self.outputs if not any(t.grad_fn in nodes for t in outputs)]
        self.outputs = deque(kept, maxlen=_FORWARD_PASSES)

    def use_whole(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Account these for the parameters of their names, of which the model keeps parts."""
        self.whole.update(parameters)
        self.parameters.update({id(parameter): parameter for parameter in parameters.values()})
        self._fixed.update(map(id, parameters.values()))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the model's parameters, those that its layers run with."""
        for name, parameter in self._model.named_parameters():
            yield name, self.whole.get(name, parameter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function: by a handler if a parameter is among its arguments."""
        if torch.compiler.is_compiling():
            raise RuntimeError("GradientAccountant: a model must be compiled before the with, or not at all")
        kwargs = kwargs or {}
        if func in _BACKWARD:
            with self:
                return _BACKWARD[func](*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _QUESTIONS and not isinstance(result := func(*args, **kwargs), Tensor):
            return result
        given: list[Tensor] = []
        _collect(args, given)
        if kwargs:
            _collect(kwargs, given)
        weights = [t for t in given if t.requires_grad and (self._parameter(t) is not None or self.source(t))]
        result = NotImplemented
        if weights:
            handler = self._handlers.get(func) or self._handlers.get(name)
            if handler is not None:
                result = handler(self, func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            if weights and self.run is not None:
                self._refuse_hidden(weights, result)
        self._place(func, name, args, kwargs, given, result)
        return result

    def weight(self, t: object) -> Weight | None:
        """Return which parameter, or view of one whose elements are all different, a tensor is, or None."""
        parameter = self._parameter(t)
        if parameter is None or not isinstance(t, Tensor):
            return None
        if t is not parameter and (_overlaps(t) or not parameter.is_contiguous() or t.dtype != parameter.dtype):
            return None
        return Weight(parameter, t)

    def weights(self, *values: Tensor | None) -> list[Weight | None] | None:
        """Return which parameter, or view of one, each is; None if one is computed from parameters in another way."""
        weights = [self.weight(t) for t in values]
        derived = any(w is None and t is not None and t.requires_grad for t, w in zip(values, weights, strict=True))
        return None if derived else weights

    def source(self, t: Tensor) -> Repeated | None:
        """Return which parameter a tensor repeats, or looks up the same rows of for all examples, or None."""
        place = self._places.get(t)
        return place if isinstance(place, Repeated) else None

    def remember(self, t: Tensor, place: Layout | Repeated) -> None:
        """Say where the examples are in a tensor, or what it repeats for all of them."""
        self._places.put(t, place)

    def layout(self, t: Tensor) -> Layout | None:
        """Return where the examples are in a tensor, or None if that cannot be told or it is the same for all."""
        place = self._places.get(t)
        if place is not UNKNOWN:
            return place if isinstance(place, Layout) else None
        if self.shared(t) or t.dim() <= self._batch_dim:
            return None
        size = t.shape[self._batch_dim]  # given by hand, or by a function that is not PyTorch's
        return Layout(self._batch_dim, 1, size, 1) if self.batch in (None, size) or not self._inside else None

    def output_layout(self, t: Tensor) -> Layout | None:
        """Return where the examples are in what the model returned: if that cannot be told, where they were."""
        layout = self.layout(t)
        if layout is None and t.dim() > self._batch_dim and t.shape[self._batch_dim] == self.batch:
            layout = Layout(self._batch_dim, 1, t.shape[self._batch_dim], 1)
        return layout

    def shared(self, t: Tensor) -> bool:
        """Return whether a tensor is the same for all examples."""
        place = self._places.get(t)
        if place is not UNKNOWN:
            return place is _SHARED or isinstance(place, Repeated)
        if id(t) in self._fixed or (t.dim() == 0 and not t.requires_grad) or (self._inside > 0 and t.is_leaf):
            return True
        return self._parameter(t) is not None

    def count(self, layout: Layout, *weights: Weight | None) -> None:
        """Take note that the forward pass uses these parameters; what a backward pass recomputes does not count."""
        if self.run is None:
            if not self._inside and not self.calls:
                self.batch = layout.batch
            self.calls.update(id(weight.parameter) for weight in weights if weight is not None)

    def _parameter(self, t: object) -> nn.Parameter | None:
        """Return the parameter that a tensor is or is a view of, or None."""
        if not isinstance(t, Tensor) or not t.requires_grad:
            return None
        return self.parameters.get(id(t if t.is_leaf or not t._is_view() else t._base))

    def _place(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], result: Any) -> None:
        """Find out where the examples are in what a function returned."""
        results = [result] if isinstance(result, Tensor) else tensors(result)
        results = [t for t in results if self._places.get(t) is UNKNOWN]
        given = given[:1] if name in _SHAPED_LIKE else given
        own = [t for t in given if not self.shared(t)]
        if not own:
            if given or not name.startswith(_DATA):
                for t in results:
                    self._places.put(t, _SHARED)
            return
        source = own[0] if len(own) == 1 else max(own, key=lambda t: t.dim())
        layout = self.layout(source)
        if name == "__setitem__" and self.shared(args[0]):
            results, layout = [args[0]], None
        if len(own) > 1 and layout is not None and name in ELEMENTWISE:
            self._check_aligned(name, source, layout, own)
        places: list[Layout | None] = [None] * len(results)
        if layout is not None and results:
            if name in MOVES:
                places = moved(layout, func, source, results, args, kwargs)
            else:
                places = [after(layout, func, source, t, args, kwargs) for t in results]
        for t, place in zip(results, places, strict=True):
            self._places.put(t, place)

    def _check_aligned(self, name: str, source: Tensor, layout: Layout, own: list[Tensor]) -> None:
        """Refuse that one example's activations meet another's: an input was mistaken for one with examples."""
        for t in own:
            other = self.layout(t)
            if other is not None and t.requires_grad and other.dim - t.dim() != layout.dim - source.dim():
                raise ValueError(
                    f"GradientAccountant: the examples must be in one place in what {name} is given, got dimension "
                    f"{layout.dim} of {list(source.shape)} and {other.dim} of {list(t.shape)}; inputs that are the "
                    "same for all examples need another size there, as [1, *]"
                )

    def _refuse_hidden(self, weights: list[Tensor], result: Any) -> None:
        """Refuse a parameter that is not covered and was hidden until now, by reentrant checkpointing."""
        computed = [t for t in tensors(result) if t.requires_grad and not self.shared(t)]
        known = {} if self.run is None else self.run.slow
        for weight in map(self.weight, weights):
            if computed and weight is not None and id(weight.parameter) not in known:
                raise ValueError(
                    f"GradientAccountant: the layer of a parameter of shape {list(weight.parameter.shape)} is not "
                    "covered, and reentrant checkpointing hides it: give checkpoint use_reentrant=False"
                )


def tensors(value: object) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, mappings and dataclasses."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: object, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif type(value) in _PLAIN:
        return
    elif isinstance(value, tuple | list):
        for item in value:
            _collect(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in vars(value).values():
            _collect(item, found)


def _overlaps(t: Tensor) -> bool:
    """Return whether two elements of a tensor may be the same in memory."""
    span = 1
    for step, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if step < span:
                return True
            span += step * (size - 1)
    return False
