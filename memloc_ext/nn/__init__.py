"""Modules: thin shells over `memloc_ext.ops`, and ways to put them into a model."""

from memloc_ext.nn.example_ids import current_example_ids, example_ids
from memloc_ext.nn.example_tied_dropout import (
    MODES,
    RESCALES,
    ExampleTiedDropout,
    FixedDropout,
    dropout_mode,
    set_dropout_mode,
)
from memloc_ext.nn.insert import insert_after, insert_example_tied_dropout
from memloc_ext.nn.without_memorization import without_memorization

__all__ = [
    "MODES",
    "RESCALES",
    "ExampleTiedDropout",
    "FixedDropout",
    "current_example_ids",
    "dropout_mode",
    "example_ids",
    "insert_after",
    "insert_example_tied_dropout",
    "set_dropout_mode",
    "without_memorization",
]
