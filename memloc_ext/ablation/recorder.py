"""Records what a model does to one example."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from memloc_ext.ablation.channels import Channels
from memloc_ext.ablation.recording import Call, Recording, Ref, UnsupportedError, leaves, replaced
from memloc_ext.ablation.running import evaluating, without_fast_path
from memloc_ext.borrowing import uncompiled
from memloc_ext.nn.example_ids import current_example_ids, example_ids
from memloc_ext.tasks import logits_of

aten = torch.ops.aten


def record(model: nn.Module, x: Tensor, strict: bool = True) -> Recording:
    """Record the forward pass of the first example of ``x`` in evaluation mode; the model stays as it was.

    Args:
        model: In any mode.
        x: ``[batch, *]``.
        strict: Whether the recording must be one that can be run again; one that cannot still tells what is where.

    Raises:
        UnsupportedError: If it must, and the model reads a value of an activation into Python, or writes into a view
            that it reads in another way later.
        ValueError: If the model returns no logits; see `logits_of`.
    """
    ids = current_example_ids()
    with evaluating(model), torch.no_grad(), uncompiled(), contextlib.ExitStack() as stack:
        recorder = Recorder(strict)
        given = [x[:1].detach().clone()]
        if ids is not None:
            given.append(ids[:1].clone())
            stack.enter_context(example_ids(given[1]))
        stack.enter_context(without_fast_path())
        for hook in _hooks(model, recorder):
            stack.callback(hook.remove)
        for t in given:
            recorder.recording.inputs.append(recorder.put(t))
        with Readers(recorder), recorder:
            logits = logits_of(model(given[0]))
    recorder.recording.output = recorder.output(logits)
    _merge(recorder.recording, recorder.returned)
    return recorder.recording


class Recorder(TorchDispatchMode):
    """Records the calls that depend on the tensors it was given by `put`.

    Args:
        strict: Whether what cannot be run again raises UnsupportedError.
    """

    def __init__(self, strict: bool = True) -> None:
        super().__init__()
        self.strict = strict
        self.recording = Recording()
        self.channels = Channels()
        self.modules: list[str] = [""]
        self.returned: list[Call] = []  # those of `give_back`
        self._values: dict[int, int] = {}  # id of a tensor to its value
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._storages: dict[int, list[int]] = {}  # address to the tensors that share it, by id
        self._stale: set[int] = set()
        self._dependent: set[int] = set()  # addresses of the values

    def put(self, t: Tensor, sample: Tensor | None = None) -> int:
        """Return a new value for a tensor; ``sample`` is what it holds, if the model may change it later."""
        index = len(self.recording.shapes)
        self.recording.shapes.append(t.shape)
        self.recording.dtypes.append(t.dtype)
        self.recording.sample.append(t if sample is None else sample)
        self._keep(t)
        self._values[id(t)] = index
        self._dependent.add(storage_address(t))
        self._stale.discard(id(t))
        return index

    def value(self, t: object) -> int | None:
        """Return the value of a tensor, or None if it depends on no example."""
        return self._values.get(id(t)) if isinstance(t, Tensor) else None

    def output(self, logits: Tensor) -> int:
        """Return the value of the logits.

        Raises:
            UnsupportedError: If they depend on no example.
        """
        value = self.value(logits)
        if value is None:
            self.refuse("the model must return logits [batch, classes] that depend on its input")
        return self.put(logits) if value is None else value

    def refuse(self, reason: str) -> None:
        """Raise UnsupportedError if the recording is to be run again."""
        if self.strict:
            raise UnsupportedError(reason)

    def _keep(self, t: Tensor) -> None:
        self._kept.append(t)
        self._storages.setdefault(storage_address(t), []).append(id(t))

    def give_back(self, t: Tensor) -> Tensor:
        """Return a tensor as another value: a hook would replace what a module returns, but not what it keeps."""
        other = aten.alias.default(t)
        self.returned.append(self.recording.calls[-1])
        return other

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._record(func, args, kwargs or {})
        self.channels.follow(func, args, kwargs or {}, result)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._opname
        if any(id(t) in self._stale for t in tensors):
            self.refuse(f"{func} reads what was written through a view of it")
        for t in tensors:
            if (
                id(t) not in self._values
                and t.numel()
                and storage_address(t) in self._dependent
                and name not in _SHAPED_LIKE
            ):
                self.refuse(f"{func} reads an activation that no operator returned")
        if name in _SHAPED_LIKE or not any(id(t) in self._values for t in tensors):
            result = func(*args, **kwargs)
            for t in leaves([result]):
                if isinstance(t, Tensor) and id(t) not in self._values:
                    self._keep(t)  # a constant
            return result
        if name in _ASKING:
            self.refuse(f"{func} reads an activation into Python")
        if func._schema.is_mutable:
            return self._write(func, name, args, kwargs)
        refs = replaced((args, kwargs), self._ref)
        result = func(*args, **kwargs)
        self._call(func, refs, result)
        return result

    def _write(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Record a call that writes into its first argument as one that does not."""
        target = args[0]
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        packet = getattr(getattr(torch.ops, func.namespace), name.removesuffix("_"), None)
        functional = getattr(packet, func._overloadname, None)
        if not name.endswith("_") or functional is None or written != [func._schema.arguments[0].name]:
            self.refuse(f"{func} writes into its arguments")
            refs = replaced((args, kwargs), self._ref)
            result = func(*args, **kwargs)
            self._call(func, refs, result)
            return result
        old = target.clone() if self.value(target) is None else target
        refs = replaced(((old, *args[1:]), kwargs), self._ref)
        promoted = functional(*args, **kwargs)
        self._keep_samples(target)
        result = func(*args, **kwargs)
        self._stale.update(other for other in self._storages.get(storage_address(target), []) if other != id(target))
        sample = promoted
        if promoted.dtype != target.dtype:  # what is written keeps its type
            self._call(functional, refs, promoted)
            functional, refs = aten._to_copy.default, ((self._ref(promoted),), {"dtype": target.dtype})
            sample = promoted.to(target.dtype)
        self._call(functional, refs, target, sample)
        return result

    def _keep_samples(self, target: Tensor) -> None:
        """Copy the samples that a call is about to write into."""
        sample = self.recording.sample
        for other in self._storages.get(storage_address(target), []):
            index = self._values.get(other)
            if index is not None and storage_address(sample[index]) == storage_address(target):
                sample[index] = sample[index].clone()

    def _call(self, function: Any, refs: tuple[Any, Any], result: Any, sample: Tensor | None = None) -> None:
        outputs = [self.put(t, sample) if isinstance(t, Tensor) else -1 for t in as_list(result)]
        kwargs = {key: value for key, value in refs[1].items() if key != "memory_format"}  # rows have one of their own
        self.recording.calls.append(Call(function, tuple(refs[0]), kwargs, outputs, self.modules[-1]))

    def _ref(self, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        index = self._values.get(id(t))
        return t.detach() if index is None else Ref(index)


_SHAPED_LIKE = frozenset(
    (
        *(f"new_{kind}" for kind in ("zeros", "ones", "full", "empty")),
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
    )
)  # of their argument only the shape and type count
_ASKING = frozenset(
    ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2")
)


class Readers(TorchFunctionMode):
    """Refuses what reads an activation without calling an operator."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING and self._recorder.value(args[0]) is not None:
            self._recorder.refuse(f"{func.__name__} reads an activation into Python")
        return func(*args, **(kwargs or {}))


_READING = frozenset((Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr))


def _merge(recording: Recording, aliases: Sequence[Call]) -> None:
    """Make one value again of those that nobody else reads and their aliases."""
    readers, same = recording.readers(), dict[int, int]()
    for call in aliases:
        (source,) = call.refs
        if len(readers[source]) == 1 and source != recording.output:
            same[call.outputs[0]] = same.get(source, source)

    def merged(leaf: Any) -> Any:
        return Ref(same[leaf.index]) if isinstance(leaf, Ref) and leaf.index in same else leaf

    recording.calls = [
        replace(call, args=replaced(call.args, merged), kwargs=replaced(call.kwargs, merged))
        for call in recording.calls
        if call.outputs[0] not in same
    ]
    recording.output = same.get(recording.output, recording.output)
    for name, values in recording.returned.items():
        recording.returned[name] = [None if value is None else same.get(value, value) for value in values]


def _hooks(model: nn.Module, recorder: Recorder) -> Iterator[Any]:
    """Have the recorder told which module runs and what it returns, each time as a value of its own."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; what it computes is recorded all the same
            continue

        def before(module: nn.Module, args: Any, name: str = name) -> None:
            recorder.modules.append(name)
            if isinstance(module, nn.RNNBase):
                recorder.refuse(f"{name or 'the model'} is a recurrent layer ({type(module).__name__})")

        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> Any:
            recorder.modules.pop()
            output = output if recorder.value(output) is None else recorder.give_back(output)
            value = recorder.value(output)
            recorder.recording.returned.setdefault(name, []).append(value)
            if value is not None:
                recorder.recording.dims.setdefault(name, recorder.channels.dim(output))
            return output

        yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after)


def storage_address(t: Tensor) -> int:
    """Return where the memory begins that a tensor is part of."""
    return t.untyped_storage().data_ptr()


def as_list(result: Any) -> Sequence[Any]:
    """Return what an operator returned as a list."""
    return list(result) if isinstance(result, tuple | list) else [result]
