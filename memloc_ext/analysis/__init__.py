"""The paper's methods: each takes a model and data and returns a typed result."""

from memloc_ext.analysis.accuracy import Accuracy, accuracy, accuracy_by_mode

__all__ = ["Accuracy", "accuracy", "accuracy_by_mode"]
