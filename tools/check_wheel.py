"""Check what is in a wheel: ``python tools/check_wheel.py dist/*.whl``, run from the sources that it was built from."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import torch
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]

# About twice what they take up: libraries with debug information, or built twice, are ten times as large.
MOST_BYTES = {"without CUDA kernels": 2 << 20, "with CUDA kernels": 12 << 20}
# Beside these every machine that runs torch has what is needed; libcudart is linked in.
NEEDED = re.compile(
    r"lib(torch|torch_cpu|torch_cuda|c10|c10_cuda)\.so|lib(stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so\.\d|ld-linux-.*\.so\.\d"
)
MODULE = re.compile(r"memloc_ext/(?P<name>_C|_C_cuda|_host)\.(?P<abi>abi3|cpython-3\d+)(-\S+)?\.so")


def expected_files() -> set[str]:
    """Return the files of the package that are no extension modules."""
    patterns = ("**/*.py", "py.typed", "study/report/*.html.j2")
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "memloc_ext").glob(pattern)}


def check_files(names: list[str], modules: list[re.Match[str]]) -> list[str]:
    """Return what is there and should not be, or the other way round."""
    files = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    found = files - {module[0] for module in modules}
    wrong = [f"{name} is in it" for name in sorted(found - expected_files())]
    wrong += [f"{name} is not in it" for name in sorted(expected_files() - found)]
    if "_C" not in {module["name"] for module in modules} or len(names) != len(set(names)):
        wrong.append("it has no memloc_ext/_C, or a file twice")
    return wrong


def check_tags(wheel: Path, modules: list[re.Match[str]], metadata: str) -> list[str]:
    """Return where tags are not those of the modules: the host module pins the version of Python, others do not."""
    host = [module["abi"] for module in modules if module["name"] == "_host"]
    python = host[0].replace("cpython-", "cp") if host else "cp310"
    abi = f"{python}-{python if host else 'abi3'}"
    machine = re.escape(sysconfig.get_platform().partition("-")[2].replace("-", "_"))
    tags = set(map(str, parse_wheel_filename(wheel.name)[3])) | set(re.findall(r"^Tag: (\S+)", metadata, re.MULTILINE))
    fine = len(tags) == 1 and re.fullmatch(rf"{abi}-manylinux_\d+_\d+_{machine}", min(tags))
    wrong = [] if fine else [f"its tag has to be {abi}-manylinux_*, got {' '.join(sorted(tags))}"]
    return wrong + [f"{m[0]} is for one Python only" for m in modules if m["name"] != "_host" and m["abi"] != "abi3"]


def check_glibc(library: Path, wheel: str) -> list[str]:
    """Return whether a library asks for a later glibc than the tag of its wheel says."""
    tag = re.search(r"manylinux_(\d+)_(\d+)_", wheel)
    command = ["readelf", "--wide", "--version-info", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = max(((int(a), int(b)) for a, b in re.findall(r"GLIBC_(\d+)\.(\d+)", text)), default=(0, 0))
    late = tag is not None and needed > (int(tag[1]), int(tag[2]))
    return [f"{library.name} needs glibc {needed[0]}.{needed[1]}, later than the tag says"] if late else []


def check_library(library: Path) -> list[str]:
    """Return what keeps a library from other machines, or makes it larger than it has to be."""
    command = ["readelf", "--wide", "--section-headers", "--dynamic", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wrong = [f"has a section {name}" for name in re.findall(r"\] (\.debug\S*|\.symtab)\s", text)]
    wrong += [f"has a {kind}: {path}" for kind, path in re.findall(r"\((RPATH|RUNPATH)\).*\[(.*)\]", text)]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    wrong += [f"needs {name}" for name in needed if not NEEDED.fullmatch(name)]
    content = library.read_bytes()
    folders = {ROOT, Path.home(), Path(torch.__file__).parents[1], Path(sys.prefix), Path(tempfile.gettempdir())}
    for folder in sorted({str(path) for path in folders} - {"/"}):
        if place := re.search(re.escape(f"{folder}/".encode()) + rb"[\w./+-]*", content):
            wrong.append(f"names a path of the machine that built it: {place[0].decode()}")
    return [f"{library.name} {sentence}" for sentence in wrong]


def check_wheel(wheel: Path) -> list[str]:
    """Return a sentence for everything that is wrong, and print the size of what is in it."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        metadata = "".join(archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
        modules = [module for module in map(MODULE.fullmatch, names) if module]
        wrong = check_files(names, modules) + check_tags(wheel, modules, metadata)
        kind = f"{'with' if any(m['name'] == '_C_cuda' for m in modules) else 'without'} CUDA kernels"
        size = wheel.stat().st_size
        print(f"{wheel.name}: {size} bytes, {len(names)} files, {kind}")
        if size > MOST_BYTES[kind]:
            wrong.append(f"a wheel {kind} may take {MOST_BYTES[kind]} bytes, got {size}")
        for module in modules:
            library = Path(archive.extract(module[0], folder))
            print(f"  {module[0]}: {library.stat().st_size} bytes")
            wrong += check_library(library) + check_glibc(library, wheel.name)
        audited = [Path(folder, module[0]) for module in modules if module["name"] != "_host"]  # which knows no torch
        command = [Path(sys.executable).with_name("torch-abi-audit"), "--check", "both", *audited]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            wrong.append(f"torch-abi-audit: {done.stdout}{done.stderr}")
    return wrong


def main() -> None:
    """Check all wheels that are named, and exit with 1 if something is wrong with one, or one of the two is missing."""
    if len(sys.argv) != 3 or sum("-abi3-" in name for name in sys.argv[1:]) != 1:
        sys.exit("usage: python tools/check_wheel.py dist/*.whl, the one for this Python and the abi3 one")
    wrong = [f"{name}: {sentence}" for name in sys.argv[1:] for sentence in check_wheel(Path(name))]
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
