"""Run a model under many variants of some of its parameters and buffers; what they have in common is computed once.

The pass of a batch is recorded as a list of ATen calls, whose inputs are the examples and every tensor of the model. A
variant runs again just the calls that depend on what it replaces, with the same operators on the same shapes as a plain
pass has, so that it gives the same logits bit for bit, whatever the model does. Transformer layers run as they are
written, not by PyTorch's operator for a whole layer in inference, which rounds in another order.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext import batches
from memloc_ext.ablation.recorder import Readers, Recorder, storage_address
from memloc_ext.ablation.recording import Call, Recording, Ref, Step, UnsupportedError, as_list, run_steps, steps_to
from memloc_ext.ablation.signature import Signature, given
from memloc_ext.borrowing import evaluating, generator_states, uncompiled, without_fast_path


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
        self._recordings: dict[Any, Recording] = {}
        self._plans: dict[Any, tuple[list[Step], list[Step]]] = {}
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
        tensors = named_tensors(self._model)
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
        inputs, signature = given(x)
        key = (signature.key, *((t.shape, t.dtype, t.stride()) for t in inputs))
        if key not in self._recordings:
            self._recordings[key] = _record(self._model, signature, self._read, inputs, tensors.values())
        recording = self._recordings[key]
        values = dict(zip(recording.inputs, [*inputs, *(t.detach() for t in tensors.values())], strict=True))
        value = dict(zip(tensors, recording.inputs[len(inputs) :], strict=True))
        changed = frozenset(value[name] for variant in variants for name in variant)
        if (key, changed) not in self._plans:
            self._plans[key, changed] = _plan(recording, changed)
        once, often = self._plans[key, changed]
        _run(once, values)
        outputs = []
        for variant in variants:
            own = ChainMap({value[name]: t for name, t in variant.items()}, values)
            _run(often, own)
            outputs.append(own[recording.outputs[0]])
        return outputs

    def _whole(self, x: Any, variant: Mapping[str, Tensor]) -> Any:
        with evaluating(self._model), without_fast_path(), replaced_tensors(self._model, variant):
            return self._read(batches.call(self._model, x))


@contextlib.contextmanager
def replaced_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters and buffers other values of their shape inside the ``with``, in place, then their own."""
    own = named_tensors(model)
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


def _record(
    model: nn.Module,
    signature: Signature,
    read: Callable[[Any], Any],
    inputs: Sequence[Tensor],
    tensors: Iterable[Tensor],
) -> Recording:
    """Record the pass of a batch in evaluation mode, of which ``read`` takes one tensor; the model stays as it was.

    The recording's inputs are those of the batch, each ``[batch, *]``, then the model's tensors.

    Raises:
        UnsupportedError: If the model reads a value of an activation or parameter into Python, draws random numbers, or
            writes into a view that it reads in another way later.
    """
    device, inputs = inputs[0].device, [t.detach().clone() for t in inputs]
    with evaluating(model), uncompiled(), without_fast_path():
        recorder = _BatchRecorder()
        recording = recorder.recording
        recording.inputs = [recorder.put(t) for t in (*inputs, *tensors)]
        drawn = generator_states(device)
        with _DataReaders(recorder), recorder:
            output = read(signature.call(model, inputs))
            if recorder.value(output) is None:
                raise UnsupportedError("the model must return one tensor that depends on its input")
            torch.ops.aten.alias.default(output)  # which notices if it was written through a view
        recording.outputs = recording.calls[-1].outputs
        if any(not torch.equal(now, before) for now, before in zip(generator_states(device), drawn, strict=True)):
            raise UnsupportedError("the model draws random numbers in evaluation mode")
    return recording


class _BatchRecorder(Recorder):
    """Records a whole batch and keeps none of its activations alive."""

    _unrecorded = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._constants: set[int] = set()  # addresses of what calls read that depends on nothing

    def _derive(self, *_: Any) -> None:
        """Note nothing: the tensors of the model are values."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func._schema.is_mutable and isinstance(args[0], Tensor) and storage_address(args[0]) in self._constants:
            raise UnsupportedError(f"{func} writes into a tensor that was read before")
        return super().run(func, args, kwargs)

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


def _plan(recording: Recording, changed: frozenset[int]) -> tuple[list[Step], list[Step]]:
    """Return what is run once per batch, and what once per variant, which changes some values."""
    often = steps_to(recording.outputs, [call for _, call in recording.after(changed)], recording.inputs)
    read = {*recording.outputs, *(ref for step in often for ref in step.run.refs)}
    needed = read - changed - {value for step in often for value in step.run.outputs}
    return steps_to(needed, recording.calls, recording.inputs), often


def _run(steps: Sequence[Step], values: MutableMapping[int, Tensor]) -> None:
    def results(call: Call) -> dict[int, Tensor]:
        read = [values[leaf.index] if isinstance(leaf, Ref) else leaf for leaf in call.leaves]
        found = zip(call.outputs, as_list(call.run(read)), strict=True)
        return {value: t for value, t in found if value >= 0}

    run_steps(steps, values, results)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
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
