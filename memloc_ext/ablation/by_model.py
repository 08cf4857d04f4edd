"""Runs a model that cannot be recorded as if it were: the model itself, once for every variant of every example."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from memloc_ext.ablation.evaluation import Edit, Graph, Suffix
from memloc_ext.ablation.network import Network, given
from memloc_ext.ablation.one_by_one import check_how
from memloc_ext.ablation.recorder import record
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ablation.running import evaluating, without_fast_path
from memloc_ext.ablation.sites import attention
from memloc_ext.ablation.slab import Slab
from memloc_ext.ablation.switch import SiteHook, hooked
from memloc_ext.borrowing import uncompiled
from memloc_ext.nn.example_ids import example_ids
from memloc_ext.tasks import logits_of


def searchable(
    model: nn.Module, x: Tensor, sites: Sequence[str] | None, how: str, memory_budget: int, weights: bool
) -> Network:
    """Return the recorded network for `localize`, or with a warning the model itself if it cannot be recorded.

    The arguments are those of `Network`.
    """
    try:
        network = Network(model, x, sites, how, memory_budget, True, weights)
        with torch.no_grad():
            network.graph.examples([t[:1] for t in given(x)], ())  # an operator may refuse this first
        return network
    except UnsupportedError as error:
        check_how(how, error)
        message = f"localize: {error}; running the model once per unit and example instead"
        warnings.warn(message, UserWarning, stacklevel=4)
        return ModelNetwork(model, x, sites, how, memory_budget, True)


class ModelNetwork(Network):
    """A `Network` of the model itself, for a ``how`` other than ``filter``.

    The model is given one example at a time, so that it does not matter where its layers have the batch.
    """

    def _graph(self, model: nn.Module, x: Tensor) -> Graph:
        return _ModelGraph(model, x)

    def _probe(self, budget: int, edited: bool, weights: bool) -> None:
        recording = self.graph.recording
        size = sum(t.numel() * t.element_size() for t in recording.sample)
        recording.sample.clear()
        self.needed = set().union(*(suffix.needed for suffix in self.suffixes))
        self.share = budget
        self.examples_at_once = max(1, budget // max(1, size))
        self.gradients_at_once = self.examples_at_once
        self.rows_at_once = [self.examples_at_once] * len(self.suffixes)


class _ModelGraph(Graph):
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__(record(model, x, strict=False))
        self.model = model
        self._returned = self.recording.returned | attention(self.recording)
        self._sites = {v: name for name, values in self._returned.items() for v in values if v is not None}

    def suffix(self, site: Sequence[int], whole: Sequence[int]) -> Suffix:
        return _ModelSuffix(self, site)

    def examples(
        self, inputs: Sequence[Tensor], keep: Iterable[int], edits: dict[int, Edit] | None = None
    ) -> dict[int, Tensor]:
        return self.rows(inputs, torch.arange(len(inputs[0]), device=inputs[0].device), keep, lambda _: edits or {})

    def rows(
        self, inputs: Sequence[Tensor], rows: Tensor, keep: Iterable[int], edits: Callable[[int], dict[int, Edit]]
    ) -> dict[int, Tensor]:
        """Run the model; see `Graph.examples`.

        Args:
            inputs: Of each row.
            rows: The example that each is of, for the edits.
            keep: Values to return, besides the output and the inputs.
            edits: Row to its edits.
        """
        without_cudnn = torch.backends.cudnn.flags(enabled=False)  # it gives no gradients of recurrent layers here
        with evaluating(self.model), uncompiled(), without_fast_path(), without_cudnn:
            keep = {*keep}
            found = [
                self._run([t[i : i + 1] for t in inputs], rows[i : i + 1], keep, edits(i)) for i in range(len(rows))
            ]
        return {value: torch.cat([one[value] for one in found]) for value in found[0]}

    def _run(self, inputs: list[Tensor], row: Tensor, keep: set[int], edits: dict[int, Edit]) -> dict[int, Tensor]:
        values = {v: t[None] for v, t in zip(self.recording.inputs, inputs, strict=True)}
        wanted = {self._sites[value] for value in {*keep, *edits} if value in self._sites}
        hooks = [_Seen(name, self._returned[name], row, values, keep, edits) for name in wanted]
        with contextlib.ExitStack() as stack:
            if len(inputs) > 1:
                stack.enter_context(example_ids(inputs[1]))
            for handle in hooked(self.model, hooks):
                stack.callback(handle.remove)
            values[self.recording.output] = logits_of(self.model(inputs[0]))[None]
        return values


class _ModelSuffix(Suffix):
    """The whole model, with a site changed."""

    def __init__(self, graph: _ModelGraph, site: Sequence[int]) -> None:
        self.model_graph, self.site = graph, tuple(site)
        self.needed = {*graph.recording.inputs}

    def run(
        self, unchanged: dict[int, Tensor], rows: Tensor, slab: Slab, edits: dict[int, Edit] | None = None
    ) -> Tensor:
        def changed(i: int) -> dict[int, Edit]:
            one, own = Slab(slab.values[i : i + 1], slab.start[i : i + 1], slab.dim), edits or {}
            return own | {value: _then(own.get(value), one) for value in self.site}

        recording = self.model_graph.recording
        inputs = [unchanged[value][rows, 0] for value in recording.inputs]
        return self.model_graph.rows(inputs, rows, (), changed)[recording.output]


def _then(edit: Edit | None, slab: Slab) -> Edit:
    def both(t: Tensor, rows: Tensor, read: Callable[[int], Tensor]) -> Tensor:
        return slab.written_into((t if edit is None else edit(t, rows, read)).clone())

    return both


class _Seen(SiteHook):
    """Sees and edits the values of one site, in the order of its calls."""

    def __init__(
        self,
        site: str,
        own: Sequence[int | None],
        row: Tensor,
        values: dict[int, Tensor],
        keep: set[int],
        edits: dict[int, Edit],
    ) -> None:
        super().__init__(site)
        self.own, self.row, self.values, self.keep, self.edits = own, row, values, keep, edits

    def change(self, t: Tensor) -> Tensor:
        value = self.own[min(self.runs, len(self.own)) - 1]
        if value in self.edits:
            t = self.edits[value](t[None], self.row, self.values.__getitem__)[0]
        if value in self.keep:
            self.values[value] = t[None]
        return t
