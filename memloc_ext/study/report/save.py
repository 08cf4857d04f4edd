"""The figures of a report as files of their own, in any format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memloc_ext.files import write_atomically
from memloc_ext.study.report.figures import encoded
from memloc_ext.study.report.sections import sections
from memloc_ext.study.run import load_run


def draw(section: str) -> None:
    """Draw the figures of a section, of the run that the command line of ``scripts/figure_<section>.py`` names."""
    parser = argparse.ArgumentParser(description=f"Draw the figures of {section} of a run.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
    parser.add_argument("--format", default="png", help="png, pdf or svg")
    options = parser.parse_args()
    try:
        found = {part.name: part for part in sections(load_run(options.run))}
        if section not in found:
            raise ValueError(f"{options.run} has no {section}; there is {', '.join(found)}")
        options.output.mkdir(parents=True, exist_ok=True)
        for picture in found[section].pictures:
            path = options.output / f"{picture.name}.{options.format}"
            write_atomically(path, encoded(picture.figure, options.format))
            print(path)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
