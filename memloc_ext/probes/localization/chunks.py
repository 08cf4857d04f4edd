"""The search for the units of many examples, in chunks that several processes share."""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from memloc_ext._version import __version__
from memloc_ext.ablation.signature import tensors_of
from memloc_ext.examples import Examples
from memloc_ext.files import parsed
from memloc_ext.nn import example_ids
from memloc_ext.parts import Parts, fingerprint, spread_parts
from memloc_ext.probes.localization.result import STATUSES
from memloc_ext.probes.localization.search import Searches
from memloc_ext.probes.localization.settings import Settings
from memloc_ext.tasks import Task

CHUNK = 50
"""Examples of a chunk: fixed, since the rounding of a search may depend on which others are in the batch."""


@dataclass(frozen=True)
class FoundUnits:
    """What the search found for an example.

    Attributes:
        status: See `Found`.
        units: ``(site, unit)`` in the order in which they were switched off.
        loss: Of the example with all of them off.
    """

    status: str
    units: list[tuple[str, int]]
    loss: float


@dataclass(frozen=True)
class ChunkedSearch:
    """What was found for several lists of examples.

    Attributes:
        found: Per list, in the order of its examples.
        sites: Site to its number of units, in the order in which the network computes them.
        channel_dims: Site to the dimension of its units.
        seconds: Time of all searches together, in whatever process and run.
    """

    found: list[list[FoundUnits]]
    sites: dict[str, int]
    channel_dims: dict[str, int]
    seconds: float


def search_in_chunks(
    model: nn.Module,
    data: Examples,
    lists: Sequence[Tensor],
    reference: Tensor,
    *,
    named: bool,
    sites: Sequence[str] | None,
    task: Task,
    max_units: int,
    seed: int,
    parts: Parts | None,
) -> ChunkedSearch:
    """Do what `localize` does for chunks of examples, whose results depend on neither each other nor the processes.

    Args:
        model: As for `localize`.
        data: Holds all examples, on the device of ``model``.
        lists: Examples to search the units of, as rows of the data, ``[*]`` each; at least one example.
        reference: Those that stand for the population, ``[*]``; none for no population.
        named: Whether the model is told the examples' numbers, for example-tied dropout.
        sites: See `localize`.
        task: See `localize`.
        max_units: See `localize`.
        seed: See `localize`.
        parts: Where the results of the chunks are kept; None keeps none.
    """
    chunks = [(number, rows) for number, all_rows in enumerate(lists) for rows in all_rows.split(CHUNK) if len(rows)]
    population = tuple(data.batch(reference))[: 3 if named else 2] if len(reference) else None
    first = data.batch(chunks[0][1])  # the same in every process
    settings = Settings(
        max_units=max_units, population=None if population is None else "first_order", seed=seed, task=task
    )
    if not any(t.is_floating_point() for t in tensors_of(first.x)):
        settings.noise, settings.eot = 0, 1
    settings.check(first.x, first.y, population)
    searches = Searches(model, settings, population, sites)

    def search(rows: Tensor) -> dict[str, object]:
        x, y, ids = data.batch(rows)
        start = time.perf_counter()
        with example_ids(ids) if named else contextlib.nullcontext():
            result = searches.run(x, y)
        return {
            "found": [[found.status, found.units, found.losses[-1]] for found in result],
            "sites": [[name, units, result.channel_dims[name]] for name, units in result.sites.items()],
            "seconds": time.perf_counter() - start,
        }

    how = (named, sites, max_units, seed, repr(task) if is_dataclass(task) else type(task).__qualname__)
    common = fingerprint(__version__, model.state_dict(), population, how)
    names = [f"search_{place:04d}_{fingerprint(common, data.batch(rows))}" for place, (_, rows) in enumerate(chunks)]
    results = spread_parts(search, dict(zip(names, (rows for _, rows in chunks), strict=True)), parts, _chunk)
    found: list[list[FoundUnits]] = [[] for _ in lists]
    for name, (number, rows), result in zip(names, chunks, results, strict=True):
        if len(result.found[0]) != len(rows) or result.sites != results[0].sites:
            raise ValueError(f"{name}.json: must be of {len(rows)} examples, at the sites of the others; delete it")
        found[number] += result.found[0]
    return replace(results[0], found=found, seconds=sum(result.seconds for result in results))


def _chunk(stored: Any) -> ChunkedSearch:
    found = [
        FoundUnits(
            parsed(str, status), [(parsed(str, site), parsed(int, unit)) for site, unit in units], parsed(float, loss)
        )
        for status, units, loss in stored["found"]
    ]
    sizes = {parsed(str, name): parsed(int, units) for name, units, _ in stored["sites"]}
    dims = {name: operator.index(dim) for name, _, dim in stored["sites"]}
    for example in found:
        if example.status not in STATUSES or any(unit >= sizes[site] for site, unit in example.units):
            raise ValueError(f"got {example}")
    return ChunkedSearch([found], sizes, dims, parsed(float, stored["seconds"]))
