"""Records what a model does to a batch, with its parameters and buffers as inputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.ablation.recorder import Readers, Recorder, storage_address
from memloc_ext.ablation.recording import Recording, Ref, UnsupportedError
from memloc_ext.borrowing import evaluating, generator_states, uncompiled, without_fast_path

aten = torch.ops.aten


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


def record_batch(
    model: nn.Module,
    forward: Callable[[Sequence[Tensor]], Any],
    given: Sequence[Tensor],
    tensors: Sequence[Tensor],
) -> Recording:
    """Record the pass of a batch in evaluation mode; the model, which must not be compiled, stays as it was.

    Args:
        model: To record.
        forward: Calls it on tensors like ``given``, and returns one tensor of what it returns.
        given: The batch, each ``[batch, *]``, and the ids of its examples if they are named.
        tensors: Parameters and buffers; the inputs of the recording are ``given``, then these.

    Raises:
        UnsupportedError: If the model reads a value of an activation or parameter into Python, draws random numbers, or
            writes into a view that it reads in another way later.
    """
    device = given[0].device
    given = [t.detach().clone() for t in given]
    with evaluating(model), uncompiled(), without_fast_path():
        recorder = _BatchRecorder()
        recorder.recording.inputs = [recorder.put(t) for t in (*given, *tensors)]
        drawn = generator_states(device)
        with _DataReaders(recorder), recorder:
            output = forward(given)
            if recorder.value(output) is not None:
                output = aten.alias.default(output)  # which notices if it was written through a view
        value = recorder.value(output)
        if value is None:
            raise UnsupportedError("the model must return one tensor that depends on its input")
        if any(not torch.equal(now, before) for now, before in zip(generator_states(device), drawn, strict=True)):
            raise UnsupportedError("the model draws random numbers in evaluation mode")
        recorder.recording.outputs = [value]
    return recorder.recording
