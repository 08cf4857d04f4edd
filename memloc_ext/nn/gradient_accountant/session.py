"""Sees every PyTorch function that is called while an accountant is open, and lets a rule run those with parameters."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from memloc_ext.nn.gradient_accountant.in_parts import in_parts
from memloc_ext.nn.gradient_accountant.run import Run, Weight

Handler = Callable[..., Any]
# what gradient checkpointing recomputes inside of these is to be seen
_BACKWARD = {
    function: in_parts(function) for function in (torch.autograd.backward, torch.autograd.grad, Tensor.backward)
}
# what these return may be of the examples, though no tensor is given to them
_DATA = ("rand", "normal", "bernoulli", "empty", "multinomial", "poisson", "tensor", "as", "from")


class Session(TorchFunctionMode):
    """What one ``with`` of an accountant knows.

    Tensors are of three kinds. Parameters and their views; what is computed from parameters, buffers and numbers alone
    (`constants`, if it needs no gradient); and everything else, which is taken to have a dimension of examples.

    Args:
        model: Its parameters that require gradients are accounted.
        batch_dim: Dimension of the examples in activations.
        handlers: Function, or name of one, to its handler: ``handler(session, function, args, kwargs)`` runs it or
            returns NotImplemented to have it run as if nobody looked.
    """

    def __init__(self, model: nn.Module, batch_dim: int, handlers: Mapping[Any, Handler]) -> None:
        super().__init__()
        self.parameters = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
        self.batch_dim = batch_dim
        self.batch: int | None = None
        self.calls: Counter[int] = Counter()
        self.run: Run | None = None
        self.outputs: list[Tensor] = []
        self.lookups = WeakTensorKeyDictionary()
        self._constants = WeakTensorKeyDictionary()
        self._fixed = {id(t) for t in (*model.buffers(), *(p for p in model.parameters() if not p.requires_grad))}
        self._handlers = handlers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function: by a handler if a parameter is among its arguments."""
        if torch.compiler.is_compiling():
            raise RuntimeError("GradientAccountant: a model must be compiled before the with, or not at all")
        kwargs = kwargs or {}
        if func in _BACKWARD:
            with self:
                return _BACKWARD[func](*args, **kwargs)
        known, weights = True, False
        for t in tensors((args, kwargs)):
            weight = self.weight(t) is not None or t in self.lookups
            weights |= weight
            known &= weight or self.constant(t)
        if weights:
            handler = self._handlers.get(func) or self._handlers.get(getattr(func, "__name__", None))
            if handler is not None:
                result = handler(self, func, args, kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        if known and not getattr(func, "__name__", "").startswith(_DATA):
            for t in tensors(result):
                if not t.requires_grad:
                    self._constants[t] = True
        return result

    def forget(self) -> None:
        """End a backward pass: what the forward pass before it did is no longer of interest."""
        self.run, self.batch = None, None
        self.calls.clear()
        self.outputs.clear()

    def weight(self, t: object) -> Weight | None:
        """Return which parameter, or view of one, a tensor is, or None."""
        if not isinstance(t, Tensor) or not t.requires_grad:
            return None
        parameter = self.parameters.get(id(t))
        if parameter is None and not t.is_leaf and t._is_view():
            parameter = self.parameters.get(id(t._base))
            repeated = any(step == 0 and size > 1 for step, size in zip(t.stride(), t.shape, strict=True))
            if parameter is not None and (repeated or not parameter.is_contiguous() or t.dtype != parameter.dtype):
                return None
        return None if parameter is None else Weight(parameter, t)

    def constant(self, t: Tensor) -> bool:
        """Return whether a tensor was computed from numbers and buffers alone."""
        return id(t) in self._fixed or t in self._constants or (t.dim() == 0 and not t.requires_grad)

    def count(self, *weights: Weight | None) -> None:
        """Take note that the forward pass uses these parameters; what a backward pass recomputes does not count."""
        if self.run is None:
            self.calls.update(id(weight.parameter) for weight in weights if weight is not None)

    def see(self, input: Tensor) -> None:
        """Take the number of examples from the first input of a layer."""
        if self.batch is None and input.dim() > self.batch_dim:
            self.batch = input.shape[self.batch_dim]

    @contextlib.contextmanager
    def examples_at(self, dim: int) -> Iterator[None]:
        """Have the examples in another dimension of activations for a while."""
        outer, self.batch_dim = self.batch_dim, dim
        try:
            yield
        finally:
            self.batch_dim = outer


def tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def examples_first(t: Tensor, batch: int, batch_dim: int, flat_dims: int, what: str) -> Tensor:
    """Return a view of activations as ``[batch, *]``.

    Args:
        t: Examples in dimension ``batch_dim``; or these dimensions flattened, as ``[batch * tokens, *]`` is (with
            ``batch_dim`` 1: ``[tokens * batch, *]``).
        batch: Number of examples.
        batch_dim: 0 or more.
        flat_dims: How many dimensions belong to the layer: those are never the examples'.
        what: Names the layer's parameter in errors.

    Raises:
        ValueError: If there is no such dimension, or more than one could be it.
    """
    leading = t.dim() - flat_dims
    if leading > batch_dim and t.shape[batch_dim] == batch:
        return t.movedim(batch_dim, 0)
    if leading >= 1 and batch > 0 and t.shape[0] % batch == 0 and batch not in t.shape[1:leading]:
        if batch_dim == 0:
            return t.unflatten(0, (batch, -1))
        if batch_dim == 1 and leading == 1:
            return t.unflatten(0, (-1, batch)).transpose(0, 1)
    raise ValueError(
        f"GradientAccountant: the {batch} examples must be in dimension {batch_dim} of what {what} is given, "
        f"got {list(t.shape)}; batch_dim and batch_size say otherwise"
    )
