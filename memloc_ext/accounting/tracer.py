"""Sees every PyTorch function that is called while an accountant is open; layer functions run those of layers."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from memloc_ext.accounting.backward_pass import BackwardPass
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.forward_pass import ForwardPass
from memloc_ext.accounting.layers.derived import derive
from memloc_ext.accounting.losses import MEANS, remember_mean
from memloc_ext.accounting.members import Members
from memloc_ext.accounting.places import Places, TensorMemory
from memloc_ext.accounting.uses import ParameterView
from memloc_ext.batches import collect, tensors_of
from memloc_ext.borrowing import in_parts

Handler = Callable[..., Any]
# what gradient checkpointing recomputes inside of these is to be seen
_BACKWARD = {
    function: in_parts(function) for function in (torch.autograd.backward, torch.autograd.grad, Tensor.backward)
}
# called all the time, mostly for numbers
_QUESTIONS = frozenset(
    (
        *("__get__", "__set__", "dim", "size", "numel", "__len__", "stride", "is_floating_point", "is_contiguous"),
        "_set_grad_enabled",
    )
)
_FORWARD_PASSES = 16  # whose outputs are kept for a backward pass


class Tracer(Places, TorchFunctionMode):
    """What one ``with`` of an accountant knows.

    Args:
        model: Its parameters that require gradients are accounted.
        batch_dim: Dimension of the examples in the model's inputs.
        handlers: Function, or name of one, to its handler: ``handler(tracer, function, *args, **kwargs)`` runs it or
            returns NotImplemented to leave it to PyTorch.
        complex_handlers: Likewise, of functions of complex tensors.
        input_of_examples: Which of the model's inputs tells the number of examples, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_dim: int,
        handlers: Mapping[Any, Handler],
        complex_handlers: Mapping[Any, Handler],
        input_of_examples: int | None = None,
    ) -> None:
        super().__init__(model, batch_dim)
        self.gathered: dict[str, nn.Parameter] = {}  # by name, in place of sharded ones
        self.batch: int | None = None  # of the last forward pass
        self.calls: Counter[int] = Counter()
        self.backward: BackwardPass | None = None
        self.passes: deque[ForwardPass] = deque(maxlen=_FORWARD_PASSES)
        self.coarse = False  # whether layers ran under autocast
        self.accounted = False  # whether a backward pass was accounted
        self.unaccounted = False  # whether a plain one, by loss.backward(), went through a layer
        self.plain_backward = False  # whether one is under way, or was the last
        self.replaying = False  # whether the model runs again on other inputs, which is not to be seen
        self._lookouts = set[int]()  # threads that see functions for as long as the model runs again
        self._below: int | None = None  # modes below this one, while it stands aside
        self._input_of_examples = input_of_examples
        self._model = model
        self._handlers, self._complex_handlers = handlers, complex_handlers
        self.derived = TensorMemory()  # what stands in the place of a tensor

    def enter_model(self, args: Any, kwargs: Any, shared: Sequence[Tensor]) -> ForwardPass | None:
        """Take the number of examples from the model's inputs, and these for what belongs to examples.

        Returns the call if a backward pass may go through it.

        Args:
            args: What the model is called with.
            kwargs: What it is called with by name.
            shared: Inputs that are the same for all examples.
        """
        self.depth += not self.replaying
        if self.replaying or self.depth > 1 or not torch.is_grad_enabled():
            return None
        entered = ForwardPass(self._model, args, kwargs, self.batch_dim, set(map(id, shared)))
        if entered.inputs and self.backward is None:
            sizes, known = entered.sizes, self._input_of_examples
            several = next((size for size in sizes if size != 1), 1)  # what has one row may be for all
            self.batch = several if known is None or known >= len(sizes) else sizes[known]
        entered.rows = self.batch
        self.remember_inputs(entered.inputs, self.batch, shared)
        if self.backward is not None:
            return None
        self.passes.append(entered)
        return entered

    def recount(self, batch: int) -> None:
        """Take another number of examples than that of the rows of an input."""
        if self.backward is None:
            self.batch = batch
            if self.passes:
                self.passes[-1].rows = batch

    def leave_model(self, output: object) -> None:
        """Keep what the model returned, until a backward pass went through it."""
        entered = self.depth > 0
        self.depth -= entered and not self.replaying
        if self.backward is not None or self.depth or self.replaying or not entered or not torch.is_grad_enabled():
            return
        left = self.passes[-1]
        left.returned(output)
        if not left.outputs and not left.numbers:
            self.passes.pop()
        rows = {t.shape[self.batch_dim] for t in left.outputs if t.dim() > self.batch_dim}
        if rows and self.batch not in rows and len(known := rows & set(left.sizes)) == 1:
            self.batch = known.pop()  # of an input that is not the first

    def drop_outputs(self, nodes: Collection[object]) -> None:
        """Forget what the model returned in a forward pass that a backward pass went through."""
        kept = [p for p in self.passes if not any(t.grad_fn in nodes for t in (*p.outputs, *p.numbers))]
        self.passes = deque(kept, maxlen=_FORWARD_PASSES)

    def stand_aside(self) -> bool:
        """See no functions until `stand_in`; return whether that can be."""
        stack = _get_current_function_mode_stack()
        if stack.count(self) != 1:
            return False
        self._below = stack.index(self)
        held = [_pop_mode() for _ in stack[self._below :]]
        for mode in reversed(held[:-1]):
            _push_mode(mode)
        return True

    def stand_in(self) -> None:
        """See functions again, in the place among other modes that this one had."""
        if self._below is None:
            return
        held = [_pop_mode() for _ in _get_current_function_mode_stack()[self._below :]]
        self._below = None
        for mode in (self, *reversed(held)):
            _push_mode(mode)

    def recomputes(self, args: Any, kwargs: Any) -> bool:
        """Return whether a backward pass in another thread runs the model again, as it ran in this one's `with`.

        Autograd hands the modes of the thread that called it on to its own. Other threads are told by what the model
        is given.
        """
        if torch._C._current_graph_task_id() < 0:
            return False
        tracers = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Tracer)]
        if tracers:
            return self in tracers
        given = set(map(id, tensors_of((args, kwargs))))
        return any(id(t) in given for own in self.passes for t in own.inputs)

    def look(self) -> None:
        """See the functions of this thread until `look_away`, if it does not yet."""
        if self._below is None and self not in _get_current_function_mode_stack():
            self._lookouts.add(threading.get_ident())
            _push_mode(self)

    def look_away(self) -> None:
        """End what `look` began, if the model has returned."""
        thread = threading.get_ident()
        if thread in self._lookouts and self.depth == 0:
            self._lookouts.remove(thread)
            _pop_mode()

    @property
    def ran_untraced(self) -> bool:
        """Whether the model ran while this stood aside."""
        return any(own.pattern is not None for own in self.passes)

    @contextmanager
    def accounting(self, backward: BackwardPass) -> Iterator[None]:
        """Have the layers tell a backward pass of what they add."""
        self.backward = backward
        try:
            yield
        finally:
            self.backward = None

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Run the model without the accountant, with gradients."""
        self.replaying = True
        try:
            with torch._C.DisableTorchFunction(), torch.enable_grad():
                yield
        finally:
            self.replaying = False

    def use_gathered(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Use gathered parameters in place of sharded ones, by name."""
        self.gathered.update(parameters)
        self.add_parameters(parameters.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the model's parameters, those that its layers run with."""
        for name, parameter in Members.of(self._model).parameters.items():
            yield name, self.gathered.get(name, parameter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function: by a handler if a parameter is among its arguments."""
        if torch.compiler.is_compiling():
            raise RuntimeError("GradientAccountant: a model must be compiled before the with, or not at all")
        kwargs = kwargs or {}
        if func in _BACKWARD:
            self.plain_backward = func is not torch.autograd.grad and self.backward is None
            self.unaccounted |= self.plain_backward and self.ran_untraced
            with self:
                return _BACKWARD[func](*args, **kwargs)
        if maybe_current_level() is not None:  # by torch.func, which cannot transform rules
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _QUESTIONS and not isinstance(result := func(*args, **kwargs), Tensor):
            return result
        given: list[Tensor] = []
        collect(args, given)
        if kwargs:
            collect(kwargs, given)
        weights = [t for t in given if t.requires_grad and self.shared(t)]
        result = NotImplemented
        if weights or func is F.batch_norm:  # which may mix the examples
            handlers = self._complex_handlers if any(t.is_complex() for t in given) else self._handlers
            handler = handlers.get(func) or handlers.get(name)
            if handler is not None:
                result = handler(self, func, *args, **kwargs)
        handled = result is not NotImplemented
        if not handled:
            result = func(*args, **kwargs)
        if func in MEANS:
            remember_mean(self, func, args, kwargs, result)
        self.place_results(func, name, args, kwargs, given, result)
        if weights and not handled and self.backward is not None:
            self._refuse_hidden(weights, result)
        return result

    def weight(self, t: object) -> ParameterView | None:
        """Return which parameter, view of one whose elements are all different, or derived tensor this is, or None."""
        if not isinstance(t, Tensor) or not t.requires_grad:
            return None
        parameter = self.parameter_of(t)
        if parameter is not None and (t is parameter or _is_part(t, parameter)):
            return ParameterView(parameter, t)
        return derive(self, t)

    def weights(self, *values: Tensor | None) -> list[ParameterView | None] | None:
        """Return the weight that each is, or None if one that wants a gradient is none."""
        weights = [self.weight(t) for t in values]
        other = any(w is None and t is not None and t.requires_grad for t, w in zip(values, weights, strict=True))
        return None if other else weights

    def count(self, axis: ExampleAxis | None, *weights: ParameterView | None) -> None:
        """Take note that the forward pass uses these parameters; what a backward pass recomputes does not count."""
        if self.backward is None:
            if axis is not None and not self.depth and not self.calls:
                self.batch = axis.batch
            self.calls.update(id(weight.parameter) for weight in weights if weight is not None)

    def _refuse_hidden(self, weights: list[Tensor], result: Any) -> None:
        """Refuse a parameter that is not covered and was hidden until now, by reentrant checkpointing."""
        computed = [t for t in tensors_of(result) if t.requires_grad and not self.shared(t)]
        known = {} if self.backward is None else self.backward.slow
        for weight in map(self.weight, weights):
            if computed and weight is not None and not all(id(parameter) in known for parameter in weight.parameters):
                raise ValueError(
                    f"GradientAccountant: the layer of a parameter of shape {list(weight.parameter.shape)} is not "
                    "covered, and reentrant checkpointing hides it: give checkpoint use_reentrant=False"
                )


def _is_part(t: Tensor, parameter: Tensor) -> bool:
    """Return whether a view of a parameter is a part of it whose elements are all different."""
    if not parameter.is_contiguous() or t.dtype != parameter.dtype:
        return False
    span = 1
    for step, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if step < span:
                return False
            span += step * (size - 1)
    return True
