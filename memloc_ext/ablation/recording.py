"""What a model does to one example, as a list of calls that can be run again for many variants at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class UnsupportedError(RuntimeError):
    """The model does something that a recording cannot repeat."""


@dataclass(frozen=True)
class Ref:
    """A value of the recording, in the place of a tensor."""

    index: int


_CONTAINERS = (tuple, list, dict)


def replaced(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return a list, tuple or dict of an operator's arguments with ``change`` of everything in it, however deep.

    `torch.utils._pytree`, which knows more containers, takes several times as long.
    """
    if isinstance(tree, dict):
        return {key: replaced([t], change)[0] for key, t in tree.items()}
    found = [replaced(t, change) if isinstance(t, _CONTAINERS) else change(t) for t in tree]
    return tuple(found) if isinstance(tree, tuple) else found


def leaves(tree: Any) -> list[Any]:
    """Return everything in a list, tuple or dict of an operator's arguments."""
    found: list[Any] = []
    replaced(tree, found.append)
    return found


def as_list(result: Any) -> list[Any]:
    """Return what an operator returned as a list."""
    return list(result) if isinstance(result, tuple | list) else [result]


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        function: The operator, never one that writes into its arguments.
        args: With a `Ref` for every tensor that depends on the example.
        kwargs: Like ``args``.
        outputs: Index of each tensor returned; -1 for what is not used as a value.
        module: Name of the innermost module that runs.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[int]
    module: str

    @cached_property
    def name(self) -> str:
        """Name of the operator without namespace and overload."""
        return getattr(self.function, "_opname", getattr(self.function, "__name__", ""))

    @cached_property
    def is_pointwise(self) -> bool:
        """Whether it is an operator on single elements."""
        return torch.Tag.pointwise in getattr(self.function, "tags", ())

    @cached_property
    def leaves(self) -> list[Any]:
        """What arguments and keyword arguments hold."""
        return leaves((self.args, self.kwargs))

    @cached_property
    def refs(self) -> list[int]:
        """The values it reads."""
        return [leaf.index for leaf in self.leaves if isinstance(leaf, Ref)]

    def run(self, given: Iterable[Any], function: Callable[..., Any] | None = None) -> Any:
        """Return what the operator, or another one, returns for other `leaves`."""
        rest = iter(given)
        args, kwargs = replaced((self.args, self.kwargs), lambda _: next(rest))
        return (function or self.function)(*args, **kwargs)


@dataclass(frozen=True)
class Step:
    """A call, or a layer that stands for several, and the values that nothing reads after it."""

    run: Any
    dead: tuple[int, ...]


def steps_to(values: Iterable[int], runs: Sequence[Any], keep: Iterable[int] = ()) -> list[Step]:
    """Return what some values are computed from, in order; they are never dead, nor are those to ``keep``."""
    live, last, kept, found = set(values), set[int](), {*values, *keep}, list[Step]()
    for run in reversed(runs):
        if live.intersection(run.outputs):
            live.update(run.refs)
            dead = {*run.refs, *run.outputs} - last - kept
            last |= dead
            found.append(Step(run, tuple(dead)))
    return found[::-1]


def run_steps(
    steps: Sequence[Step], values: MutableMapping[int, Any], results: Callable[[Any], Mapping[int, Any]]
) -> None:
    """Put the results of each step, which the function returns by value, beside the others; drop what is dead."""
    for step in steps:
        values.update(results(step.run))
        for value in step.dead:
            values.pop(value, None)


@dataclass
class Recording:
    """A forward pass of one example, ``[1, *]``.

    Attributes:
        calls: In their order.
        shapes: Of each value.
        dtypes: Likewise.
        inputs: Values that are given: the model's inputs, then the example's id if one is known.
        outputs: Values that are returned.
        build: Puts tensors ``[batch, *]`` in their place in what the model returns.
        returned: Module name to the value of each of its calls, None for what is not a single tensor.
        dims: Module name to the dimension of the channels in what its first call returns, see `Channels`.
        derived: Constants that were computed from tensors of the model, with the calls that give their values anew.
        repeatable: Whether the recording holds for other values of the model's tensors, once it is refreshed.
    """

    calls: list[Call] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    build: Callable[[Sequence[Tensor]], Any] = tuple
    returned: dict[str, list[int | None]] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    derived: list[tuple[Tensor, Callable[[], Tensor]]] = field(default_factory=list)
    repeatable: bool = True

    def refresh(self) -> None:
        """Compute what was computed from tensors of the model again: they may hold other values now."""
        with torch.no_grad():
            for constant, compute in self.derived:
                constant.copy_(compute())

    def after(self, values: Iterable[int]) -> list[tuple[int, Call]]:
        """Return the calls that depend on some values, each behind its position."""
        depends, found = set(values), []
        for i, call in enumerate(self.calls):
            if depends.intersection(call.refs):
                depends.update(call.outputs)
                found.append((i, call))
        return found

    def readers(self) -> list[list[int]]:
        """Return which calls read each value."""
        readers: list[list[int]] = [[] for _ in self.shapes]
        for i, call in enumerate(self.calls):
            for ref in set(call.refs):
                readers[ref].append(i)
        return readers

    def writer(self) -> dict[int, int]:
        """Return which call each value comes from."""
        return {value: i for i, call in enumerate(self.calls) for value in call.outputs if value >= 0}
