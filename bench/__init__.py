"""Benchmarks: ``python -m bench`` runs those of the CPU, ``python bench/gpu.py`` those of a GPU."""

import re


def slug(name: str) -> str:
    """Return the name of a processor or a GPU as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
