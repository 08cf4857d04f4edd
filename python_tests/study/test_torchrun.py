"""The command line under torchrun: two processes make what one makes."""

import shutil
from pathlib import Path

import pytest
import torch
from processes import Ended, run, torchrun

from memloc_ext.study import accounting, load_run
from memloc_ext.study.command_line import main
from memloc_ext.study.report import page

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

ARGUMENTS = ["--model", "lenet", "--epochs", "1", "--batch-size", "64", "--learning-rate", "0.02"]
ARGUMENTS += ["--examples", "100", "--test-examples", "100"]
ARGUMENTS += ["--localized", "3", "--max-units", "3", "--edited", "1", "--retrain-epochs", "1", "--skip", "controls"]
ARGUMENTS += ["--device", "cpu"]
PROBES = {"rewind": "rewinding", "retrain": "retraining", "localize": "localization", "audit": "audit"}
"""Stage to its table."""


def small_run(folder: Path) -> None:
    """Run the command, with no more drawing and timing than must be; in a process of its own."""
    page.encoded, accounting._SECONDS = lambda figure: b"", 0
    main(["run", *ARGUMENTS, "--output", str(folder)])


def finished(done: Ended) -> Ended:
    assert done.status == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    return done


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    finished(run(small_run, folder))
    return folder


def test_two_processes_make_the_run_of_one(one: Path, tmp_path: Path) -> None:
    done = finished(torchrun(small_run, tmp_path / "two"))
    assert done.stderr.count("[1/9] train: begins") == 1
    single, several = runs = [load_run(path) for path in (one, tmp_path / "two")]
    files = [sorted(str(file.relative_to(run.path)) for file in run.path.rglob("*")) for run in runs]
    assert files[0] == files[1]
    for model, history in single.histories.items():
        for record, other in zip(history, several.histories[model], strict=True):
            assert record == pytest.approx(other, rel=1e-4, abs=2 / 100)
    assert single.accounting is not None
    assert several.accounting is not None
    assert single.accounting.column("clean") == pytest.approx(several.accounting.column("clean"), rel=1e-3)
    norms = [run.accounting.epoch(1).total_norms for run in (single, several) if run.accounting is not None]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert single.rewinding is not None
    assert several.rewinding is not None
    assert single.rewinding.groups.keys() == several.rewinding.groups.keys()


def test_two_processes_go_on_and_probe_a_model_to_the_same_bits(one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(one, folder)
    for stage in PROBES:
        (found,) = folder.glob(f"{stage}-????????")
        shutil.rmtree(found)
    done = finished(torchrun(small_run, folder))
    assert done.stderr.count(": begins") == len(PROBES)
    assert done.stderr.count("finished before, reused") == 9 - len(PROBES)
    for stage, table in PROBES.items():
        (again,), (before,) = (at.glob(f"{stage}-????????/{table}.csv") for at in (folder, one))
        assert again.read_bytes() == before.read_bytes()


def test_a_wrong_setting_ends_all_processes(tmp_path: Path) -> None:
    done = torchrun(main, ["train", "--noise", "2", "--device", "cpu", "--output", str(tmp_path / "run")])
    assert done.status != 0
    assert "fraction must be in" in done.stderr
    assert not (tmp_path / "run").exists()
