"""Runs a recording: on examples as they are, and from a site on for many variants at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc_ext.ablation.deltas import Slab, run_slab
from memloc_ext.ablation.layers import Layer, find_layer, run_layer, run_layer_on_channel
from memloc_ext.ablation.recording import Call, Recording, Step, run_steps, steps_to
from memloc_ext.ablation.rows import run_rows

State = Slab | Tensor
# of values [rows, *shape], the example of each row, and a function that gives what the value was computed from
Edit = Callable[[Tensor, Tensor, Callable[[int], Tensor]], Tensor]


class Graph:
    """What a model computes, example by example; ``kept`` says whether its recording is of an earlier call."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.kept = recording, False
        self.readers = recording.readers()

    def examples(
        self, inputs: Sequence[Tensor], keep: Iterable[int], edits: dict[int, Edit] | None = None
    ) -> dict[int, Tensor]:
        """Run the whole network; differentiable.

        Args:
            inputs: As of `Recording.inputs`, for every example: ``[examples, *]``.
            keep: Values to return, besides the outputs: ``[examples, *shape]`` each.
            edits: Value to what is done to it, once it is computed; ``~value`` of one to keep is what it was before.
        """
        keep, edits = {*keep, *self.recording.outputs}, edits or {}
        rows = torch.arange(len(inputs[0]), device=inputs[0].device)
        values = {index: t[:, None] for index, t in zip(self.recording.inputs, inputs, strict=True)}

        def results(call: Call) -> dict[int, Tensor]:
            found = {}
            for index, t in zip(call.outputs, run_rows(call, values.__getitem__), strict=True):
                if index >= 0 and t is not None:
                    if index in edits and index in keep:
                        found[~index] = t
                    found[index] = edits[index](t, rows, values.__getitem__) if index in edits else t
            return found

        run_steps(steps_to({*keep, *edits}, self.recording.calls), values, results)
        return {value: t for value, t in values.items() if value in keep or ~value in keep}

    def suffix(self, site: Sequence[int], whole: Sequence[int]) -> Suffix:
        """Return the part that depends on a site; see `Suffix`."""
        return Suffix(self, site, whole)


class MissingValueError(LookupError):
    """A value of the unchanged network is needed that was not kept."""


class Suffix:
    """The part of a network that depends on a site, the values of one per call of the module.

    ``whole`` are values that `run` may be given edits of.

    Attributes:
        needed: Values of the unchanged network that `run` read so far.
        bytes_per_row: The largest memory that values took so far, per row.
        slabs: Values of ``whole`` that were slabs so far when they were computed, so that an edit widens them.
        head: The linear layer that gives the logits, if only multiplications by numbers follow it.
        factor: Their product.
    """

    def __init__(self, graph: Graph, site: Sequence[int], whole: Sequence[int] = ()) -> None:
        recording = graph.recording
        self.graph, self.site = graph, tuple(site)
        self.needed: set[int] = set(site)
        self.bytes_per_row = 0
        self.slabs: set[int] = set()
        self._whole = frozenset(whole)
        depends, steps, done = set(site), list[tuple[int, Call | Layer]](), set[int]()
        for i, call in enumerate(recording.calls):
            if not depends.intersection(call.refs):
                continue
            depends.update(index for index in call.outputs if index >= 0)
            if i in done:
                continue
            layer = find_layer(recording, graph.readers, i, done, (*self.site, *whole))
            done.update(layer.calls if layer else ())
            steps.append((i if layer is None else layer.calls[-1], layer or call))
        steps.sort(key=lambda step: step[0])  # a layer runs where its last call does: its residual is there
        self.steps = steps_to(recording.outputs, [run for _, run in steps])
        written = {value for step in self.steps for value in step.run.outputs}
        self._entries = [value for value in site if value not in written]
        self._head_at, self.factor = _find_head(self.steps) if len(recording.outputs) == 1 else (None, 1.0)
        head = None if self._head_at is None else self.steps[self._head_at].run
        self.head = head if isinstance(head, Layer) else None

    def run(
        self, unchanged: dict[int, Tensor], rows: Tensor, slab: Slab, edits: dict[int, Edit] | None = None
    ) -> list[Tensor]:
        """Return the outputs of each row, ``[rows, *shape]``.

        Args:
            unchanged: The values `needed` in the unchanged network, ``[examples, *shape]``; else MissingValueError.
            rows: Example of each row.
            slab: What replaces the site's units in each row.
            edits: Those that ``unchanged`` was computed with.
        """
        states = self._run(self.steps, unchanged, rows, slab, edits or {})
        values = _Values(states, unchanged, rows, self.needed)
        return [values.dense(output) for output in self.graph.recording.outputs]

    def feature(self, unchanged: dict[int, Tensor], rows: Tensor, slab: Slab) -> Slab | None:
        """Return what the `head` is given in each row, if it differs in one feature only; see `run`."""
        if self.head is None:
            return None
        state = self._run(self.steps[: self._head_at], unchanged, rows, slab, {}).get(self.head.input)
        if isinstance(state, Slab) and state.dim == 1 and state.values.shape[1:] == (1, 1):
            return state
        return None

    def _run(
        self,
        steps: Sequence[Step],
        unchanged: dict[int, Tensor],
        rows: Tensor,
        slab: Slab,
        edits: dict[int, Edit],
    ) -> dict[int, State]:
        states: dict[int, State] = dict.fromkeys(self._entries, slab)
        for step in steps:
            values = _Values(states, unchanged, rows, self.needed)
            self._step(step.run, states, values)
            for value in step.run.outputs:
                if value in self._whole and isinstance(states.get(value), Slab):
                    self.slabs.add(value)
                if value in states and (value in edits or value in self.site):
                    whole = values.dense(value)
                    whole = edits[value](whole, rows, values.dense) if value in edits else whole
                    # of a copy: others may read the same memory as another value
                    states[value] = slab.written_into(whole.clone()) if value in self.site else whole
            tensors = [state.values if isinstance(state, Slab) else state for state in states.values()]
            self.bytes_per_row = max(self.bytes_per_row, sum(t.nbytes for t in tensors) // max(1, len(rows)))
            for value in step.dead:
                states.pop(value, None)
        return states

    def _step(self, run: Call | Layer, states: dict[int, State], values: _Values) -> None:
        rows = values.rows
        if isinstance(run, Layer):
            x = states.get(run.input)
            residual = None if run.residual is None else values.dense(run.residual)
            if isinstance(x, Slab) and x.dim == 1 and x.width == 1:
                change = x.values - x.of(values.unchanged(run.input), rows)
                own = values.unedited(run.call.outputs[0])
                states[run.output] = run_layer_on_channel(run, change, x.start, own, rows, residual)
            else:
                states[run.output] = run_layer(run, values.dense(run.input), residual)
            return
        slabs = {ref: s for ref in run.refs if isinstance(s := states.get(ref), Slab)}
        results: Sequence[State | None] | None = None
        if slabs:
            shapes = self.graph.recording.shapes
            results = run_slab(run, slabs, shapes, values.unchanged, rows, values.is_dense)
        if results is None:
            results = run_rows(run, values.dense)
        pairs = zip(run.outputs, results, strict=False)
        states.update({index: result for index, result in pairs if index >= 0 and result is not None})


@dataclass(frozen=True)
class _Values:
    """Reads values of a suffix that is running, and notes which ones are the unchanged network's."""

    states: dict[int, State]
    others: dict[int, Tensor]
    rows: Tensor
    needed: set[int]

    def unchanged(self, value: int) -> Tensor:
        """Return a value of the unchanged network, ``[examples, *shape]``."""
        self.needed.add(value)
        if value not in self.others:
            raise MissingValueError(value)
        return self.others[value]

    def unedited(self, value: int) -> Tensor:
        """Return a value of the unchanged network as it was before it was edited."""
        whole = self.unchanged(value)
        return self.others.get(~value, whole)

    def is_dense(self, value: int) -> bool:
        """Return whether a value differs from the unchanged network's all over."""
        return isinstance(self.states.get(value), Tensor)

    def dense(self, value: int) -> Tensor:
        """Return a value of every row, ``[rows, *shape]``."""
        state = self.states.get(value)
        if state is None:
            return self.unchanged(value).index_select(0, self.rows)
        return state.dense(self.unchanged(value), self.rows) if isinstance(state, Slab) else state


def _find_head(steps: Sequence[Step]) -> tuple[int | None, float]:
    """Return the position of a last linear layer that only multiplications by numbers follow, and their product."""
    factor = 1.0
    for i, step in reversed(list(enumerate(steps))):
        run = step.run
        if isinstance(run, Layer):
            return (None if run.is_convolution or run.relu else i), factor
        numbers = [a for a in run.args if isinstance(a, int | float)]
        if run.name != "mul" or len(numbers) != 1 or len(run.refs) != 1:
            break
        factor *= numbers[0]
    return None, 1.0
