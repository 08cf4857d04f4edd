"""Which channels of a recorded pass may go: those that no step needs, and that belong together with masked ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memloc_ext.nn.removal.recording import Flags, Place, Step, Value, aten


def find_zeros(steps: Sequence[Step]) -> None:
    """Find what is 0 for any input, given the zeros of the values that no step made."""
    for step in steps:
        if any(value.opaque for value in step.results) or not any(z.any() for v in step.inputs for z in v.zero):
            continue
        if step.positions is not None:
            whole = torch.cat([(~_all([~zero for zero in value.zero])).flatten() for value in step.inputs])
            for value, positions in zip(step.results, step.positions, strict=True):
                value.zero = project(whole[positions], torch.all)
        else:
            _spread_zeros(step)


def find_kept(steps: Sequence[Step]) -> None:
    """Find what has to stay: what is needed, what belongs together with it, and all but zeros of what is summed."""
    for step in steps:
        values, tied = (*step.inputs, *step.results), set[Place]()
        for tie in step.ties if step.positions is None else ():
            tied.update(tie.places)
            if tie.contracted:
                needed = ~np.logical_or.reduce([value.zero[dim] for value, dim in tie.places])
                for value, dim in tie.places:
                    value.keep[dim] |= needed
        for value in values:
            for dim, keep in enumerate(value.keep):
                if value.opaque or (step.positions is None and (value, dim) not in tied):
                    keep[:] = True
    _settle(steps, np.logical_or)


def drop_only(steps: Sequence[Step], dropped: Sequence[tuple[Place, NDArray[np.bool_]]]) -> None:
    """Keep what could go too, unless it belongs together with indices that are to be dropped."""
    values = {value for step in steps for value in (*step.inputs, *step.results)}
    needed = {value: value.keep for value in values}
    for value in values:
        value.keep = [np.ones_like(keep) for keep in value.keep]
    for (value, dim), indices in dropped:
        value.keep[dim] &= ~indices | needed[value][dim]
    _settle(steps, np.logical_and, needed)


def _settle(steps: Sequence[Step], combine: Any, least: dict[Value, Flags] | None = None) -> None:
    changed = True
    while changed:
        changed = False
        for step in (*reversed(steps), *steps):
            for value, dim, keep in _moved(step, combine) if step.positions is not None else _tied(step, combine):
                found = combine(value.keep[dim], keep)
                if least is not None:
                    found |= least[value][dim]
                if not np.array_equal(found, value.keep[dim]):
                    value.keep[dim], changed = found, True


def _tied(step: Step, combine: Any) -> Iterator[tuple[Value, int, NDArray[np.bool_]]]:
    for tie in step.ties:
        keep = combine.reduce([value.keep[dim] for value, dim in tie.places])
        for value, dim in tie.places:
            yield value, dim, keep


def _moved(step: Step, combine: Any) -> Iterator[tuple[Value, int, NDArray[np.bool_]]]:
    """Follow the elements that stay through a step that moves them; an element stays if all of its indices do."""
    if all(keep.all() for value in (*step.inputs, *step.results) for keep in value.keep):
        return
    sizes = [value.tensor.numel() for value in step.inputs]
    whole = torch.cat([_all(value.keep).flatten() for value in step.inputs])
    back = torch.zeros(sum(sizes), dtype=torch.bool)
    for value, positions in zip(step.results, step.positions or (), strict=True):
        for dim, keep in enumerate(project(whole[positions], torch.any)):
            yield value, dim, keep
        back[positions[_all(value.keep)]] = True
    for value, part in zip(step.inputs, back.split(sizes), strict=True):
        for dim, keep in enumerate(project(part.view(value.shape), torch.any)):
            yield value, dim, keep


def _spread_zeros(step: Step) -> None:
    factors = step.operator.overloadpacket in (aten.mul, aten.mul_, aten.mm, aten.bmm)
    if not factors and not _keeps_zero(step):
        return
    for tie in step.ties:
        read = [value.zero[dim] for value, dim in tie.places if value not in step.results]
        if not tie.contracted and (factors or len(read) == len(step.inputs)):
            zero = (np.logical_or if factors else np.logical_and).reduce(read)
            for value, dim in tie.places:
                if value in step.results and value.tensor.is_floating_point():
                    value.zero[dim] = zero


def _keeps_zero(step: Step) -> bool:
    """Return whether an operator makes 0 of nothing but 0."""
    if step.operator.overloadpacket is aten.convolution:
        return False

    def zeros(value: Value) -> Tensor:
        shape = (1,) * len(value.shape) if step.pointwise else value.shape
        return torch.zeros(shape, dtype=torch.float64 if value.tensor.is_floating_point() else value.tensor.dtype)

    return bool(step.ties) and not any(t.any() for t in step.run(zeros) if t.is_floating_point())


def outer(flags: Flags) -> NDArray[np.bool_]:
    """Return for each element whether all of its indices have a flag."""
    return np.asarray(functools.reduce(np.logical_and.outer, flags, np.True_))


def _all(flags: Flags) -> Tensor:
    return torch.as_tensor(outer(flags))


def project(elements: Tensor, combine: Callable[..., Tensor]) -> Flags:
    """Return for each index of each dimension whether any, or all, of its elements have a flag."""
    rows = (elements.unsqueeze(-1).transpose(0, dim).flatten(1) for dim in range(elements.dim()))
    return [combine(row, dim=1).numpy() for row in rows]
