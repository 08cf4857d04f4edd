"""Benchmarks: ``python -m bench`` runs those of the CPU, ``python -m bench.gpu`` those of a GPU."""
