"""The command line under torchrun: two processes make what one makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import memloc_ext

ARGUMENTS = ["--model", "lenet", "--epochs", "1", "--batch-size", "64", "--examples", "200", "--learning-rate", "0.02"]
ARGUMENTS += ["--localized", "3", "--max-units", "3", "--edited", "1", "--retrain-epochs", "1", "--skip", "controls"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
TORCHRUN += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def memloc(start: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*start, "-m", "memloc_ext", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_two_processes_make_the_run_of_one(tmp_path: Path) -> None:
    runs = []
    for name, start in (("one", [sys.executable]), ("two", TORCHRUN)):
        done = memloc(start, "run", *ARGUMENTS, "--output", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report: ") == 1
        assert done.stderr.count("[1/7] train: begins") == 1
        runs.append(memloc_ext.load_run(tmp_path / name))
    one, two = runs
    files = [sorted(str(file.relative_to(run.path)) for file in run.path.rglob("*")) for run in runs]
    assert files[0] == files[1]
    for model, history in one.histories.items():
        for record, other in zip(history, two.histories[model], strict=True):
            assert record == pytest.approx(other, rel=1e-4, abs=2 / 200)
    assert one.accounting is not None
    assert two.accounting is not None
    assert one.accounting.column("clean") == pytest.approx(two.accounting.column("clean"), rel=1e-3)
    assert one.accounting.epoch(1).total_norms == pytest.approx(two.accounting.epoch(1).total_norms, rel=1e-3)
    assert one.rewinding is not None
    assert two.rewinding is not None
    assert one.rewinding.groups.keys() == two.rewinding.groups.keys()
    again = memloc(TORCHRUN, "run", *ARGUMENTS, "--output", str(tmp_path / "one"))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished before, reused") == 7


def test_probes_of_one_model_are_the_same_bits(tmp_path: Path) -> None:
    train = memloc([sys.executable], "train", *ARGUMENTS[:-2], "--output", str(tmp_path / "one"))
    assert train.returncode == 0, train.stderr
    subprocess.run(["cp", "-r", tmp_path / "one", tmp_path / "two"], check=True)
    for name, start in (("one", [sys.executable]), ("two", TORCHRUN)):
        only = ["--only", "rewind", "retrain", "localize", "--resume", "--output", str(tmp_path / name)]
        done = memloc(start, "run", *ARGUMENTS[:-2], *only)
        assert done.returncode == 0, done.stderr
    for table in ("rewinding.json", "retraining.json", "localization.json"):
        assert (tmp_path / "one" / "plain" / table).read_bytes() == (tmp_path / "two" / "plain" / table).read_bytes()


def test_a_wrong_setting_ends_all_processes(tmp_path: Path) -> None:
    done = memloc(TORCHRUN, "train", "--noise", "2", "--output", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "fraction must be in" in done.stderr
    assert not (tmp_path / "run").exists()
