"""Models that cannot be recorded: the model itself, once per unit, or once per variant of each example."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from memloc_ext.ablation.deltas import Slab
from memloc_ext.ablation.edits import SiteHook, apply_ablation, hooked
from memloc_ext.ablation.interpreter import Edit, Graph, Suffix, with_slab
from memloc_ext.ablation.network import Network, Query, memory_budget
from memloc_ext.ablation.recorder import record
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ablation.signature import Judged, Signature, check_output, judge, opened
from memloc_ext.ablation.sites import Site, attention, find_sites
from memloc_ext.borrowing import evaluating, uncompiled, without_fast_path
from memloc_ext.tasks import Task


def one_by_one(
    model: nn.Module,
    tensors: Sequence[Tensor],
    signature: Signature,
    y: Tensor,
    query: Query,
    reference: Sequence[Tensor],
    reason: UnsupportedError,
    progress: Callable[[int], object],
) -> tuple[Judged, dict[str, Judged], dict[str, int]]:
    """Return what the model's outputs are worth, as it is and with each unit of its sites off, and where units are.

    The arguments are those of `ablation_losses`, taken apart, and why the model cannot be recorded; ``progress`` is
    called with 1 for each unit. ValueError if a site is none, or ``how`` is ``filter``, which needs a recording.
    """
    check_how(query.how, reason)
    task = query.task
    graph = _ModelGraph(model, tensors, signature, task)
    found = find_sites(model, graph.recording, query.sites)
    dims, variants = {site.name: site.dim for site in found}, {}
    with torch.no_grad(), evaluating(model):
        base = check_output(task, signature.call(model, tensors), y)
        baselines = graph.means(found, reference) if query.how == "mean" else {}
        for site in found:
            rows = []
            for unit in range(site.units):
                with apply_ablation(model, [(site.name, unit)], baselines=baselines, channel_dims=dims):
                    rows.append(judge(task, signature.call(model, tensors), y))
                progress(1)
            variants[site.name] = Judged.joined(rows, join=torch.stack)
    return base, variants, dims


def check_how(how: str, reason: UnsupportedError) -> None:
    """Raise unless units can be switched off without a recording."""
    if how == "filter":
        raise ValueError(
            f"how='filter' and changes of weights need a model that can be recorded, but {reason}; "
            "use how='zero' or how='mean'"
        ) from reason


class ModelNetwork(Network):
    """A `Network` of the model itself, for a ``how`` other than ``filter``.

    The model is given one example at a time, so that it does not matter where its layers have the batch.
    """

    def __init__(self, model: nn.Module, given: Sequence[Tensor], signature: Signature, query: Query) -> None:
        super().__init__(model, _ModelGraph(model, given, signature, query.task), given, signature, query)

    def _probe(self, given: Sequence[Tensor], query: Query) -> None:
        recording = self.graph.recording
        sizes = zip(recording.shapes, recording.dtypes, strict=True)
        size = sum(shape.numel() * dtype.itemsize for shape, dtype in sizes)
        self.needed = {*recording.inputs, *recording.outputs}
        self.share = memory_budget(query.memory_budget, given[0].device)
        self.examples_at_once = max(1, self.share // max(1, size))
        self.gradients_at_once = self.examples_at_once
        self.rows_at_once = [self.examples_at_once] * len(self.suffixes)


class _ModelGraph(Graph):
    def __init__(self, model: nn.Module, given: Sequence[Tensor], signature: Signature, task: Task) -> None:
        super().__init__(record(model, given, signature, task, strict=False))
        self.model, self.signature, self.task = model, signature, task
        self._returned = self.recording.returned | attention(self.recording)
        self._sites = {v: name for name, values in self._returned.items() for v in values if v is not None}

    def suffix(self, site: Sequence[int], whole: Sequence[int]) -> Suffix:
        return _ModelSuffix(self, site)

    def examples(
        self, inputs: Sequence[Tensor], keep: Iterable[int], edits: dict[int, Edit] | None = None
    ) -> dict[int, Tensor]:
        return self.rows(inputs, torch.arange(len(inputs[0]), device=inputs[0].device), keep, lambda _: edits or {})

    def means(self, sites: Sequence[Site], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the mean of each unit over examples, which meet in the model, positions and calls."""
        keep = {value for site in sites for value in site.values}
        with uncompiled(), without_fast_path():
            values = self._run(inputs, torch.zeros(1, dtype=torch.int64, device=inputs[0].device), keep, {})
        calls = {site: [values[v].movedim(site.dim + 1, 0).flatten(1).mean(1) for v in site.values] for site in sites}
        return {site.name: torch.stack(means).mean(0) for site, means in calls.items()}

    def rows(
        self, inputs: Sequence[Tensor], rows: Tensor, keep: Iterable[int], edits: Callable[[int], dict[int, Edit]]
    ) -> dict[int, Tensor]:
        """Run the model on rows of these examples, with edits by row; see `Graph.examples`."""
        without_cudnn = torch.backends.cudnn.flags(enabled=False)  # it gives no gradients of recurrent layers here
        with evaluating(self.model), uncompiled(), without_fast_path(), without_cudnn:
            keep = {*keep}
            found = [
                self._run([t[i : i + 1] for t in inputs], rows[i : i + 1], keep, edits(i)) for i in range(len(rows))
            ]
        return {value: torch.cat([one[value] for one in found]) for value in found[0]}

    def _run(self, inputs: Sequence[Tensor], row: Tensor, keep: set[int], edits: dict[int, Edit]) -> dict[int, Tensor]:
        values = {v: t[None] for v, t in zip(self.recording.inputs, inputs, strict=True)}
        wanted = {self._sites[value] for value in {*keep, *edits} if value in self._sites}

        def see(value: int | None, t: Tensor) -> Tensor:
            if value in edits:
                t = edits[value](t[None], row, values.__getitem__)[0]
            if value in keep:
                values[value] = t[None]
            return t

        hooks = [_Seen(name, self._own(name), see) for name in wanted]
        with contextlib.ExitStack() as stack:
            for handle in hooked(self.model, hooks):
                stack.callback(handle.remove)
            outputs, _ = opened(self.task, self.signature.call(self.model, inputs))
        return values | {value: t[None] for value, t in zip(self.recording.outputs, outputs, strict=True)}

    def _own(self, name: str) -> list[int | None]:
        """Return the values of a module's calls that no other module is to see."""
        return [v if v is not None and self._sites[v] == name else None for v in self._returned[name]]


class _ModelSuffix(Suffix):
    """The whole model, with a site changed."""

    def __init__(self, graph: _ModelGraph, site: Sequence[int]) -> None:
        self.model_graph, self.site = graph, tuple(site)

    def run(
        self, unchanged: dict[int, Tensor], rows: Tensor, slab: Slab, edits: dict[int, Edit] | None = None
    ) -> dict[int, Tensor]:
        def changed(i: int) -> dict[int, Edit]:
            return with_slab(edits, self.site, Slab(slab.values[i : i + 1], slab.start[i : i + 1], slab.dim))

        inputs = [unchanged[value][rows, 0] for value in self.model_graph.recording.inputs]
        return self.model_graph.rows(inputs, rows, (), changed)


class _Seen(SiteHook):
    """Hands over the values of one site, in the order of its calls, and returns what it gets."""

    def __init__(self, site: str, own: Sequence[int | None], see: Callable[[int | None, Tensor], Tensor]) -> None:
        super().__init__(site)
        self.own, self.see = own, see

    def change(self, t: Tensor) -> Tensor:
        return self.see(self.own[min(self.runs, len(self.own)) - 1], t)
