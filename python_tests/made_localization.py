"""A localization made up for tests of what is done with one."""

from typing import Any

from memloc_ext.probes.localization.dataset import (
    STATUSES,
    DatasetLocalization,
    KindLocalization,
    LocalizedExample,
    LocalizedSite,
)
from memloc_ext.probes.localization.edited_accuracy import EditedAccuracy


def make_kind(kind: str = "memorized", **change: Any) -> KindLocalization:
    """Three examples: flipped after one and after three units, capped after four."""
    after = EditedAccuracy(8 / 3, 3, 0.9, 0.5, 0.8)
    curve = [EditedAccuracy(float(k), 3 - k // 2, 1 - 0.02 * k, 1 - 0.1 * k, 0.9) for k in range(5)]
    values = {
        "total": 10,
        "fitted": 9,
        "statuses": {**dict.fromkeys(STATUSES, 0), "flipped": 2, "capped": 1},
        "mean": None,
        "median": 3.0,
        "histogram": [0, 1, 0, 1],
        "sites": {"conv1": 2, "blocks.0:heads": 6},
        "memorization": 5 if kind == "memorized" else 1,
        "edited": after,
        "curve": curve,
    }
    return KindLocalization(**{**values, **change})


def make_localization(kinds: tuple[str, ...] = ("memorized", "clean"), **change: Any) -> DatasetLocalization:
    """Three examples of each kind, two sites; one with memorization channels."""
    units = [("conv1", 3), *(("blocks.0:heads", unit) for unit in (5, 0, 7))]
    ends = (("flipped", 1), ("flipped", 3), ("capped", 4))
    examples = [
        LocalizedExample(7 * place + number, kind, status, units[:count], 0.5 * count)
        for place, kind in enumerate(kinds)
        for number, (status, count) in enumerate(ends)
    ]
    sites = [LocalizedSite("conv1", 6), LocalizedSite("blocks.0:heads", 8, memorization=6, p_mem=0.5)]
    return DatasetLocalization(examples, sites, {kind: make_kind(kind, **change) for kind in kinds}, 0.25)


NOTHING = {
    "statuses": {**dict.fromkeys(STATUSES, 0), "already_wrong": 3},
    "mean": None,
    "median": None,
    "histogram": [],
    "sites": {"conv1": 0, "blocks.0:heads": 0},
    "memorization": 0,
    "edited": None,
    "curve": [],
}
"""Of a kind whose examples were all wrong already."""
