"""The report of a run: a table for the terminal, and one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from memloc_ext import accounting_figures, figures, localization_answers, localization_figures
from memloc_ext._version import __version__
from memloc_ext.accounting_files import Accounting
from memloc_ext.figures import percent
from memloc_ext.files import write_atomically
from memloc_ext.study.run_directory import AS_TRAINED, FIGURES, REPORT, Run
from memloc_ext.study.stages import flat

_COLUMNS = {"clean": "clean", "noisy": "noisy", "noisy_true": "noisy -> true", "test": "test"}


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a run as text: a row per model and mode, accuracy in percent."""
    cells = [["accuracy (%)", *_COLUMNS.values()]]
    cells += [[figures.row_name(row), *(percent(row[column]) for column in _COLUMNS)] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def answers(run: Run) -> list[str]:
    """Return what the run says, in sentences with its numbers."""
    rows = {(row["model"], row["mode"]): row for row in run.metrics}
    sentences = []
    plain = rows.get(("plain", AS_TRAINED))
    if plain and plain["noisy"] is not None:
        sentences.append(
            f"Plain training memorizes: it gives {percent(plain['noisy'])} % of the memorized examples the label they "
            f"were given, and {percent(plain['noisy_true'])} % their true one."
        )
    own, drop = rows.get(("example_tied", "train")), rows.get(("example_tied", "drop"))
    if own and drop and own["noisy"] is not None:
        sentences.append(
            "Example-tied dropout puts that into channels known beforehand: switching them off takes accuracy on the "
            f"memorized examples from {percent(own['noisy'])} % to {percent(drop['noisy'])} %, and clean training "
            f"examples from {percent(own['clean'])} % to {percent(drop['clean'])} %."
        )
        sentences.append(
            f"Without those channels, {percent(drop['noisy_true'])} % of the memorized examples get their true label, "
            f"and {percent(drop['test'])} % of the test examples are right"
            + (f" ({percent(plain['test'])} % after plain training)." if plain else ".")
        )
    if run.accounting:
        sentences += _accounting_answers(run.accounting)
    return sentences + localization_answers.answers(run.localizations)


def cost(run: Run) -> list[str]:
    """Return what the gradient accounting of a run cost, in a sentence; none without one."""
    if run.accounting is None:
        return []
    times = run.accounting.cost
    return [
        f"Gradient accounting: an epoch with it takes {times['ratio']:.2f}x the time of plain training, a step "
        f"{times['step_ratio']:.2f}x ({1000 * times['accounted_step']:.1f} and {1000 * times['plain_step']:.1f} ms, "
        f"medians of {times['pairs']} pairs in turn)."
    ]


def _accounting_answers(accounting: Accounting) -> list[str]:
    noisy, clean, auc = (accounting.column(name) for name in ("noisy", "clean", "auc"))
    if not any(noisy):
        return []
    peak = noisy.index(max(noisy))
    memorized = accounting.epoch(accounting.epochs[peak]).memorized
    cosines = accounting.column("cosine")
    sentences = [
        f"The memorized examples, {percent(memorized.double().mean().item())} % of the data, make "
        f"{percent(noisy[peak] / (clean[peak] + noisy[peak]))} % of the gradient norm in epoch "
        f"{accounting.epochs[peak]}, where theirs is largest. The gradients of the two kinds have a mean cosine of "
        f"{sum(cosines) / len(cosines):.2f} over all epochs."
    ]
    told = [value for value in auc if value is not None]
    if told:
        sentences.append(
            "The norm of an example's own gradient tells memorized from clean examples: the area under the ROC curve "
            f"is {max(told):.3f} in epoch {accounting.epochs[auc.index(max(told))]}, the best."
        )
    return sentences


def write_report(run: Run) -> Path:
    """Write the figures of a run and its report into its directory.

    Args:
        run: A finished run.

    Returns:
        The path of the report, an HTML page that needs no other file.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("reports need jinja2; run: pip install 'memloc_ext[study]'") from error
    figure = {"accuracy": figures.accuracy_bars(run.metrics), "curves": figures.accuracy_curves(run.histories)}
    if run.accounting:
        figure |= accounting_figures.all_figures(run.accounting)
    figure |= localization_figures.all_figures(run.localizations)
    drawn = {name: figures.png(picture) for name, picture in figure.items()}
    folder = run.path / FIGURES
    folder.mkdir(exist_ok=True)
    for name, picture in drawn.items():
        write_atomically(folder / f"{name}.png", picture)
    template = resources.files("memloc_ext").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        .from_string(template)
        .render(
            version=__version__,
            config=run.config,
            answers=answers(run),
            cost=cost(run),
            localization=localization_answers.notes(run.localizations),
            columns=figures.COLUMNS,
            rows=[(figures.row_name(row), [percent(row[column]) for column in figures.COLUMNS]) for row in run.metrics],
            settings=flat(run.config),
            pictures={name: base64.b64encode(picture).decode() for name, picture in drawn.items()},
        )
    )
    path = run.path / REPORT
    write_atomically(path, page.encode())
    return path
