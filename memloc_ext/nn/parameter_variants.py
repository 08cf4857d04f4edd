"""Run a model under many variants of some of its parameters and buffers; what they have in common is computed once.

The pass of a batch is recorded as a list of ATen calls, whose inputs are the examples and every tensor of the model. A
variant runs again just the calls that depend on what it replaces, with the same operators on the same shapes as a plain
pass has, so that it gives the same logits bit for bit, whatever the model does.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.nn.ablation.recorder import (
    Readers,
    Recorder,
    as_list,
    evaluating,
    storage_address,
    without_fast_path,
)
from memloc_ext.nn.ablation.recording import Call, Recording, Ref, UnsupportedError
from memloc_ext.nn.example_ids import current_example_ids, example_ids
from memloc_ext.nn.gradient_accountant.compiled import uncompiled

aten = torch.ops.aten


class ParameterVariants:
    """Runs a model in evaluation mode with some of its tensors replaced; the model itself is left as it was.

    A batch size is recorded when it first comes. Beside what a plain pass holds at a time, the values are held that the
    replaced part reads of the rest, until all variants of a batch have run. A model that cannot be recorded, because it
    reads activations into Python or draws random numbers, takes a whole pass per variant, with a warning.

    Args:
        model: Any model; if compiled, what was compiled runs as it was written.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._programs: dict[Any, _Program] = {}
        self._recordable = True

    def outputs(self, x: Tensor, variants: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Return what the model returns for a batch in each variant.

        Args:
            x: ``[batch, *]``, on the model's device.
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

    def _replay(self, x: Tensor, tensors: dict[str, Tensor], variants: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        ids = current_example_ids()
        given = [x] if ids is None else [x, ids]
        key = tuple((t.shape, t.dtype, t.stride()) for t in given)
        if key not in self._programs:
            self._programs[key] = _Program(*_record(self._model, given, tensors))
        return self._programs[key].run(given, tensors, variants)

    def _whole(self, x: Tensor, variant: Mapping[str, Tensor]) -> Tensor:
        with evaluating(self._model), replaced_tensors(self._model, variant):
            return self._model(x)


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


@dataclass(frozen=True)
class _Step:
    """A call, and the values that nobody reads after it."""

    call: Call
    dead: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """What is run once per batch, and what once per variant."""

    shared: list[_Step]
    variant: list[_Step]


class _Program:
    """The recorded pass of a batch.

    Args:
        recording: Its inputs are the batch, the ids of its examples if there are any, and the model's tensors.
        names: The model's tensors, in the order of the inputs.
    """

    def __init__(self, recording: Recording, names: Sequence[str]) -> None:
        self._calls, self._output = recording.calls, recording.output
        self._inputs = recording.inputs
        self._value = dict(zip(names, recording.inputs[-len(names) :], strict=True)) if names else {}
        self._plans: dict[frozenset[str], _Plan] = {}

    def run(
        self, given: Sequence[Tensor], tensors: Mapping[str, Tensor], variants: Sequence[Mapping[str, Tensor]]
    ) -> list[Tensor]:
        """Return the output of each variant."""
        names = frozenset(name for variant in variants for name in variant)
        if names not in self._plans:
            self._plans[names] = self._plan({self._value[name] for name in names})
        plan = self._plans[names]
        shared = dict(zip(self._inputs, [*given, *(t.detach() for t in tensors.values())], strict=True))
        _run(plan.shared, shared, shared)
        outputs = []
        for variant in variants:
            values = {self._value[name]: t for name, t in variant.items()}
            _run(plan.variant, values, shared)
            outputs.append(values.get(self._output, shared.get(self._output)))
        return outputs

    def _plan(self, changed: set[int]) -> _Plan:
        depends, calls = set(changed), []
        for call in self._calls:
            if depends.intersection(call.refs):
                depends.update(call.outputs)
                calls.append(call)
        calls = _leading_to({self._output}, calls)
        needed = {ref for call in calls for ref in call.refs} | {self._output}
        needed -= depends
        inputs = set(self._inputs)
        return _Plan(
            _steps(_leading_to(needed, self._calls), needed | inputs), _steps(calls, {self._output} | inputs - changed)
        )


def _leading_to(values: Iterable[int], calls: Sequence[Call]) -> list[Call]:
    """Return the calls that some values are computed from, in their order."""
    live, found = set(values), []
    for call in reversed(calls):
        if live.intersection(call.outputs):
            live.update(call.refs)
            found.append(call)
    return found[::-1]


def _steps(calls: Sequence[Call], keep: set[int]) -> list[_Step]:
    last = {value: i for i, call in enumerate(calls) for value in (*call.refs, *call.outputs)}
    dead: list[list[int]] = [[] for _ in calls]
    for value, i in last.items():
        if value not in keep:
            dead[i].append(value)
    return [_Step(call, tuple(values)) for call, values in zip(calls, dead, strict=True)]


def _run(steps: Sequence[_Step], values: dict[int, Tensor], shared: Mapping[int, Tensor]) -> None:
    """Run calls on ``values``, or on what is ``shared`` where these have none, and add their results to them."""
    for step in steps:
        read = [
            (values[leaf.index] if leaf.index in values else shared[leaf.index]) if isinstance(leaf, Ref) else leaf
            for leaf in step.call.leaves
        ]
        results = as_list(step.call.run(read))
        values.update({value: t for value, t in zip(step.call.outputs, results, strict=True) if value >= 0})
        for value in step.dead:
            values.pop(value, None)


class _BatchRecorder(Recorder):
    """Records a whole batch and keeps none of its activations alive."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._constants: set[int] = set()  # addresses of what calls read that depends on nothing

    def put(self, t: Tensor, sample: Tensor | None = None) -> int:
        """Return a new value for a tensor."""
        index = super().put(t)
        self.recording.sample.clear()
        return index

    def _keep_samples(self, target: Tensor) -> None:
        """Keep none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], Tensor) and storage_address(args[0]) in self._constants:
            raise UnsupportedError(f"{func} writes into a tensor that was read before")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _keep(self, t: Tensor) -> None:
        number, address = id(t), storage_address(t)
        if number not in self._alive:
            self._alive[number] = weakref.ref(t, lambda _: self._forget(number, address))
            self._storages.setdefault(address, []).append(number)

    def _forget(self, number: int, address: int) -> None:
        del self._alive[number]
        self._values.pop(number, None)
        self._stale.discard(number)
        self._storages[address].remove(number)
        if not self._storages[address]:
            del self._storages[address]
            self._dependent.discard(address)

    def _call(self, function: Any, refs: tuple[Any, Any], result: Any, sample: Tensor | None = None) -> None:
        outputs = [self.put(t) if isinstance(t, Tensor) else -1 for t in as_list(result)]
        self.recording.calls.append(Call(function, tuple(refs[0]), dict(refs[1]), outputs, self.modules[-1]))

    def _ref(self, t: Tensor) -> Ref | Tensor:
        ref = super()._ref(t)
        if isinstance(ref, Tensor) and ref.numel():
            self._constants.add(storage_address(ref))
        return ref


class _DataReaders(Readers):
    """Refuses ``.data`` as well: what nobody knows of would look like a constant once its source is gone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__get__ and self._recorder.value(args[0]) is not None:  # pyright: ignore[reportAttributeAccessIssue]
            raise UnsupportedError("the model reads the data of an activation or parameter")
        return super().__torch_function__(func, types, args, kwargs)


def _record(
    model: nn.Module, given: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> tuple[Recording, Sequence[str]]:
    """Record the pass of a batch in evaluation mode.

    Raises:
        UnsupportedError: If the model reads a value of an activation or parameter into Python, draws random numbers, or
            writes into a view that it reads in another way later.
    """
    device = given[0].device
    given = [t.detach().clone() for t in given]
    with evaluating(model), uncompiled(), contextlib.ExitStack() as stack:
        recorder = _BatchRecorder()
        if len(given) > 1:
            stack.enter_context(example_ids(given[1]))
        stack.enter_context(without_fast_path())
        recorder.recording.inputs = [recorder.put(t) for t in (*given, *tensors.values())]
        drawn = _generators(device)
        with _DataReaders(recorder), recorder:
            output = model(given[0])
            if recorder.value(output) is not None:
                output = aten.alias.default(output)  # which notices if it was written through a view
        value = recorder.value(output)
        if value is None:
            raise UnsupportedError("the model must return one tensor that depends on its input")
        if any(not torch.equal(now, before) for now, before in zip(_generators(device), drawn, strict=True)):
            raise UnsupportedError("the model draws random numbers in evaluation mode")
        recorder.recording.output = value
    return recorder.recording, list(tensors)


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _fitting(tensors: Mapping[str, Tensor], variant: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, value in variant.items():
        if name not in tensors:
            raise ValueError(f"ParameterVariants: variants must name tensors of the model, got {name}")
        if value.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)}, got {list(value.shape)}"
            raise ValueError(f"ParameterVariants: {name} must have shape {shapes}")
    return {name: value.detach().to(tensors[name]) for name, value in variant.items()}


@contextlib.contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Have autocast cast each weight anew: a cast that it remembers would hide the weight."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
