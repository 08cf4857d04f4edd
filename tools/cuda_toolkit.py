"""Whether, with what and for which cards the CUDA kernels are built: shared by setup.py and the compile check."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def choose_cuda(torch_cuda: str | None) -> tuple[str | None, str]:
    """Follow ``MEMLOC_CUDA`` and ``MEMLOC_CUDA_ARCHS``; exit with one sentence where they cannot be followed.

    Args:
        torch_cuda: ``torch.version.cuda``, None in a CPU build.

    Returns:
        The toolkit to build with, None for no CUDA kernels, and the architectures.
    """
    mode = os.environ.get("MEMLOC_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        sys.exit(f"memloc_ext: MEMLOC_CUDA must be 0, 1 or unset, got {mode!r}")
    home = cuda_home()
    if mode == "1" and home is None:
        sys.exit("MEMLOC_CUDA=1 but no CUDA toolkit was found; set CUDA_HOME or unset MEMLOC_CUDA")
    wanted = mode == "1" or (mode == "auto" and torch_cuda is not None)
    archs = os.environ.get("MEMLOC_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX;9.0a"
    return home if wanted else None, archs


def cuda_home() -> str | None:
    """Return the folder that holds both ``bin/nvcc`` and the headers, or None.

    ``nvcc`` on the PATH may be a wrapper outside its toolkit, so the headers are asked for too.
    """
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        os.path.join(os.sep, "usr", "local", "cuda"),  # where NVIDIA's installer puts it
        Path(nvcc).resolve().parents[1] if nvcc else None,
    ]
    for home in candidates:
        if home and Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime.h").exists():
            return str(home)
    return None


def gencode(archs: str) -> list[str]:
    """Turn ``"8.0+PTX;9.0a"`` into nvcc's flags; ``+PTX`` adds code that later cards compile for themselves."""
    flags = []
    for arch in archs.replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
