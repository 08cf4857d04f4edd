"""Borrow a model: run it as it is written, or change its flags, and have everything put back as it was."""

from __future__ import annotations

import random
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def kept_training_flags(model: nn.Module) -> Iterator[None]:
    """Give every module of ``model`` its ``training`` flag back after the ``with``, also on an error."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Give ``model`` its training flags and buffers, and the generators their states, back after the ``with``."""
    held = [(module._buffers, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with kept_training_flags(model), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for names, name, buffer in held:  # another tensor may have been put in its place
            names[name] = buffer
        with torch.no_grad():
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)


@contextmanager
def kept_random_numbers() -> Iterator[None]:
    """Have Python and NumPy draw the same random numbers after the ``with`` as without it."""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    other = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(other)


def generator_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a model on a device can draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


class SharedContext:
    """A context that is entered with the first thread inside, and left with the last."""

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._inside, self._entered = 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Be inside."""
        with self._lock:
            if self._inside == 0:
                self._entered.enter_context(self._make())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._entered.close()


@contextmanager
def _force_eager() -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        except RuntimeError as error:
            raise RuntimeError("GradientAccountant: open it outside of what torch.compile compiles") from error
        yield


_eager = SharedContext(_force_eager)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Have compiled functions run uncompiled, in every thread, until no thread is inside any more.

    Raises:
        RuntimeError: If called from a compiled function.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with _eager():
        yield


def any_sharded(modules: Iterable[nn.Module]) -> bool:
    """Return whether one of some modules is sharded in one of the ways of `torch.distributed.fsdp`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any_of(modules, fsdp.FSDPModule, fsdp.FullyShardedDataParallel)


def any_of(values: Iterable[object], *classes: type) -> bool:
    """Return whether one of many objects, of few types, is of one of some classes."""
    return any(issubclass(kind, classes) for kind in set(map(type, values)))


def fully_sharded(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that `torch.distributed.fsdp.fully_shard` was called for, by name."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported, so not in use
    if fsdp is None:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, fsdp.FSDPModule)}


def flattened(model: nn.Module) -> bool:
    """Return whether a `torch.distributed.fsdp.FullyShardedDataParallel` is in a model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())


def any_parts(tensors: Iterable[Tensor]) -> bool:
    """Return whether one of some tensors stands for one of which each process has a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any_of(tensors, module.DTensor)


def is_part(t: Tensor) -> bool:
    """Return whether a tensor stands for one of which each process has a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if a process has not all of a model."""
    if flattened(model) or fully_sharded(model) or any(map(is_part, model.parameters())):
        raise ValueError(
            "model must be whole in every process, but it keeps parts of its parameters; load its full state dict into "
            "a model that was not sharded"
        )


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Have no hooks of these tensors called with gradients that are not the batch's."""
    hooks = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    for own, _ in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, kept in hooks:
            own.update(kept)


def in_parts(function: Any) -> Callable[..., Any]:
    """Return the same Python function, without its question whether it is handled as a whole."""
    names = {name: lambda *_: False for name in function.__code__.co_names if name.startswith("has_torch_function")}
    scope = {**vars(sys.modules[function.__module__]), **names}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and leave modes, buffers and the generators as they were.

    Raises:
        ValueError: If this process has only a part of it.
    """
    check_whole(model)
    with kept_state(model):
        model.eval()
        yield


@contextmanager
def _as_written() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


without_fast_path = SharedContext(_as_written)
"""Have transformer layers run as they are written, not as one operator, until no thread is inside any more."""
