"""What a run found, for a reader: a table in the terminal, figures, and one self-contained page."""

from memloc_ext.study.report.page import draw, write_report, write_seeds_report
from memloc_ext.study.report.sections import summary, text_table

__all__ = ["draw", "summary", "text_table", "write_report", "write_seeds_report"]
