"""Compile and link the CUDA kernels without a GPU: report each kernel's registers, fail on a register spill.

Device code is compiled once per architecture for ptxas's report; then the extension is built as a user would build it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.cuda_toolkit import cuda_home  # noqa: E402

ARCHS = ("80", "90a")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def report(nvcc: Path, source: Path, arch: str) -> list[re.Match[str]]:
    """Compile one file for one architecture and return ptxas's line on every kernel in it."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "kernel.cubin")
        flags = ["-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-O3", "-std=c++17", "-Xptxas", "-v"]
        command = [str(nvcc), *flags, f"-I{ROOT / 'csrc'}", "-o", str(output), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{source.relative_to(ROOT)} does not compile for sm_{arch}:\n{done.stderr}")
    return list(REPORT.finditer(done.stderr))


def demangle(name: str) -> str:
    """Return a kernel's name without its parameters, as far as c++filt is there to tell."""
    try:
        plain = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return name
    return plain.replace("memloc::(anonymous namespace)::", "").removeprefix("void ")


def link() -> None:
    """Build the extension with CUDA kernels for the same architectures, out of the way of the one in use."""
    archs = ";".join(f"{arch[0]}.{arch[1:]}" for arch in ARCHS)
    environment = {**os.environ, "MEMLOC_CUDA": "1", "MEMLOC_CUDA_ARCHS": archs}
    folders = ["--build-temp", "build/cuda-check/temp", "--build-lib", "build/cuda-check/lib"]
    command = [sys.executable, "setup.py", "build_ext", *folders]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not list((ROOT / "build/cuda-check/lib/memloc_ext").glob("_C_cuda*")):
        sys.exit(f"the extension does not build with CUDA kernels:\n{done.stdout}\n{done.stderr}")


def main() -> None:
    """Print the report and exit with 1 if a kernel spills."""
    home = cuda_home()
    if home is None:
        sys.exit("cuda-check: no CUDA toolkit was found; set CUDA_HOME")
    kernels = [
        match
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        for arch in ARCHS
        for match in report(Path(home, "bin", "nvcc"), source, arch)
    ]
    if not kernels:
        sys.exit("cuda-check: ptxas reported no kernel")
    spilling = 0
    for kernel in kernels:
        spilled = int(kernel["stores"]) + int(kernel["loads"])
        spilling += spilled > 0
        figures = f"{kernel['registers']:>3} registers, {kernel['stack']} B stack, {spilled} B spilled"
        print(f"{kernel['arch']:7} {figures}  {demangle(kernel['name'])}")
    link()
    print(f"{len(kernels)} kernels compiled and linked, {spilling} spill registers")
    sys.exit(bool(spilling))


if __name__ == "__main__":
    main()
