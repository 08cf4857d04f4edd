"""The units that flip memorized and clean examples of a data set, side by side."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.examples import Data
from memloc_ext.marks import Marks
from memloc_ext.nn import dropout_mode
from memloc_ext.nn.insert import example_tied_sites
from memloc_ext.parts import Parts
from memloc_ext.probes.accuracy import Evaluation
from memloc_ext.probes.localization.chunks import LocalizedExample, search_in_chunks
from memloc_ext.probes.localization.edited_accuracy import EditedAccuracy, edited_accuracy
from memloc_ext.probes.localization.result import ALREADY_WRONG, FLIPPED, STATUSES
from memloc_ext.probes.localization.settings import Settings
from memloc_ext.tasks import Task, TaskName

KINDS = ("memorized", "clean")
REFERENCE = 512
"""Largest number of clean examples that stand for the population."""
EVALUATED = 512
"""Largest number of clean training, of memorized training and of test examples that an edit is evaluated on."""


@dataclass(frozen=True)
class LocalizedSite:
    """A site that was searched.

    Attributes:
        name: Of the module.
        units: Their number.
        memorization: How many of them are memorization channels of an `ExampleTiedDropout`, the last ones; 0 if there
            is none.
        p_mem: Probability that an example keeps such a channel; 0 if there is none.
    """

    name: str
    units: int
    memorization: int = 0
    p_mem: float = 0.0


@dataclass(frozen=True)
class KindLocalization:
    """All localized examples of a kind.

    Attributes:
        total: Training examples of the kind.
        fitted: Those of them about which the model is right.
        statuses: Status to number of localized examples.
        mean: Mean number of units that flip an example, over those that were not wrong already; None without such, and
            where a search ended without a flip: it gives a lower bound alone.
        median: Their median, where a search without a flip counts as more than any other; None where it is the median.
        histogram: Number of flipped examples with so many units, from 0 on.
        sites: Site to the number of units that were found in it, over all examples.
        memorization: How many of the units that were found are memorization channels.
        edited: Accuracy after the whole edit for one example; None if none was evaluated.
        curve: Accuracy after each unit, see `edited_accuracy`.
    """

    total: int
    fitted: int
    statuses: dict[str, int]
    mean: float | None
    median: float | None
    histogram: list[int]
    sites: dict[str, int]
    memorization: int
    edited: EditedAccuracy | None
    curve: list[EditedAccuracy]

    @property
    def localized(self) -> int:
        """Number of localized examples."""
        return sum(self.statuses.values())

    @property
    def searched(self) -> int:
        """Number of localized examples that were not wrong already."""
        return self.localized - self.statuses[ALREADY_WRONG]

    @property
    def flipped(self) -> int:
        """Number of them that flipped."""
        return self.statuses[FLIPPED]

    @property
    def units(self) -> int:
        """Number of units that were found, over all examples."""
        return sum(self.sites.values())


@dataclass(frozen=True)
class DatasetLocalization:
    """What `localize_dataset` found.

    Attributes:
        examples: Every localized example.
        sites: The sites that were searched, in the order in which the network computes them.
        kinds: ``memorized`` and ``clean`` to their summary.
        seconds: Time of the search in one process, per example.
    """

    examples: list[LocalizedExample]
    sites: list[LocalizedSite]
    kinds: dict[str, KindLocalization]
    seconds: float

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per localized example.

        ``index``: its number; ``memorized``: whether it is memorized; ``status``: see `Found`; ``units``: how many were
        switched off; ``sites``: their sites, in the order in which they were, joined by spaces.
        """
        return [
            {
                "index": row.example,
                "memorized": row.kind == "memorized",
                "status": row.status,
                "units": len(row.units),
                "sites": " ".join(site for site, _ in row.units),
            }
            for row in self.examples
        ]

    @property
    def memorization_share(self) -> float:
        """Share of memorization channels among all units, in ``[0, 1]``."""
        return sum(site.memorization for site in self.sites) / sum(site.units for site in self.sites)

    @property
    def kept_share(self) -> float:
        """Share of memorization channels among the units that an example keeps, as expected, in ``[0, 1]``."""
        memorization = sum(site.p_mem * site.memorization for site in self.sites)
        generalization = sum(site.units - site.memorization for site in self.sites)
        kept = memorization + generalization
        return memorization / kept if kept else 0.0


def localize_dataset(
    model: nn.Module,
    data: Data,
    *,
    memorized: Marks | None = None,
    true_labels: Any | None = None,
    test: Data | None = None,
    task: TaskName | Task = "classification",
    groups: object = None,
    sites: Sequence[str] | None = None,
    localized: int = 100,
    max_units: int = 50,
    edited: int = 20,
    seed: int = 0,
    batch_size: int = 512,
    num_workers: int = 0,
    parts: Parts | None = None,
) -> DatasetLocalization:
    """Search the units that flip memorized and clean training examples, and what switching them off does to others.

    Examples are drawn at random among those about which the model is right; only if there are too few, others follow,
    which end as ``already_wrong``. The population is a random set of other clean examples. Inputs without floating
    tensors, such as tokens, get no noise in the search.

    A model with example-tied dropout is searched as it was trained: each example with its own mask, at the sites that
    have a dropout, after it; the examples of the population likewise. Test examples, which have no mask, are not
    evaluated there.

    Several processes share the work, and all of them return the result of one: call it in each.

    Args:
        model: As for `localize`; left as it was.
        data: Training examples, see `memloc_ext.accuracy`; all inputs of one shape but for the batch.
        memorized: Which of them are memorized, see `memloc_ext.accuracy`.
        true_labels: Not read; every probe takes this and ``groups``, so that the same settings go to all.
        test: Test examples that edits are evaluated on.
        task: ``classification``, ``tokens``, or an object with ``loss`` and ``right``; see `memloc_ext.tasks`.
        groups: Not read; ``sites`` says where units are.
        sites: See `localize`.
        localized: Examples whose units are searched for, at least 1: so many memorized and so many clean ones.
        max_units: Largest number of units that are switched off for an example, at least 1.
        edited: Of these examples, how many of each kind have accuracy measured after each of their units, at least 0.
        seed: Names the draws and the noise of the search.
        batch_size: Examples at a time in an evaluation; does not change the result.
        num_workers: Processes that read a data set; a ``DataLoader`` has its own.
        parts: Keeps what is finished, every 50 searched examples and every evaluated edit, such as
            `memloc_ext.parts.PartFiles`; a call with the same arguments goes on from there.

    Raises:
        TypeError: If a number is not an int, or data can be iterated only once.
        ValueError: If an argument breaks the above, or the numbers of the examples cannot be known.
    """
    for name, value, least in (("localized", localized, 1), ("max_units", max_units, 1), ("edited", edited, 0)):
        if type(value) is not int:
            raise TypeError(f"localize_dataset: {name} must be int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"localize_dataset: {name} must be at least {least}, got {value}")
    generator, tied = torch.Generator().manual_seed(seed), example_tied_sites(model)
    sites = sites or list(tied) or None
    with dropout_mode(model, "train"):
        whole = Evaluation("localize_dataset", model, data, memorized, None, test, task, batch_size, num_workers)
        train, numbers = whole.train, whole.train.indices
        marked = torch.zeros_like(numbers, dtype=torch.bool) if whole.memorized is None else whole.memorized(numbers)
        right, marked, numbers = whole.right_by_row(model).cpu(), marked.cpu(), numbers.cpu()
        rows = {}
        for kind in KINDS:
            members = (marked if kind == "memorized" else ~marked).nonzero()[:, 0]
            members = members[torch.randperm(len(members), generator=generator)]
            rows[kind] = torch.cat([members[right[members]], members[~right[members]]])
        chosen = {kind: members[:localized] for kind, members in rows.items() if len(members)}
        if not chosen:
            raise ValueError("localize_dataset: data must hold at least one example, got none")
        others = rows["clean"][localized:]
        reference = _drawn(others if len(others) else rows["clean"], REFERENCE, generator)
        how = Settings(max_units=max_units, seed=seed, task=whole.task)
        search = search_in_chunks(model, train, chosen, reference, how, named=bool(tied), sites=sites, parts=parts)
        found_sites = [
            LocalizedSite(name, units, units - tied[name].num_generalization(units), tied[name].p_mem)
            if name in tied
            else LocalizedSite(name, units)
            for name, units, _ in search.sites
        ]
        evaluated = _sampled(model, whole, marked, EVALUATED, generator)
        dims, kinds = {name: dim for name, _, dim in search.sites}, {}
        for kind in chosen:
            results = [one for one in search.found if one.kind == kind]
            edits = [one.units for one in results if one.status != ALREADY_WRONG][:edited]
            after, curve = edited_accuracy(model, evaluated, edits, dims, parts) if edits else (None, [])
            fitted = int(right[rows[kind]].sum())
            kinds[kind] = _summary(results, found_sites, len(rows[kind]), fitted, after, curve)
    return DatasetLocalization(search.found, found_sites, kinds, search.seconds / len(search.found))


def _sampled(model: nn.Module, whole: Evaluation, marked: Tensor, limit: int, generator: torch.Generator) -> Evaluation:
    """Return an evaluation on at most so many clean, memorized and test examples, drawn at random."""
    rows = torch.cat([_drawn(kind.nonzero()[:, 0], limit, generator) for kind in (~marked, marked)])
    numbers, test = whole.train.indices[rows[marked[rows]].to(whole.train.indices.device)], None
    if whole.test is not None:
        test = whole.test.subset(_drawn(torch.arange(len(whole.test)), limit, generator))
    train = whole.train.subset(rows)
    return Evaluation("localize_dataset", model, train, numbers, None, test, whole.task, whole.batch_size)


def _drawn(rows: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:limit]]


def _summary(
    examples: Sequence[LocalizedExample],
    sites: Sequence[LocalizedSite],
    total: int,
    fitted: int,
    edited: EditedAccuracy | None,
    curve: list[EditedAccuracy],
) -> KindLocalization:
    numbers = [
        len(example.units) if example.status == FLIPPED else math.inf
        for example in examples
        if example.status != ALREADY_WRONG
    ]
    counts = Counter(len(example.units) for example in examples if example.status == FLIPPED)
    found = Counter(unit for example in examples for unit in example.units)
    statuses = Counter(example.status for example in examples)
    first = {site.name: site.units - site.memorization for site in sites}
    return KindLocalization(
        total=total,
        fitted=fitted,
        statuses={status: statuses[status] for status in STATUSES},
        mean=_finite(statistics.fmean(numbers)) if numbers else None,
        median=_finite(statistics.median(numbers)) if numbers else None,
        histogram=[counts[number] for number in range(max(counts, default=-1) + 1)],
        sites={site.name: sum(n for (name, _), n in found.items() if name == site.name) for site in sites},
        memorization=sum(n for (name, unit), n in found.items() if unit >= first[name]),
        edited=edited,
        curve=curve,
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
