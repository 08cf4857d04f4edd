"""Runs a recording: on examples as they are, and from a site on for many variants at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memloc_ext.ablation.deltas import Slab, run_slab
from memloc_ext.ablation.layers import Layer, find_layer, run_layer, run_layer_on_channel
from memloc_ext.ablation.recording import Call, Recording, Step, run_steps, steps_to
from memloc_ext.ablation.rows import run_rows

State = Slab | Tensor
# of values [rows, *shape], the example of each row, and a function that gives what the value was computed from
Edit = Callable[[Tensor, Tensor, Callable[[int], Tensor]], Tensor]


def with_slab(edits: Mapping[int, Edit] | None, site: Iterable[int], slab: Slab) -> dict[int, Edit]:
    """Return edits after which a slab is written into each value of a site."""

    def then(edit: Edit | None) -> Edit:
        # of a copy: others may read the same memory as another value
        return lambda t, *given: slab.written_into((edit(t, *given) if edit else t).clone())

    edits = edits or {}
    return {**edits, **{value: then(edits.get(value)) for value in site}}


@dataclass
class Interpreter:
    """Runs steps of a recording for rows, each an example in a variant.

    Attributes:
        shapes: Of the recording's values.
        rows: Example of each row, ``[rows]``, int64.
        states: Value to what it is in the rows, given or computed: ``[rows, *shape]``, or a slab of the unchanged one.
        edits: Value to what is done to it, once it is computed.
        others: Values of the unchanged network, ``[examples, *shape]``, in the place of those without a state.
        keep: Values that are kept, as ``~value``, as they were before their edit.
        needed: Those of ``others`` that were read.
        slabs: Values that were slabs before their edit.
        nbytes: Largest memory of all states together, so far; not measured without ``others``.
    """

    shapes: Sequence[torch.Size]
    rows: Tensor
    states: dict[int, State]
    edits: Mapping[int, Edit]
    others: Mapping[int, Tensor] = field(default_factory=dict)
    keep: Collection[int] = ()
    needed: set[int] = field(default_factory=set)
    slabs: set[int] = field(default_factory=set)
    nbytes: int = 0

    def run(self, steps: Sequence[Step]) -> None:
        """Compute the states of what the steps return."""
        run_steps(steps, self.states, self._results)

    def unchanged(self, value: int) -> Tensor:
        """Return a value of the unchanged network, ``[examples, *shape]``."""
        self.needed.add(value)
        return self.others[value]

    def dense(self, value: int) -> Tensor:
        """Return a value of every row, ``[rows, *shape]``."""
        return self._dense(value, self.states.get(value))

    def _dense(self, value: int, state: State | None) -> Tensor:
        if state is None:
            return self.unchanged(value).index_select(0, self.rows)
        return state.dense(self.unchanged(value), self.rows) if isinstance(state, Slab) else state

    def _results(self, run: Call | Layer) -> dict[int, State]:
        found: dict[int, State] = {run.output: self._layer(run)} if isinstance(run, Layer) else self._call(run)
        for value, state in list(found.items()):
            if isinstance(state, Slab):
                self.slabs.add(value)
            if value in self.edits:
                t = self._dense(value, state)
                if value in self.keep:
                    found[~value] = t
                found[value] = self.edits[value](t, self.rows, self.dense)
        if self.others:
            held = (s.values if isinstance(s, Slab) else s for s in (*self.states.values(), *found.values()))
            self.nbytes = max(self.nbytes, sum(t.nbytes for t in held))
        return found

    def _layer(self, layer: Layer) -> Tensor:
        x = self.states.get(layer.input)
        residual = None if layer.residual is None else self.dense(layer.residual)
        if isinstance(x, Slab) and x.dim == 1 and x.width == 1:
            change = x.values - x.of(self.unchanged(layer.input), self.rows)
            value = layer.call.outputs[0]
            own = self.others.get(~value, self.unchanged(value))  # as it was before its edit
            return run_layer_on_channel(layer, change, x.start, own, self.rows, residual)
        return run_layer(layer, self.dense(layer.input), residual)

    def _call(self, call: Call) -> dict[int, State]:
        slabs = {ref: s for ref in call.refs if isinstance(s := self.states.get(ref), Slab)}
        results: Sequence[State | None] | None = None
        if slabs and not any(ref in self.states and ref not in slabs for ref in call.refs):
            results = run_slab(call, slabs, self.shapes, self.unchanged, self.rows)
        if results is None:
            results = run_rows(call, self.dense)
        pairs = zip(call.outputs, results, strict=False)  # a slab is of the first outputs alone
        return {value: state for value, state in pairs if value >= 0 and state is not None}


class Graph:
    """What a model computes, example by example; ``cached`` says whether its recording is of an earlier call."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.cached = recording, False
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
        recording, edits = self.recording, edits or {}
        keep, rows = {*keep, *recording.outputs}, torch.arange(len(inputs[0]), device=inputs[0].device)
        given: dict[int, State] = {value: t[:, None] for value, t in zip(recording.inputs, inputs, strict=True)}
        run = Interpreter(recording.shapes, rows, given, edits, keep=keep)
        run.run(steps_to({*keep, *edits}, recording.calls))
        return {value: run.dense(value) for value in run.states if value in keep or ~value in keep}

    def suffix(self, site: Sequence[int], whole: Sequence[int]) -> Suffix:
        """Return the part that depends on a site; see `Suffix`."""
        return Suffix(self, site, whole)


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
        steps, done = list[tuple[int, Call | Layer]](), set[int]()
        for i, call in recording.after(site):
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
    ) -> dict[int, Tensor]:
        """Return the recording's outputs of each row, ``[rows, *shape]``.

        Args:
            unchanged: The values `needed` in the unchanged network, ``[examples, *shape]``.
            rows: Example of each row.
            slab: What replaces the site's units in each row.
            edits: Those that ``unchanged`` was computed with.
        """
        found = self._run(self.steps, unchanged, rows, slab, edits)
        return {output: found.dense(output) for output in self.graph.recording.outputs}

    def feature(self, unchanged: dict[int, Tensor], rows: Tensor, slab: Slab) -> Slab | None:
        """Return what the `head` is given in each row, if it differs in one feature only; see `run`."""
        if self.head is None:
            return None
        state = self._run(self.steps[: self._head_at], unchanged, rows, slab).states.get(self.head.input)
        if isinstance(state, Slab) and state.dim == 1 and state.values.shape[1:] == (1, 1):
            return state
        return None

    def _run(
        self,
        steps: Sequence[Step],
        unchanged: dict[int, Tensor],
        rows: Tensor,
        slab: Slab,
        edits: dict[int, Edit] | None = None,
    ) -> Interpreter:
        states: dict[int, State] = dict.fromkeys(self._entries, slab)
        shapes, edits = self.graph.recording.shapes, with_slab(edits, self.site, slab)
        found = Interpreter(shapes, rows, states, edits, unchanged, needed=self.needed)
        found.run(steps)
        self.slabs |= found.slabs & self._whole
        self.bytes_per_row = max(self.bytes_per_row, found.nbytes // max(1, len(rows)))
        return found


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
