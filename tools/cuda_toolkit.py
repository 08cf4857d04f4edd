"""Find the CUDA toolkit and spell its architecture flags: shared by setup.py and the compile check."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


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
