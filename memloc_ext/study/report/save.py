"""The figures of a report as files of their own, in any format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memloc_ext.files import write_atomically
from memloc_ext.study.report.figures import encoded
from memloc_ext.study.report.sections import sections
from memloc_ext.study.run import FIGURES, load_run


def save_figures(
    run: str | Path, section: str, output: str | Path | None = None, file_format: str = "png"
) -> list[Path]:
    """Draw the figures of a section of a run's report.

    Args:
        run: A run directory.
        section: Name of the `Section`, such as ``rewinding``.
        output: Folder of the files; created if missing; by default that of the report's figures.
        file_format: ``png``, ``pdf``, ``svg`` or another that matplotlib knows.

    Returns:
        The paths of the files.

    Raises:
        ValueError: If the run has no such section.
        FileNotFoundError: If there is no run.
    """
    found = {part.name: part for part in sections(load_run(run))}
    if section not in found:
        raise ValueError(f"{run} has no {section}; there is {', '.join(found)}")
    folder = Path(run, FIGURES) if output is None else Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in found[section].pictures:
        paths.append(folder / f"{picture.name}.{file_format}")
        write_atomically(paths[-1], encoded(picture.figure, file_format))
    return paths


def draw(section: str) -> None:
    """Draw the figures of a section, of the run that the command line of ``scripts/figure_<section>.py`` names."""
    parser = argparse.ArgumentParser(description=f"Draw the figures of {section} of a run.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
    parser.add_argument("--format", default="png", help="png, pdf or svg")
    options = parser.parse_args()
    try:
        print(*save_figures(options.run, section, options.output, options.format), sep="\n")
    except (ValueError, OSError) as error:
        sys.exit(str(error))
