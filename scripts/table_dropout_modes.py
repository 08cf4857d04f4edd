"""Table: accuracy per model and dropout mode, mean and spread over seeds.

    python scripts/table_dropout_modes.py --seeds 3 --result bench/results/dropout_modes_digits.json

Every other option is one of ``memloc run``.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import tyro

from memloc_ext.files import plain, write_json
from memloc_ext.info import info
from memloc_ext.study import StageName, StudyConfig, run_study
from memloc_ext.study.report import text_table
from memloc_ext.study.report.figures import COLUMNS

STAGES: tuple[StageName, ...] = ("train", "dropout", "controls")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run and where to put it."""

    study: StudyConfig = dataclasses.field(default_factory=StudyConfig)
    seeds: int = 3
    """Seeds 0 .. seeds - 1."""
    runs: Path = Path("runs/seeds")
    """Folder of the runs, one per seed."""
    result: Path | None = None
    """JSON file of the table."""


def spread(rows: list[dict[str, Any]], reduce: Any) -> dict[str, float | None]:
    """Reduce each share over the same row of several runs."""
    values = {name: [row[name] for row in rows if row[name] is not None] for name in COLUMNS}
    return {name: reduce(shares) if shares else None for name, shares in values.items()}


def main() -> None:
    """Run every seed, print the mean, write mean, standard deviation and single values."""
    options = tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,))
    tables = []
    for seed in range(options.seeds):
        config = dataclasses.replace(options.study, train=dataclasses.replace(options.study.train, seed=seed))
        tables.append(run_study(config, options.runs / f"seed{seed}", store=options.runs, stages=STAGES).metrics)
    table = []
    for rows in zip(*tables, strict=True):
        names = {"model": rows[0]["model"], "mode": rows[0]["mode"]}
        mean, deviation = spread(list(rows), statistics.mean), spread(list(rows), statistics.pstdev)
        table.append(
            {**names, "mean": mean, "deviation": deviation, "runs": [{k: r[k] for k in COLUMNS} for r in rows]}
        )
    print(text_table([{**row, **row["mean"]} for row in table]))
    if options.result:
        result = {
            "command": " ".join(["python", *sys.argv]),
            "config": plain(options.study),
            "info": info().splitlines(),
            "table": table,
        }
        write_json(options.result, result)


if __name__ == "__main__":
    main()
