"""The few units of a network that flip an example's prediction when they are switched off."""

from memloc_ext.analysis.localization.result import Found, Localization
from memloc_ext.analysis.localization.search import localize

__all__ = ["Found", "Localization", "localize"]
