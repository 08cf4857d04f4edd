"""Operators: each is also ``torch.ops.memloc_ext.<name>``, on the CPU and on CUDA."""

from memloc_ext import _libraries as _libraries
from memloc_ext.ops.example_tied_dropout import example_tied_dropout

__all__ = ["example_tied_dropout"]
