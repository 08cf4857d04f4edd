"""Load the compiled libraries: importing them registers ``torch.ops.memloc_ext.*``."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import torch


def _load(name: str) -> bool:
    if importlib.util.find_spec(f"memloc_ext.{name}") is None:
        return False
    importlib.import_module(f"memloc_ext.{name}")
    return True


if not _load("_C"):
    raise ImportError(
        "memloc_ext: the compiled library memloc_ext._C is missing; build it with: pip install --no-build-isolation ."
    )

try:
    has_cuda_kernels = torch.version.cuda is not None and _load("_C_cuda")
except ImportError as error:
    has_cuda_kernels = False
    warnings.warn(f"memloc_ext: the CUDA kernels do not load, only the CPU's are there: {error}", stacklevel=2)
"""Whether operators run on CUDA tensors: a CUDA build of torch, and a build of this package with CUDA kernels."""
