"""Table: the numbers of a study beside the paper's, with mean and spread over its seeds, as one JSON file.

    python scripts/table_numbers.py runs/digits-resnet9-seed0-2 --result bench/results/study_digits.json

The run is a folder that ``memloc run`` wrote, with or without ``--seeds``.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from memloc_ext.files import read_json, write_json
from memloc_ext.info import info
from memloc_ext.study import Run, StudyConfig
from memloc_ext.study.report.page import command
from memloc_ext.study.run import NUMBERS, load_runs


def portable(config: StudyConfig) -> StudyConfig:
    """Return the settings of a run without the folders of the machine that it was made on."""
    kind, colon, folder = config.data.dataset.partition(":")
    return replace(config, data=replace(config.data, dataset=kind + colon + Path(folder).name, root=Path("data")))


def layers(run: Run) -> dict[str, Any]:
    """Return what the layer probes found: accuracies with one layer group rewound or trained again."""
    found: dict[str, Any] = {}
    if run.rewinding:
        found["rewinding, memorized accuracy per epoch"] = {
            group: {cell.epoch: cell.with_buffers.memorized for cell in result.epochs}
            for group, result in run.rewinding.groups.items()
        }
    if run.retraining:
        found["retraining, last epoch"] = {
            group: {"epoch": result.epochs[-1].epoch, **asdict(result.epochs[-1].accuracy)}
            for group, result in run.retraining.groups.items()
        }
    return found


def main(run: Annotated[Path, tyro.conf.Positional], result: Path) -> None:
    """Gather the numbers of a study.

    Args:
        run: Run directory.
        result: JSON file to write.
    """
    try:
        runs = load_runs(run)
        values = {
            "command": command([replace(one, config=portable(one.config)) for one in runs]),
            "info": info().splitlines(),
            "numbers": read_json(run / f"{NUMBERS}.json"),
            "seconds": {stage: round(sum(one.seconds[stage] for one in runs), 1) for stage in runs[0].seconds},
            "metrics": {one.config.train.seed: one.metrics for one in runs},
            "layers": {one.config.train.seed: layers(one) for one in runs},
        }
        write_json(result, values)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    tyro.cli(main)
