"""Kill a small study again and again, and hold what becomes of it against one that nobody disturbed.

    python tools/kill_study.py --kills 200

A run is killed (SIGKILL) at a random moment and started again, until it ends by itself; then the next begins in another
folder. Each must end with the files of the undisturbed run and no other: byte for byte but for times. Every start is a
fork of this process, which has imported all there is, so that the kills hit the study and not its imports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads would not survive a fork

from memloc_ext.study.command_line import main as memloc  # noqa: E402

STUDY = """
run --model lenet --epochs 4 --batch-size 32 --examples 300 --learning-rate 0.1 --device cpu
--localized 6 --max-units 5 --edited 2 --retrain-epochs 2
"""
IMPORTED = (
    "memloc_ext.study.report",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "sklearn.model_selection",
    "torch._dynamo",  # by any optimizer
    "tqdm",
    "tyro",
)
DISK = 0.03
"""Seconds that bytes take to the disk, at least: on a slow one, more of the kills meet a write."""
PER_RUN = 5
"""Kills in the time of an undisturbed run, on average."""
SECONDS = re.compile(rb'"seconds": [\d.e+-]+')
TIMED = ("accounting_cost.json", "shipped.json", "report.html", "SHA256SUMS")
"""Files that hold other times, or checksums of files with times."""


def start(study: Sequence[str], folder: Path) -> int:
    """Fork a process that begins a study or goes on with it, and return its id; what it prints goes into a log."""
    child = os.fork()
    if child:
        return child
    status, fsync = 1, os.fsync
    os.fsync = lambda descriptor: (time.sleep(DISK), fsync(descriptor))[1]
    try:
        with open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                memloc([*study, "--output", str(folder)])
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=log)
    finally:
        os._exit(status)  # what the parent would clean up is the parent's


def ended(child: int, folder: Path) -> bool:
    """Wait for a process; return whether it ended by itself, and exit if it did so with an error."""
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"{folder} ended with an error:\n{Path(f'{folder}.log').read_text()}")
    return os.WIFEXITED(status)


def killed(study: Sequence[str], folder: Path, seconds: float) -> bool:
    """Kill a study that many seconds after its start; return False if it had ended by then."""
    child = start(study, folder)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # nobody has waited for it, so that the id is still its own
    return not ended(child, folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a run and what is in them, without times."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: b"" if path.name in TIMED else SECONDS.sub(b"", path.read_bytes()) for name, path in files.items()}


def differences(folder: Path, expected: dict[str, bytes]) -> list[str]:
    """Return the files in which a run differs from the undisturbed one."""
    found = contents(folder)
    return [str(folder / name) for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


def kill_study(study: Sequence[str], folder: Path, kills: int, moments: random.Random) -> list[str]:
    """Do the experiment in a folder; print what was done after each run, and return the files that differ."""
    undisturbed, began = folder / "undisturbed", time.monotonic()
    ended(start(study, undisturbed), undisturbed)
    whole, expected = time.monotonic() - began, contents(undisturbed)
    wrong, done, runs, torn = [], 0, 0, 0
    while done < kills:
        run = folder / f"run{runs}"
        while done < kills and killed(study, run, moments.expovariate(PER_RUN / whole)):
            done += 1
            torn += any(run.rglob(".*.tmp"))
        if done == kills:
            ended(start(study, run), run)
        wrong += differences(run, expected)
        runs += 1
        print(f"{done} kills, {torn} of them during a write; {runs} runs, {len(wrong)} files differ", flush=True)
    return wrong


def main() -> None:
    """Run the experiment that the command line asks for; the exit status is 1 if a file differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("study", nargs="*", help="after --: more arguments of memloc run")
    options = parser.parse_args()
    for name in IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        study = [*STUDY.split(), *options.study]
        wrong = kill_study(study, Path(folder), options.kills, random.Random(options.seed))
    if wrong:
        sys.exit("\n".join(["differ from the undisturbed run:", *wrong]))


if __name__ == "__main__":
    main()
