"""Run the CPU benchmarks and write one result file per operator: ``python -m bench [name of an operator]``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measure import folder, machine
from memloc_ext.files import write_json

HERE = Path(__file__).parent
QUIET = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}  # spinning threads swing ratios on a shared machine


def main() -> None:
    """Run every benchmark, or the named ones, print the ratios and write ``results/<machine>/<operator>.json``."""
    if any(os.environ.get(name) != value for name, value in QUIET.items()):  # read when torch loads, so start again
        again = [sys.executable, "-m", "bench", *sys.argv[1:]]
        sys.exit(subprocess.run(again, env=os.environ | QUIET, check=False).returncode)
    known = [file.stem.removeprefix("bench_") for file in sorted(HERE.glob("bench_*.py"))]
    for name in sys.argv[1:] or known:
        if name not in known:
            sys.exit(f"bench: the operator must be one of {', '.join(known)}, got {name!r}")
        cases = run(name)
        for case in cases:
            print(case["case"], *(f"{peer}: {ratio['median']}x" for peer, ratio in case["time over"].items()), sep="  ")
        path = folder() / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"command": f"python -m bench {name}", "machine": machine(), "cases": cases})
        print(f"written: {path.relative_to(HERE.parent)}")


def run(name: str) -> list[dict[str, Any]]:
    """Run the benchmark of one operator and return what each of its cases measured."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "result.json")
        command = [sys.executable, "-m", "pytest", "-q", str(HERE / f"bench_{name}.py"), f"--benchmark-json={output}"]
        code = subprocess.run([*command, "--benchmark-columns=median,iqr,rounds"], check=False).returncode
        if code != 0:
            sys.exit(code)
        benchmarks = json.loads(output.read_text())["benchmarks"]
    return [{"case": benchmark["param"], **benchmark["extra_info"]} for benchmark in benchmarks]


if __name__ == "__main__":
    main()
