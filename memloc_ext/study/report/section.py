"""What a report is made of: a section per question, with its answer and its pictures, and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Number:
    """A number that answers a question.

    Attributes:
        what: What it is the number of.
        value: A share if ``unit`` is ``%``; None where there is none.
        unit: ``%``, or empty for a plain number.
        paper: What the paper reports, as text; empty if nothing.
    """

    what: str
    value: float | None
    unit: str = "%"
    paper: str = ""

    def text(self, value: float | None) -> str:
        """Return a value of its kind for a reader."""
        if value is None:
            return "-"
        return f"{percent(value)} %" if self.unit == "%" else f"{value:.3g}"


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file without the ending, what it shows in a few words, and how to read it."""

    name: str
    title: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Table:
    """A table with a title; a cell may be the address of a picture, see `memloc_ext.study.audited`."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Return it for a terminal, without pictures."""
        cells = [self.heads, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.heads))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
        return "\n".join([*([self.title] if self.title else []), lines[0], "-" * len(lines[0]), *lines[1:]])


@dataclass(frozen=True)
class Section:
    """One probe or method in a report.

    Attributes:
        name: For links in the page.
        title: The question.
        method: How it was answered, in two or three sentences.
        answers: Sentences with their numbers.
        pictures: Figures, in the order of the page.
        tables: After the figures.
        notes: What was done exactly, and what it cost.
    """

    name: str
    title: str
    method: str
    answers: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def percent(value: float | None) -> str:
    """Return a share as a percentage, or a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"
