"""Figures: accuracy with one layer group back at an earlier epoch.

    python scripts/figure_rewinding.py runs/run-digits-resnet9-seed0 --output figures --format pdf

The run is a directory that ``memloc run`` wrote; the figures are those of its report.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from memloc_ext.report import save_figures


def main(run: Annotated[Path, tyro.conf.Positional], output: Path = Path("figures"), format: str = "png") -> None:
    """Draw the figures of a run.

    Args:
        run: Run directory.
        output: Folder of the figures.
        format: png, pdf or svg.
    """
    try:
        print(*save_figures(run, "rewinding", output, format), sep="\n")
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    tyro.cli(main)
