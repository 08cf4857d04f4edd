"""The search for the units of many examples, in chunks that several processes share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from memloc_ext._version import __version__
from memloc_ext.batches import tensors_of
from memloc_ext.examples import Examples
from memloc_ext.files import parsed
from memloc_ext.nn import example_ids
from memloc_ext.parts import Parts, fingerprint, spread_parts
from memloc_ext.probes.localization.result import STATUSES
from memloc_ext.probes.localization.search import Searches
from memloc_ext.probes.localization.settings import Settings
from memloc_ext.tasks import identity

CHUNK = 50
"""Examples of a chunk: fixed, since the rounding of a search may depend on which others are in the batch."""


@dataclass(frozen=True)
class LocalizedExample:
    """What was found for an example.

    Attributes:
        example: Its number in the data set.
        kind: ``memorized`` for a memorized example, or ``clean``.
        status: See `Found`.
        units: ``(site, unit)`` in the order in which they were switched off.
        loss: Its loss with all of them off.
    """

    example: int
    kind: str
    status: str
    units: list[tuple[str, int]]
    loss: float


@dataclass(frozen=True)
class ChunkedSearch:
    """What was found.

    Attributes:
        found: Per example; of one chunk with their rows in the place of their numbers.
        sites: Name, number of units and the dimension that holds them, in the order in which the network computes them.
        seconds: Time of all searches together, in whatever process and run.
    """

    found: list[LocalizedExample]
    sites: list[tuple[str, int, int]]
    seconds: float


def search_in_chunks(
    model: nn.Module,
    data: Examples,
    chosen: Mapping[str, Tensor],
    reference: Tensor,
    settings: Settings,
    *,
    named: bool,
    sites: Sequence[str] | None,
    parts: Parts | None,
) -> ChunkedSearch:
    """Do what `localize` does for chunks of examples, whose results depend on neither each other nor the processes.

    ``data`` holds all examples, on the model's device. ``chosen`` maps kinds to the rows of those to search, ``[*]``,
    at least one; ``reference`` are the rows of those that stand for the population, ``[*]``, none for no population.
    ``named``: whether the model is told the examples' numbers, for example-tied dropout. ``parts`` keep the results.
    """
    chunks = [(kind, rows) for kind, every in chosen.items() for rows in every.split(CHUNK) if len(rows)]
    population = tuple(data.batch(reference))[: 3 if named else 2] if len(reference) else None
    first = data.batch(chunks[0][1])  # the same in every process
    settings.population = None if population is None else "first_order"
    if not any(t.is_floating_point() for t in tensors_of(first.x)):
        settings.noise, settings.eot = 0, 1
    settings.check(first.x, first.y, population)
    searches = Searches(model, settings, population, sites)

    def search(chunk: tuple[str, Tensor]) -> dict[str, Any]:
        kind, rows = chunk
        x, y, ids = data.batch(rows)
        start = time.perf_counter()
        with example_ids(ids) if named else contextlib.nullcontext():
            result = searches.run(x, y)
        found = [
            LocalizedExample(row, kind, one.status, one.units, one.losses[-1])
            for row, one in zip(rows.tolist(), result, strict=True)
        ]
        sizes = [(name, units, result.channel_dims[name]) for name, units in result.sites.items()]
        return asdict(ChunkedSearch(found, sizes, time.perf_counter() - start))

    how = (named, sites, settings.max_units, settings.seed, identity(settings.task))
    common = fingerprint(__version__, model.state_dict(), population, how)
    work = {
        f"search_{place:04d}_{fingerprint(common, kind, data.batch(rows))}": (kind, rows)
        for place, (kind, rows) in enumerate(chunks)
    }
    results, found, numbers = spread_parts(search, work, parts, _chunk), [], data.indices.tolist()
    for (name, (_, rows)), result in zip(work.items(), results, strict=True):
        if [one.example for one in result.found] != rows.tolist() or result.sites != results[0].sites:
            raise ValueError(f"{name}.json: must be of {len(rows)} examples, at the sites of the others; delete it")
        found += [replace(one, example=numbers[one.example]) for one in result.found]
    return ChunkedSearch(found, results[0].sites, sum(result.seconds for result in results))


def _chunk(stored: Any) -> ChunkedSearch:
    chunk = parsed(ChunkedSearch, stored)
    sizes = {name: units for name, units, _ in chunk.sites}
    for one in chunk.found:
        if one.status not in STATUSES or any(unit >= sizes[site] for site, unit in one.units):
            raise ValueError(f"got {one}")
    return chunk
