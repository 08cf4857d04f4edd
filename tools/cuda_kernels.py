"""What the CUDA kernels of a built extension are made of: registers, memory, occupancy, widths of loads and stores.

Registers and spills are ptxas's words, threads and instructions are read from the library as it is linked.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
ACCESS = re.compile(r"\b(LD|ST)G?\.E((?:\.\w+)*)")
BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass
class Kernel:
    """One kernel for one architecture; accesses of global memory are counted by their width in bytes.

    ``hmma`` and ``ldgsts`` are the instructions that multiply on tensor cores and that copy to shared memory.
    """

    source: str
    name: str
    arch: str
    registers: int
    stack: int
    spilled: int
    shared: int
    threads: int = 0
    blocks: int = 0
    warps: int = 0
    most_warps: int = 0
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    hmma: int = 0
    ldgsts: int = 0


def read_kernels(ptxas: str, library: Path, home: str) -> list[Kernel]:
    """Return all kernels of a library.

    Args:
        ptxas: What ``nvcc -Xptxas -v`` printed when it was compiled.
        library: The linked extension.
        home: The CUDA toolkit.
    """
    found = list(PTXAS.finditer(ptxas))
    kernels = {
        (match["arch"], match["name"]): Kernel(
            source=source,
            name=name,
            arch=match["arch"],
            registers=int(match["registers"]),
            stack=int(match["stack"]),
            spilled=int(match["stores"]) + int(match["loads"]),
            shared=int(match["shared"] or 0),
        )
        for match, (source, name) in zip(found, _demangle([match["name"] for match in found]), strict=True)
    }
    _read_threads(kernels, library, home)
    _read_instructions(kernels, library, home)
    _compute_occupancy(list(kernels.values()), home)
    return list(kernels.values())


def _demangle(names: list[str]) -> list[tuple[str, str]]:
    """Return each kernel's source file and its name without namespace and parameters."""
    command = ["c++filt", "-p", *names]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    sources = (re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+)_cu_", name) for name in names)
    return [
        (source[1] if source else "", re.sub(r"memloc::(\(anonymous namespace\)::)?", "", name).removeprefix("void "))
        for source, name in zip(sources, plain, strict=True)
    ]


def _read_threads(kernels: dict[tuple[str, str], Kernel], library: Path, home: str) -> None:
    """Take the most threads of a block, which the launch bounds say, from the sections on each kernel."""
    arch = name = attribute = ""
    for line in _dump("-elf", library, home):
        if start := re.match(r"64-bit ELF: .*\bsm=(\w+)", line):
            arch = start[1]
        elif start := re.match(r"\.nv\.info\.(\S+)", line):
            name = start[1]
        elif start := re.match(r"\s*Attribute:\s+(\w+)", line):
            attribute = start[1]
        elif attribute == "EIATTR_MAX_THREADS" and (arch, name) in kernels and "Value:" in line:
            kernels[arch, name].threads = math.prod(int(number, 16) for number in line.split()[1:])


def _read_instructions(kernels: dict[tuple[str, str], Kernel], library: Path, home: str) -> None:
    """Count the instructions that load from and store to global memory, by width, and those of tensor cores."""
    arch, kernel = "", None
    for line in _dump("-sass", library, home):
        if start := re.match(r"\s*code for sm_(\w+)", line):
            arch = start[1]
        elif start := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels.get((arch, start[1]))
        elif kernel is not None and (access := ACCESS.search(line)):
            width = next((BYTES[part] for part in access[2].split(".") if part in BYTES), 4)
            (kernel.loads if access[1] == "LD" else kernel.stores)[width] += 1
        elif kernel is not None:
            kernel.hmma += bool(re.search(r"\bHMMA\.", line))
            kernel.ldgsts += bool(re.search(r"\bLDGSTS\.", line))


def _dump(what: str, library: Path, home: str) -> Iterator[str]:
    """Yield the lines that cuobjdump prints, of the toolkit or from its package beside the one that runs this."""
    packages = importlib.util.find_spec("nvidia")
    places = (packages.submodule_search_locations if packages else None) or ()
    folders = [Path(home), *(Path(place, "cu13") for place in places)]
    path = os.pathsep.join(str(folder / "bin") for folder in folders)
    program = shutil.which("cuobjdump", path=path)
    if program is None or shutil.which("nvdisasm", path=path) is None:
        sys.exit(f"cuda-check: cuobjdump and nvdisasm are not in {path}; install requirements-dev.txt")
    environment = {**os.environ, "PATH": path + os.pathsep + os.environ.get("PATH", "")}
    with subprocess.Popen([program, what, str(library)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield from process.stdout or ()
    if process.returncode != 0:
        sys.exit(f"cuda-check: cuobjdump {what} cannot read {library}")


def _compute_occupancy(kernels: list[Kernel], home: str) -> None:
    """Ask NVIDIA's occupancy rules, which are a header of the toolkit."""
    numbers = "".join(f"{k.arch.rstrip('af')} {k.registers} {k.shared} {k.threads}\n" for k in kernels)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "occupancy")
        source = Path(__file__).with_name("occupancy.cpp")
        subprocess.run(["c++", "-std=c++17", f"-isystem{home}/include", "-o", program, source], check=True)
        answers = subprocess.run([program], input=numbers, capture_output=True, text=True, check=True).stdout
    for kernel, answer in zip(kernels, answers.splitlines(), strict=True):
        kernel.blocks, kernel.warps, kernel.most_warps = map(int, answer.split())
