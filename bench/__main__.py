"""Run the CPU benchmarks and write one result file per operator: ``python -m bench [operator ...] [-k cases]``.

``-k`` selects cases as pytest does; those left out stay in the file as they were measured on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measure import folder, machine
from memloc_ext.files import read_json, write_json

HERE = Path(__file__).parent
QUIET = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}  # spinning threads swing ratios on a shared machine


def main() -> None:
    """Run every benchmark, or the named ones, print the ratios and write ``results/<machine>/<operator>.json``."""
    if any(os.environ.get(name) != value for name, value in QUIET.items()):  # read when torch loads, so start again
        again = [sys.executable, "-m", "bench", *sys.argv[1:]]
        sys.exit(subprocess.run(again, env=os.environ | QUIET, check=False).returncode)
    known = [file.stem.removeprefix("bench_") for file in sorted(HERE.glob("bench_*.py"))]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"one of {', '.join(known)}; all by default")
    parser.add_argument("-k", metavar="cases", default="", help="run only the cases that pytest selects by this")
    options = parser.parse_args()
    for name in options.operators or known:
        if name not in known:
            parser.error(f"the operator must be one of {', '.join(known)}, got {name!r}")
        cases = run(name, options.k)
        for case in cases:
            print(case["case"], *(f"{peer}: {ratio['median']}x" for peer, ratio in case["time over"].items()), sep="  ")
        path = folder() / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"command": f"python -m bench {name}", "machine": machine(), "cases": cases}
        if options.k:
            result["cases"] = kept(path, result) + cases
        write_json(path, result)
        print(f"written: {path.relative_to(HERE.parent)}")


def kept(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cases of an earlier result that this one did not measure, if both are of the same machine."""
    if not path.exists():
        return []
    earlier = read_json(path)
    if earlier["machine"] != result["machine"]:
        sys.exit(f"bench: {path} is of another machine or version; run all cases, without -k")
    again = {case["case"] for case in result["cases"]}
    return [case for case in earlier["cases"] if case["case"] not in again]


def run(name: str, cases: str = "") -> list[dict[str, Any]]:
    """Run the benchmark of one operator and return what each of the selected cases measured."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "result.json")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            str(HERE / f"bench_{name}.py"),
            f"--benchmark-json={output}",
            "-k",
            cases,
        ]
        code = subprocess.run([*command, "--benchmark-columns=median,iqr,rounds"], check=False).returncode
        if code != 0:
            sys.exit(code)
        benchmarks = json.loads(output.read_text())["benchmarks"]
    return [{"case": benchmark["param"], **benchmark["extra_info"]} for benchmark in benchmarks]


if __name__ == "__main__":
    main()
