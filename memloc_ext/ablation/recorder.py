"""Records what a model does to one example."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memloc_ext.ablation.channels import FollowingChannels
from memloc_ext.ablation.recording import Call, Recording, Ref, UnsupportedError, as_list, leaves, replaced
from memloc_ext.ablation.signature import Signature, opened
from memloc_ext.borrowing import evaluating, uncompiled, without_fast_path
from memloc_ext.tasks import Task

aten = torch.ops.aten


def record(
    model: nn.Module, given: Sequence[Tensor], signature: Signature, task: Task, strict: bool = True
) -> Recording:
    """Record the forward pass of the first example of a batch in evaluation mode; the model stays as it was.

    What the task reads of what the model returns are the outputs. A recording that is not ``strict`` may be one that
    cannot be run again, but still tells what is where.

    Raises:
        UnsupportedError: If it is strict, and the model reads a value of an activation into Python, or writes into a
            view that it reads in another way later.
        ValueError: If the model returns no logits; see `logits_of`.
    """
    with evaluating(model), uncompiled(), without_fast_path(), contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # in which linear layers are no matrix products
        stack.enter_context(torch.no_grad())
        recorder = Recorder(strict)
        given = [t[:1].detach().clone() for t in given]
        for hook in _hooks(model, recorder):
            stack.callback(hook.remove)
        recorder.recording.inputs = [recorder.put(t) for t in given]
        with Readers(recorder), recorder:
            output = signature.call(model, given)
    tensors, recorder.recording.build = opened(task, output)
    recorder.recording.outputs = [recorder.output(t) for t in tensors]
    _merge(recorder.recording, recorder.aliases)
    return recorder.recording


class Recorder(FollowingChannels):
    """Records the calls that depend on the tensors it was given by `put`; if strict, only what can be run again."""

    _unrecorded = frozenset(("memory_format",))  # keyword arguments; rows have a format of their own

    def __init__(self, strict: bool = True) -> None:
        super().__init__()
        self.strict = strict
        self.recording = Recording()
        self.modules: list[str] = [""]
        self.aliases: list[Call] = []  # those of `give_back`
        self._values: dict[int, int] = {}  # id of a tensor to its value
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._storages: dict[int, list[int]] = {}  # address to the tensors that share it, by id
        self._stale: set[int] = set()
        self._dependent: set[int] = set()  # addresses of the values
        self._made: set[int] = set()  # addresses of constants that are the same in every recording

    def put(self, t: Tensor) -> int:
        """Return a new value for a tensor."""
        index = len(self.recording.shapes)
        self.recording.shapes.append(t.shape)
        self.recording.dtypes.append(t.dtype)
        self._keep(t)
        self._values[id(t)] = index
        self._dependent.add(storage_address(t))
        self._stale.discard(id(t))
        return index

    def value(self, t: object) -> int | None:
        """Return the value of a tensor, or None if it depends on no example."""
        return self._values.get(id(t)) if isinstance(t, Tensor) else None

    def output(self, t: Tensor) -> int:
        """Return the value of a tensor that the model returns; if strict, it has a batch and depends on examples."""
        value = self.value(t)
        if value is None:
            self.refuse("the model must return tensors that depend on its input")
        if t.shape[:1] != (1,):
            self.refuse(f"the model must return tensors [batch, *], got {list(t.shape)} for one example")
        return self.put(t) if value is None else value

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
        self.aliases.append(self.recording.calls[-1])
        return other

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator and record it."""
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._opname
        if any(id(t) in self._stale for t in tensors):
            self.refuse(f"{func} reads what was written through a view of it")
        unknown = [t for t in tensors if id(t) not in self._values]
        if name not in _SHAPED_LIKE and any(t.numel() and storage_address(t) in self._dependent for t in unknown):
            self.refuse(f"{func} reads an activation that no operator returned")
        if name in _SHAPED_LIKE or len(unknown) == len(tensors):
            result = func(*args, **kwargs)
            for t in as_list(result):
                if isinstance(t, Tensor) and id(t) not in self._values:
                    self._keep(t)  # a constant
            self._derive(func, args, kwargs, [] if name in _SHAPED_LIKE else tensors, as_list(result))
            return result
        if name in _ASKING:
            self.refuse(f"{func} reads an activation into Python")
        if func._schema.is_mutable:
            return self._write(func, name, args, kwargs)
        return self._plain(func, args, kwargs)

    def _plain(self, func: Any, args: Any, kwargs: Any) -> Any:
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
            return self._plain(func, args, kwargs)
        old = target
        if self.value(target) is None:
            old = target.clone()
            self.recording.repeatable &= storage_address(target) in self._made
        refs = replaced(((old, *args[1:]), kwargs), self._ref)
        promoted = functional(*args, **kwargs)
        result = func(*args, **kwargs)
        self._stale.update(other for other in self._storages.get(storage_address(target), []) if other != id(target))
        if promoted.dtype != target.dtype:  # what is written keeps its type
            self._call(functional, refs, promoted)
            functional, refs = aten._to_copy.default, ((self._ref(promoted),), {"dtype": target.dtype})
        self._call(functional, refs, target)
        return result

    def _derive(self, func: Any, args: Any, kwargs: Any, read: Sequence[Tensor], results: Sequence[Any]) -> None:
        """Note how constants are computed anew that come from tensors which were there before."""
        sources = {storage_address(t) for t in read if t.numel()}
        earlier = not sources <= self._made
        asks = func._opname in _ASKING or func._schema.is_mutable
        if (earlier and asks) or torch.Tag.nondeterministic_seeded in func.tags:
            self.recording.repeatable = False
        for i, t in enumerate(results):
            if not isinstance(t, Tensor) or not t.numel() or storage_address(t) in sources:
                continue
            if earlier:
                self.recording.derived.append((t, lambda i=i: as_list(func(*args, **kwargs))[i]))
            else:
                self._made.add(storage_address(t))

    def _call(self, function: Any, refs: tuple[Any, Any], result: Any) -> None:
        outputs = [self.put(t) if isinstance(t, Tensor) else -1 for t in as_list(result)]
        kwargs = {key: value for key, value in refs[1].items() if key not in self._unrecorded}
        self.recording.calls.append(Call(function, tuple(refs[0]), kwargs, outputs, self.modules[-1]))

    def _ref(self, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        index = self._values.get(id(t))
        return t.detach() if index is None else Ref(index)


# of their argument only the shape and type count
_SHAPED_LIKE = {name for kind in ("zeros", "ones", "full", "empty") for name in (f"new_{kind}", f"{kind}_like")}
_ASKING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}


class Readers(TorchFunctionMode):
    """Refuses what reads an activation without calling an operator."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING:
            self._recorder.recording.repeatable = False
            if self._recorder.value(args[0]) is not None:
                self._recorder.refuse(f"{func.__name__} reads an activation into Python")
        return func(*args, **(kwargs or {}))


_READING = frozenset((Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr))


def _merge(recording: Recording, aliases: Sequence[Call]) -> None:
    """Make one value again of those that nobody else reads and their aliases."""
    readers, same = recording.readers(), dict[int, int]()
    for call in aliases:
        (source,) = call.refs
        if len(readers[source]) == 1 and source not in recording.outputs:
            same[call.outputs[0]] = same.get(source, source)

    def merged(leaf: Any) -> Any:
        return Ref(same[leaf.index]) if isinstance(leaf, Ref) and leaf.index in same else leaf

    recording.calls = [
        replace(call, args=replaced(call.args, merged), kwargs=replaced(call.kwargs, merged))
        for call in recording.calls
        if call.outputs[0] not in same
    ]
    recording.outputs = [same.get(value, value) for value in recording.outputs]
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
