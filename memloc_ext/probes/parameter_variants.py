"""Run a model under many variants of some of its parameters and buffers; what they have in common is computed once.

The pass of a batch is recorded as a list of ATen calls, whose inputs are the examples and every tensor of the model. A
variant runs again just the calls that depend on what it replaces, with the same operators on the same shapes as a plain
pass has, so that it gives the same logits bit for bit, whatever the model does. Transformer layers run as they are
written, not by PyTorch's operator for a whole layer in inference, which rounds in another order.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext import batches
from memloc_ext.ablation.batch_recorder import record_batch
from memloc_ext.ablation.recorder import as_list
from memloc_ext.ablation.recording import Recording, Ref, Step, UnsupportedError, steps_to
from memloc_ext.borrowing import evaluating, without_fast_path
from memloc_ext.nn.example_ids import current_example_ids

_NOTHING = torch.empty(0)


class ParameterVariants:
    """Runs a model in evaluation mode with some of its tensors replaced; the model itself is left as it was.

    A batch size is recorded when it first comes; what else the model depends on, such as the modes of its dropouts or
    autocast, must then stay as it is, but its tensors may change. Beside what a plain pass holds at a time, the values
    are held that the replaced part reads of the rest, until all variants of a batch have run. A model that cannot be
    recorded, because it reads activations into Python or draws random numbers, takes a whole pass per variant, with a
    warning.

    Args:
        model: Any model; if compiled, what was compiled runs as it was written.
        read: Takes what is wanted of what the model returns; a tensor, or the model takes a whole pass per variant.
    """

    def __init__(self, model: nn.Module, read: Callable[[Any], Any] = lambda output: output) -> None:
        self._model, self._read = getattr(model, "_orig_mod", model), read
        self._programs: dict[Any, _Program] = {}
        self._recordable = True

    def outputs(self, x: Any, variants: Sequence[Mapping[str, Tensor]]) -> list[Any]:
        """Return what the model returns for a batch in each variant.

        Args:
            x: What the model is called with, see `memloc_ext.batches.call`, on its device.
            variants: Each maps names of parameters and buffers to what takes their place, of the same shape; it is
                brought to their type and device.

        Raises:
            ValueError: If a name is not the model's, or a shape differs.
        """
        tensors = _tensors(self._model)
        variants = [_fitting(tensors, variant) for variant in variants]
        with torch.no_grad(), _without_cached_casts():
            if self._recordable and variants:
                try:
                    return self._replay(x, tensors, variants)
                except UnsupportedError as error:
                    self._recordable = False
                    message = f"ParameterVariants: {error}; running the whole model once per variant instead"
                    warnings.warn(message, UserWarning, stacklevel=2)
            return [self._whole(x, variant) for variant in variants]

    def _replay(self, x: Any, tensors: dict[str, Tensor], variants: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        given, ids = list[Tensor](), current_example_ids()
        rest = batches.with_each_tensor(x, lambda t: given.append(t) or _NOTHING)
        key = (repr(rest), *((t.shape, t.dtype, t.stride()) for t in (*given, *([] if ids is None else [ids]))))
        if key not in self._programs:

            def forward(parts: Sequence[Tensor]) -> Any:
                new = iter(parts)
                return self._read(batches.call(self._model, batches.with_each_tensor(x, lambda _: next(new))))

            recording = record_batch(self._model, forward, given, ids, list(tensors.values()))
            self._programs[key] = _Program(recording, list(tensors))
        return self._programs[key].run([*given, *([] if ids is None else [ids])], tensors, variants)

    def _whole(self, x: Any, variant: Mapping[str, Tensor]) -> Any:
        with evaluating(self._model), without_fast_path(), replaced_tensors(self._model, variant):
            return self._read(batches.call(self._model, x))


@contextlib.contextmanager
def replaced_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters and buffers other values inside the ``with``, in place, and then their own back.

    Args:
        model: Any model.
        tensors: Name to a tensor of the same shape.
    """
    own = _tensors(model)
    kept = [(own[name], own[name].detach().clone()) for name in tensors]
    try:
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


class _Program:
    """The recorded pass of a batch.

    Args:
        recording: Its inputs are the batch, the ids of its examples if there are any, and the model's tensors.
        names: The model's tensors, in the order of the inputs.
    """

    def __init__(self, recording: Recording, names: Sequence[str]) -> None:
        self._calls, self._output = recording.calls, recording.outputs[0]
        self._inputs = recording.inputs
        self._value = dict(zip(names, recording.inputs[-len(names) :], strict=True)) if names else {}
        self._plans: dict[frozenset[str], tuple[list[Step], list[Step]]] = {}

    def run(
        self, given: Sequence[Tensor], tensors: Mapping[str, Tensor], variants: Sequence[Mapping[str, Tensor]]
    ) -> list[Tensor]:
        """Return the output of each variant."""
        names = frozenset(name for variant in variants for name in variant)
        if names not in self._plans:
            self._plans[names] = self._plan({self._value[name] for name in names})
        once, often = self._plans[names]
        shared = dict(zip(self._inputs, [*given, *(t.detach() for t in tensors.values())], strict=True))
        _run(once, shared, shared)
        outputs = []
        for variant in variants:
            values = {self._value[name]: t for name, t in variant.items()}
            _run(often, values, shared)
            outputs.append(values.get(self._output, shared.get(self._output)))
        return outputs

    def _plan(self, changed: set[int]) -> tuple[list[Step], list[Step]]:
        """Return what is run once per batch, and what once per variant."""
        depends, calls = set(changed), []
        for call in self._calls:
            if depends.intersection(call.refs):
                depends.update(call.outputs)
                calls.append(call)
        variant = steps_to([self._output], calls, self._inputs)
        needed = {self._output, *(ref for step in variant for ref in step.run.refs)} - depends
        return steps_to(needed, self._calls, self._inputs), variant


def _run(steps: Sequence[Step], values: dict[int, Tensor], shared: Mapping[int, Tensor]) -> None:
    """Run calls on ``values``, or on what is ``shared`` where these have none, and add their results to them."""
    for step in steps:
        read = [
            (values[leaf.index] if leaf.index in values else shared[leaf.index]) if isinstance(leaf, Ref) else leaf
            for leaf in step.run.leaves
        ]
        results = as_list(step.run.run(read))
        values.update({value: t for value, t in zip(step.run.outputs, results, strict=True) if value >= 0})
        for value in step.dead:
            values.pop(value, None)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _fitting(tensors: Mapping[str, Tensor], variant: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, value in variant.items():
        if name not in tensors:
            raise ValueError(f"ParameterVariants: variants must name tensors of the model, got {name}")
        if value.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)}, got {list(value.shape)}"
            raise ValueError(f"ParameterVariants: {name} must have shape {shapes}")
    return {name: _like(value.detach(), tensors[name]) for name, value in variant.items()}


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a value with the type, device and memory format of a tensor: a convolution's result takes that format."""
    value = value.to(tensor)
    return value if value.stride() == tensor.stride() else torch.empty_like(tensor).copy_(value)


@contextlib.contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Have autocast cast each weight anew: a cast that it remembers would hide the weight."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
