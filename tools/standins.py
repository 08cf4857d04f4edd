"""Let a CUDA build of torch load on a machine without CUDA's libraries: empty ones under their names.

``python tools/standins.py SITE_PACKAGES FOLDER`` reads what torch's libraries miss and writes, for every absent
library, one of that name to the folder, whose functions do nothing but say that there is no device. With the folder in
``LD_LIBRARY_PATH`` torch imports, and its CPU operators work as ever. For tests of a wheel under a torch of which there
is no CPU build, without gigabytes of libraries that they never call.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

# cudaErrorNoDevice and CUDA_ERROR_NO_DEVICE; to other libraries, an error too.
BODY = "int {}(void) {{ return 100; }}\n"
SYMBOL = re.compile(
    r"^\s*\d+: \S+\s+\d+ \S+\s+(?P<bind>\S+)\s+\S+\s+(?P<section>\S+) (?P<name>[^@\s]+)(?P<version>\S*)"
)


def readelf(option: str, library: Path) -> str:
    """Return what readelf prints on a library."""
    command = ["readelf", "--wide", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def missing(libraries: list[Path]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return the absent libraries with the versions wanted of each, and functions by version, "" for those without."""
    needed, wanted, defined = defaultdict(set), defaultdict(set), set()
    for library in libraries:
        for name in re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic", library)):
            needed[name] |= set()
        for line in re.finditer(r" File: (\S+)(.*(?:\n.* Name: .*)*)", readelf("--version-info", library)):
            needed[line[1]] |= set(re.findall(r" Name: (\S+)", line[2]))
        for symbol in filter(None, map(SYMBOL.match, readelf("--dyn-syms", library).splitlines())):
            if symbol["section"] != "UND":
                defined.add(symbol["name"])
            elif symbol["bind"] == "GLOBAL":
                wanted[symbol["version"].strip("@")].add(symbol["name"])
    wanted[""] = {name for name in wanted[""] - defined if not name.startswith(("_", "Py"))}  # of C, not Python's own
    cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    here = {library.name for library in libraries} | set(re.findall(r"^\s+(\S+) ", cache, re.MULTILINE))
    return {name: versions for name, versions in needed.items() if name not in here}, wanted


def write(library: Path, versions: set[str], wanted: dict[str, set[str]]) -> None:
    """Write one library: the functions of its versions, and all that are wanted of no version."""
    functions = set().union(wanted[""], *(wanted[version] for version in versions))
    nodes = (f"{v} {{ {''.join(f'{name}; ' for name in sorted(wanted[v]))}}};\n" for v in sorted(versions))
    source, script = library.with_suffix(".c"), library.with_suffix(".map")
    source.write_text("".join(map(BODY.format, sorted(functions))), encoding="utf-8")
    script.write_text("".join(nodes), encoding="utf-8")
    flags = ["-w", "-shared", "-fPIC", f"-Wl,-soname={library.name}"]
    flags += [f"-Wl,--version-script={script}"] if versions else []
    subprocess.run(["cc", *flags, "-o", str(library), str(source)], check=True)
    source.unlink()
    script.unlink()


def main() -> None:
    """Write all of them and print their names."""
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/standins.py SITE_PACKAGES FOLDER")
    site, folder = map(Path, sys.argv[1:])
    libraries = [path for path in (site / "torch").rglob("*.so*") if path.is_file()]
    if not libraries:
        sys.exit(f"standins: {site} has no torch with libraries in it")
    folder.mkdir(parents=True, exist_ok=True)
    absent, wanted = missing(libraries)
    for name, versions in sorted(absent.items()):
        write(folder / name, versions, wanted)
    print(*sorted(absent))


if __name__ == "__main__":
    main()
