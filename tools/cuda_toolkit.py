"""Whether, with what and for which cards the CUDA kernels are built: shared by setup.py and the compile check."""

from __future__ import annotations

import os
import re
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
    archs = os.environ.get("MEMLOC_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX;9.0a"
    if home is None or mode == "0" or (mode == "auto" and torch_cuda is None):
        return None, archs
    version = toolkit_version(home)
    if torch_cuda is not None and version.split(".")[0] != torch_cuda.split(".")[0]:
        sys.exit(
            f"memloc_ext: torch is built for CUDA {torch_cuda} but the toolkit in {home} is {version}; "
            "set CUDA_HOME to one with the same first number, or MEMLOC_CUDA=0 to build without CUDA kernels"
        )
    return home, archs


def toolkit_version(home: str) -> str:
    """Return a toolkit's version, for example ``"13.0"``, from its own header."""
    header = Path(home, "include", "cuda.h").read_text(encoding="utf-8", errors="replace")
    match = re.search(r"#define\s+CUDA_VERSION\s+(\d+)", header)
    number = int(match[1]) if match else 0
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_home() -> str | None:
    """Return the folder that holds both ``bin/nvcc`` and the headers, or None.

    ``nvcc`` on the PATH may be a wrapper outside its toolkit, so the headers are asked for too.
    """
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        Path(nvcc).resolve().parents[1] if nvcc else None,
        os.path.join(os.sep, "usr", "local", "cuda"),  # where NVIDIA's installer puts it
    ]
    for home in candidates:
        if home and Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime.h").exists():
            return str(home)
    return None


def gencode(archs: str) -> list[str]:
    """Turn ``"8.0+PTX;9.0a"`` into nvcc's flags; ``+PTX`` adds code that later cards compile for themselves."""
    flags = []
    for arch in filter(None, archs.replace(" ", ";").split(";")):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d{2,3}[af]?", number):
            sys.exit(f"memloc_ext: CUDA architectures must be numbers such as 8.0+PTX or 9.0a, got {arch!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
