"""A recorded model together with the sites that are to be switched off in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.ablation.deltas import Slab
from memloc_ext.ablation.interpreter import Graph
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ablation.rows import BATCH_NORMS, keeps_rows_apart, normalises_by_batch
from memloc_ext.ablation.signature import Judged, Signature, check_output, judge, opened
from memloc_ext.ablation.sites import Site, find_sites, is_alone, producer
from memloc_ext.borrowing import evaluating
from memloc_ext.tasks import Classification, Task, wide

HOWS = ("zero", "mean", "filter")
_SHARE = 2  # of the memory budget: half for the unchanged network's values, half for the variants'
_ON_CPU, _MOST_ON_GPU = 1 << 30, 1 << 34  # bytes of the memory budget where none is given
_CACHED = 1 << 25  # bytes of a chunk of variants on the CPU; more gains nothing there


@dataclass(frozen=True)
class Query:
    """What a network is asked.

    Attributes:
        task: Of the model.
        sites: See `ablation_losses`.
        how: See `ablation_losses`.
        memory_budget: Bytes; None for `memory_budget`.
        edited: Whether units of all sites may be switched off in what is compared with.
        weights: Whether what the sites' layers read is needed too: ``how`` is ``filter``.
    """

    task: Task
    sites: Sequence[str] | None
    how: str
    memory_budget: int | None
    edited: bool = False
    weights: bool = False


def memory_budget(given: int | None, device: torch.device) -> int:
    """Return the bytes that are given, or by default 1 GiB, and on a GPU a quarter of what is free, at most 16 GiB."""
    if given is not None:
        return int(given)
    if device.type != "cuda":
        return _ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what PyTorch holds back
    return min(free // 4, _MOST_ON_GPU)


class Network:
    """A model as a graph, its sites, and how much memory running it takes, given a batch of at least one example.

    Raises:
        UnsupportedError: If the graph cannot be run for many examples.
        ValueError: If sites, way or budget do not fit the model.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, given: Sequence[Tensor], signature: Signature, query: Query
    ) -> None:
        self.graph, self.signature, self.task, self.how = graph, signature, query.task, query.how
        recording = graph.recording
        self.sites = find_sites(model, recording, query.sites)
        self.places = [_place(graph, site, self.how) for site in self.sites]
        every = [value for place in self.places for value in place.values] if query.edited else []
        for i, value in enumerate(every):
            if value in every[:i]:
                same = [site.name for site, place in zip(self.sites, self.places, strict=True) if value in place.values]
                raise ValueError(f"sites must be different units, got {' and '.join(same)}, which are the same")
        self.suffixes = [graph.suffix(place.values, every) for place in self.places]
        with torch.no_grad():
            self._probe([t[:1] for t in given], query)

    def output(self, values: Mapping[int, Tensor]) -> Any:
        """Return what the model returns, given the recording's outputs, ``[rows, 1, *]``, among some values."""
        return self.graph.recording.build([values[value][:, 0] for value in self.graph.recording.outputs])

    def judge(self, values: Mapping[int, Tensor], y: Tensor) -> Judged:
        """Return what the outputs of some rows are worth."""
        return judge(self.task, self.output(values), y)

    def judge_unchanged(
        self, model: nn.Module, given: Sequence[Tensor], values: Mapping[int, Tensor], y: Tensor
    ) -> Judged:
        """Return the same of examples in the unchanged network, checked by `check_output`, and against the model."""
        judged = check_output(self.task, self.output(values), y)
        self._check_agreement(model, given, [values[value] for value in self.graph.recording.outputs])
        return judged

    def baselines(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what each site's units are replaced by, ``[units]``; for ``how="mean"`` their mean over examples."""
        if self.how == "mean":
            with torch.no_grad():
                return self._means(inputs)
        out = []
        for site, place in zip(self.sites, self.places, strict=True):
            bias = _bias(self.graph, site) if self.how == "filter" else None
            dtype, device = self.graph.recording.dtypes[place.values[0]], inputs[0].device
            out.append(torch.zeros(place.units, dtype=dtype, device=device) if bias is None else bias.to(dtype))
        return out

    def slab(self, index: int, units: Tensor, baseline: Tensor) -> Slab:
        """Return units of a site, ``[rows]``, switched off to their baselines, ``[units]``, one per row."""
        place = self.places[index]
        shape = list(self.graph.recording.shapes[place.values[0]])
        shape[place.dim] = 1
        values = baseline[units].reshape(-1, *[1] * len(shape)).expand(-1, *shape)
        return Slab(values, units, place.dim)

    def _means(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values, x = [place.values for place in self.places], inputs[0]
        sums = [torch.zeros(place.units, dtype=torch.float64, device=x.device) for place in self.places]
        for begin in range(0, len(x), self.examples_at_once):
            some = [t[begin : begin + self.examples_at_once] for t in inputs]
            part = self.graph.examples(some, {v for vs in values for v in vs})
            for total, vs, place in zip(sums, values, self.places, strict=True):
                for v in vs:
                    moved = part[v].movedim(place.dim + 1, 0).flatten(1)
                    total += moved.double().mean(1) * (len(part[v]) / len(vs))
        places = zip(sums, self.places, strict=True)
        return [(total / len(x)).to(self.graph.recording.dtypes[place.values[0]]) for total, place in places]

    def _probe(self, given: Sequence[Tensor], query: Query) -> None:
        """Run every suffix on one row, to see what it needs."""
        recording = self.graph.recording
        unchanged = self.graph.examples(given, range(len(recording.shapes)))
        device = given[0].device
        row = torch.zeros(1, dtype=torch.int64, device=device)
        self.ends_in_feature: list[bool] = []  # of each suffix, whether its head is given one changed feature
        for i, suffix in enumerate(self.suffixes):
            dtype = recording.dtypes[self.places[i].values[0]]
            slab = self.slab(i, row, torch.zeros(self.places[i].units, dtype=dtype, device=device))
            fused = isinstance(self.task, Classification) and suffix.feature(unchanged, row, slab) is not None
            self.ends_in_feature.append(fused)
            if fused and suffix.head is not None:
                suffix.needed.add(suffix.head.input)
            suffix.run(unchanged, row, slab)
            # what is a slab no longer where it is edited is read in another way, with one edit or with all of them
            slabs = sorted(suffix.slabs)
            for values in [*([value] for value in slabs), slabs] if slabs else []:
                suffix.run(unchanged, row, slab, dict.fromkeys(values, lambda t, *_: t))
        self.needed = set().union(*(suffix.needed for suffix in self.suffixes), recording.outputs)
        if query.weights:
            self.needed.update(producer(recording, site).refs[0] for site in self.sites)
        sizes = {v: t.nbytes for v, t in unchanged.items()}
        example = sum(sizes[v] for v in self.needed) + 2 * max(sizes.values())
        example += sum(sizes[v] for place in self.places for v in place.values) if query.edited else 0
        row_bytes = max((2 * suffix.bytes_per_row for suffix in self.suffixes), default=0)
        least, budget = _SHARE * max(example, row_bytes, 1), memory_budget(query.memory_budget, device)
        if budget < least:
            raise ValueError(
                f"memory_budget must be at least {least} bytes for this model and these sites, got {budget}"
            )
        self.share = budget // _SHARE
        self.examples_at_once = self.share // max(1, example)
        self.gradients_at_once = max(1, self.share // max(1, 2 * sum(sizes.values())))
        share = self.share if device.type == "cuda" else min(self.share, max(row_bytes, _CACHED))
        self.rows_at_once = [share // max(1, 2 * suffix.bytes_per_row) for suffix in self.suffixes]

    def _check_agreement(self, model: nn.Module, given: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Raise UnsupportedError if a model gives other than the recorded ``[batch, 1, *]``: examples meet in it."""
        recording = self.graph.recording
        if all(keeps_rows_apart(call, recording.shapes) for call in recording.calls):
            few = 1 if self.graph.cached else 2  # a number in a call may still be that of the examples
            if len(given[0]) < few:
                return
            given, outputs = ([t[:few] for t in tensors] for tensors in (given, outputs))
        with evaluating(model), torch.no_grad():
            own, _ = opened(self.task, self.signature.call(model, given))
        eps = max(torch.finfo(dtype).eps for dtype in recording.dtypes if dtype.is_floating_point)
        if not all(_agree(t, found[:, 0], max(1e-3, 32 * eps)) for t, found in zip(own, outputs, strict=True)):
            norms = [call for call in recording.calls if call.name in BATCH_NORMS and normalises_by_batch(call)]
            why = f": {norms[0].module or 'the model'} normalises by the statistics of the batch" if norms else ""
            raise UnsupportedError(f"the model's examples meet in evaluation mode{why}")


def _agree(own: Tensor, found: Tensor, allowed: float) -> bool:
    own, found = wide(own), wide(found)
    if own.shape != found.shape or own.numel() == 0:
        return own.shape == found.shape
    return not bool(((own - found).abs() > allowed * own.abs().max() + 1e-5).any())


def _place(graph: Graph, site: Site, how: str) -> Site:
    """Return where the units are replaced: at the site, or in the output of the layer whose filters are zeroed."""
    if how != "filter":
        return site
    call = producer(graph.recording, site)
    if not is_alone(graph.recording, call):
        raise ValueError(f"how='filter' needs weights that serve one call alone; those that compute {site.name} do not")
    value = call.outputs[0]
    if graph.recording.shapes[value][1] != site.units:
        raise ValueError(f"how='filter' needs one filter per unit; {site.name} has {site.units} units")
    return replace(site, values=(value,), dim=1)


def _bias(graph: Graph, site: Site) -> Tensor | None:
    call = producer(graph.recording, site)
    bias = call.args[2] if call.name == "convolution" else call.args[0] if call.name == "addmm" else None
    return bias if isinstance(bias, Tensor) else None
