"""The few units of a network that flip an example's prediction when they are switched off."""

from memloc_ext.probes.localization.dataset import DatasetLocalization, localize_dataset
from memloc_ext.probes.localization.result import Found, Localization
from memloc_ext.probes.localization.search import localize

__all__ = ["DatasetLocalization", "Found", "Localization", "localize", "localize_dataset"]
