"""What this installation is made of: versions, kernels, instruction set, GPU."""

from __future__ import annotations

import importlib
import importlib.util
import platform

import numpy
import torch

from memloc_ext._libraries import has_cuda_kernels
from memloc_ext._version import __version__


def build_info() -> dict[str, str]:
    """Return what the build said of itself; empty in a build without the host module (``MEMLOC_HOST=0``)."""
    if importlib.util.find_spec("memloc_ext._host") is None:
        return {}
    return dict(importlib.import_module("memloc_ext._host").build_info())


def operators() -> dict[str, list[str]]:
    """Return the name of every operator with the devices that have a kernel for it."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("memloc_ext::"))
    return {
        name.removeprefix("memloc_ext::"): [device for device in ("CPU", "CUDA") if has_kernel(name, device)]
        for name in names
    }


def info() -> str:
    """Return the whole as a text of several lines."""
    build = build_info()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    archs = build.get("cuda_archs", "")
    instructions = build.get("cpu_capability", torch.backends.cpu.get_cpu_capability())
    lines = {
        "memloc_ext": __version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})",
        "python": f"{platform.python_version()}, numpy {numpy.__version__}",
        "CPU kernels": f"{instructions}, {torch.get_num_threads()} threads",
        "CUDA kernels": ("loaded" if has_cuda_kernels else "no") + (f", built for {archs}" if archs else ""),
        "GPU": ", ".join(gpus) or "none",
        "compiler": build.get("compiler", "unknown"),
        **{f"operator {name}": ", ".join(devices) or "any device" for name, devices in operators().items()},
    }
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in lines.items())
