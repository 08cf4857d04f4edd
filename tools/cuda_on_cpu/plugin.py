"""``pytest -p tools.cuda_on_cpu.plugin -m cuda``: the tests that need a GPU, with the CUDA operators on the CPU.

A tensor on the device "cuda" is one of the CPU there, so that a test of one device against the other compares the CUDA
operators with themselves; those against references do not. Tests of streams, graphs and device memory are skipped.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch
from torch.overrides import TorchFunctionMode

import memloc_ext  # noqa: F401  (declares the operators)
from tools.cuda_on_cpu.build import build

aten = torch.library.Library("aten", "IMPL")


def _product_into(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor) -> torch.Tensor:
    """``aten::mm.dtype_out`` and ``aten::bmm.dtype_out``, which torch has for CUDA alone."""
    return torch.matmul(a.to(out_dtype), b.to(out_dtype), out=out)


class _CudaIsCpu(TorchFunctionMode):
    """Makes tensors on the CPU where "cuda" is asked for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def on_cpu(value: Any) -> Any:
            is_cuda = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
            return torch.device("cpu") if is_cuda else value

        if func is torch.Tensor.cuda:
            return args[0]
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


def bank_conflicts() -> tuple[int, int]:
    """Return how often eight lanes accessed shared memory since the last call, and how often that was repeated.

    Counted are asynchronous copies and the loads of matrices.
    """
    library = next(path for path in torch.ops.loaded_libraries if path.endswith("cuda_on_cpu.so"))
    counts = (ctypes.c_uint64 * 2)()
    ctypes.CDLL(library).cuda_on_cpu_banks(counts)
    return counts[0], counts[1]


def _needs_a_device(*_: object, **__: object) -> NoReturn:
    pytest.skip("needs a CUDA device")


def pytest_configure() -> None:
    """Put the CUDA operators in the place of the CPU's, before the tests are collected."""
    with pytest.MonkeyPatch.context() as patch:
        preloaded = os.environ.get("LD_PRELOAD", "")
        patch.delenv("LD_PRELOAD", raising=False)  # which compilers do without, and the processes of tests do not
        build(sanitize="libasan" in preloaded)
    for name in ("mm.dtype_out", "bmm.dtype_out"):
        aten.impl(name, _product_into, "CPU")
    for name in ("Stream", "CUDAGraph", "mem_get_info", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, _needs_a_device)
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.is_current_stream_capturing = lambda: False


@pytest.fixture(autouse=True)
def cuda_is_cpu() -> Iterator[None]:
    """Let a test name the device "cuda"."""
    with _CudaIsCpu():
        yield
