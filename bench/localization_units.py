"""How many units it takes to flip noisy and clean examples: ``python -m bench.localization_units``, mean and spread.

    MEMLOC_DATA=<folder> python -m bench.localization_units --seeds 3 --result bench/results/localization_units.json

A seed names the label noise, the initial weights, the order of the training examples and which of them are searched.
MNIST is left out where its files are missing.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.trained import MNIST_EXAMPLES, REFERENCE, STUDIES, Trained, mnist_folder, trained
from memloc_ext import localize
from memloc_ext.files import plain, write_json
from memloc_ext.info import info
from memloc_ext.probes.localization import Found


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run and where to put it."""

    seeds: int = 3
    """Seeds 0 .. seeds - 1."""
    examples: int = 100
    """Noisy examples, and as many clean ones, that are searched per seed."""
    result: Path | None = None
    """JSON file of the numbers."""


def search(network: Trained, examples: int) -> dict[str, dict[str, Any]]:
    """Search noisy and clean examples of one network."""
    found = {}
    reference = network.of(network.reference())
    for kind, rows in (("noisy", network.noisy(examples)), ("clean", network.clean(examples))):
        results = localize(network.model, *network.of(rows), reference=reference)
        found[kind] = summary(results)
    return found


def summary(results: Sequence[Found]) -> dict[str, Any]:
    """Return the numbers of one group of examples of one seed; a search that was capped counts with its cap."""
    units = [len(result.units) for result in results]
    sites = Counter(site for result in results for site, _ in result.units)
    return {
        "examples": len(units),
        "mean_units": round(statistics.mean(units), 3),
        "deviation_units": round(statistics.pstdev(units), 3),
        "median_units": statistics.median(units),
        "status": dict(Counter(result.status for result in results)),
        "units_by_site": dict(sorted(sites.items())),
    }


def main() -> None:
    """Train and search every seed, print and write mean and standard deviation over seeds, and every seed's numbers."""
    options = tyro.cli(Options)
    table = []
    for name, study in STUDIES.items():
        if name == "mnist" and mnist_folder() is None:
            print("mnist: left out, no files in the folder that MEMLOC_DATA names")
            continue
        runs = [{"seed": seed, **search(trained(study(seed)), options.examples)} for seed in range(options.seeds)]
        row: dict[str, Any] = {"dataset": name}
        for kind in ("noisy", "clean"):
            means = [run[kind]["mean_units"] for run in runs]
            row[kind] = {"mean": round(statistics.mean(means), 3), "deviation": round(statistics.pstdev(means), 3)}
            print(f"{name:7} {kind}  {row[kind]['mean']:5.2f} units, deviation over seeds {row[kind]['deviation']:.2f}")
        config = plain(study(0))
        config["data"].pop("root")
        table.append({**row, "config": config, "runs": runs})
    if options.result:
        result = {
            "command": " ".join(["python -m bench.localization_units", *sys.argv[1:]]),
            "seeds": list(range(options.seeds)),
            "mnist_training_examples": MNIST_EXAMPLES,
            "reference_examples": REFERENCE,
            "threads": torch.get_num_threads(),
            "info": info().splitlines(),
            "table": table,
        }
        write_json(options.result, result)


if __name__ == "__main__":
    main()
