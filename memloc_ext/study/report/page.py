"""The report of a run, or of the same run with several seeds: one HTML page that needs no other file."""

from __future__ import annotations

import argparse
import base64
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from memloc_ext._version import __version__
from memloc_ext.files import plain, write_atomically, write_json
from memloc_ext.study.audited import PICTURE
from memloc_ext.study.config import StudyConfig
from memloc_ext.study.report.figures import COLUMNS, encoded, row_name
from memloc_ext.study.report.section import Number, Section
from memloc_ext.study.report.sections import numbers, sections
from memloc_ext.study.results import METRICS, save
from memloc_ext.study.run import FIGURES, NUMBERS, REPORT, SEEDS, Run, load_run
from memloc_ext.study.stages import STAGES

_HERE = ("data.download", "device")
"""Settings that say nothing about what comes out."""
T = TypeVar("T")


def write_report(run: Run) -> Path:
    """Write the figures of a run with at least one finished training, and its report, into its folder.

    Returns:
        The path of the report.

    Raises:
        ImportError: If jinja2 or matplotlib is not installed.
    """
    page = _write(run.path, [run])
    run.seal()
    return page


def write_seeds_report(path: str | Path, runs: Sequence[Run]) -> Path:
    """Write what runs that differ in the seed alone have in common: means, spread, and the figures of each.

    Args:
        path: Folder of the report; created if missing. The tables ``numbers`` and ``metrics`` stand beside it.
        runs: Finished, with the same stages.

    Returns:
        The path of the report.

    Raises:
        ImportError: If jinja2 or matplotlib is not installed.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / SEEDS, [run.path.name for run in runs])
    rows = [{"seed": run.config.train.seed, **row} for run in runs for row in run.metrics]
    save(path, METRICS, rows, rows)
    return _write(path, runs)


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


def spread(values: Sequence[Number | None]) -> str:
    """Return mean and standard deviation (of the sample, n - 1) of a number over the runs that have it, for a reader.

    Of a single run it is the number.
    """
    mean, deviation, _ = _moments(values)
    text = _first(values).text
    if mean is None or len(values) == 1:
        return text(mean)
    return f"{text(mean).removesuffix(' %')} ± {text(deviation or 0.0)}"


def _moments(values: Sequence[Number | None]) -> tuple[float | None, float | None, int]:
    """Return mean, standard deviation and count of the runs that have a number; None where there are too few."""
    present = [number.value for number in values if number is not None and number.value is not None]
    mean = statistics.fmean(present) if present else None
    return mean, statistics.stdev(present) if len(present) > 1 else None, len(present)


def _first(values: Sequence[Number | None]) -> Number:
    return next(number for number in values if number is not None)


def _aligned(tables: Sequence[Mapping[str, T]]) -> dict[str, list[T | None]]:
    """Return what each of some tables has under every name; None where it has not."""
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: [table.get(name) for table in tables] for name in names}


def command(runs: Sequence[Run]) -> str:
    """Return the command that does runs again, with the settings that differ from the default ones."""
    default, words = _flat(plain(StudyConfig())), ["memloc run"]
    if set(runs[0].seconds) != set(STAGES):
        words.append(f"--only {' '.join(runs[0].seconds)}")
    for name, value in _flat(plain(runs[0].config)).items():
        if value != default.get(name) and name not in _HERE:
            option = "--" + name.rsplit(".", 1)[-1].replace("_", "-")
            if isinstance(value, bool):
                words.append(option if value else f"--no-{option[2:]}")
            else:
                words.append(f"{option} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join([*words, *([f"--seeds {len(runs)}"] if len(runs) > 1 else [])])


def _drawn(run: Run) -> list[tuple[Section, dict[str, str]]]:
    """Draw the sections of a run, write its figures into its directory, return each with its pictures as base64."""
    folder, parts = run.path / FIGURES, []
    shutil.rmtree(folder, ignore_errors=True)  # there may be some of other settings
    folder.mkdir()
    for section in sections(run):
        pictures = {picture.name: encoded(picture.figure) for picture in section.pictures}
        for name, picture in pictures.items():
            write_atomically(folder / f"{name}.png", picture)
        parts.append((section, {name: base64.b64encode(picture).decode() for name, picture in pictures.items()}))
    return parts


def _write(path: Path, runs: Sequence[Run]) -> Path:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("reports need jinja2; run: pip install 'memloc_ext[study]'") from error
    seeds, config = [run.config.train.seed for run in runs], runs[0].config
    every = _aligned([{number.what: number for number in numbers(run)} for run in runs])
    several, rows, table, compared = len(runs) > 1, [], [], []
    heads = ["mean ± standard deviation", *(f"seed {seed}" for seed in seeds)] if several else ["here"]
    parts = [(f"Seed {run.config.train.seed}" if several else None, _drawn(run)) for run in runs]
    for what, found in every.items():
        first, (mean, deviation, count) = _first(found), _moments(found)
        moments = {"mean": mean, "deviation": deviation, "runs": count}
        rows.append({"what": what, **moments, "unit": "share" if first.unit == "%" else "", "paper": first.paper})
        cells = [spread(found), *("-" if number is None else first.text(number.value) for number in found)]
        compared.append((what, cells[: len(heads)], first.paper))
    for name, lines in _aligned([{row_name(row): row for row in run.metrics} for run in runs]).items():
        shares = [[None if row is None else Number("", row[column]) for row in lines] for column in COLUMNS]
        table.append((name, [spread(values).replace(" %", "") for values in shares]))
    save(path, NUMBERS, rows, rows)
    template = resources.files("memloc_ext.study.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(template).render(
        version=__version__,
        config=config,
        seeds=seeds,
        parts=parts,
        numbers=compared,
        heads=heads,
        table=table,
        columns=COLUMNS,
        settings=_flat(plain(config)),
        seconds={stage: sum(run.seconds.get(stage, 0.0) for run in runs) for stage in runs[0].seconds},
        command=command(runs),
        PICTURE=PICTURE,
    )
    write_atomically(path / REPORT, page.encode())
    return path / REPORT


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dictionary with dotted names."""
    if not isinstance(config, Mapping):
        return {prefix.removesuffix("."): config}
    return {name: value for key, inner in config.items() for name, value in _flat(inner, f"{prefix}{key}.").items()}
