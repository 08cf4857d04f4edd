"""Stages: what is reused, what is done again, and what survives a kill."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memloc_ext.study import ModelConfig, Run, StageName, StudyConfig, load_run, run_study
from memloc_ext.study.command_line import main
from memloc_ext.study.probe_configs import LocalizationConfig
from memloc_ext.study.run_directory import locked
from memloc_ext.study.stages import STAGES
from memloc_ext.training import TrainConfig, load_checkpoint, save_checkpoint

CONFIG = StudyConfig(
    model=ModelConfig("lenet"),
    train=TrainConfig(epochs=1, batch_size=256, learning_rate=0.05),
    localization=LocalizationConfig(localized=3, max_units=2, edited=0),
)
STAGED: tuple[StageName, ...] = ("train", "localize", "dropout")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_study(CONFIG, tmp_path_factory.mktemp("stages") / "run", stages=STAGED)


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    return shutil.copytree(finished.path, tmp_path / "run")


def files(path: Path) -> dict[Path, int]:
    return {file.relative_to(path): file.stat().st_mtime_ns for file in path.rglob("*.pt")}


def test_every_stage_comes_after_what_it_needs() -> None:
    seen = set()
    for name, stage in STAGES.items():
        assert seen.issuperset(stage.needs)
        for need in stage.needs:
            assert set(STAGES[need].settings) <= set(stage.settings)
        seen.add(name)


def test_what_a_stage_needs_is_done_too(finished: Run, copy: Path) -> None:
    shutil.rmtree(copy)
    said = []
    run = run_study(CONFIG, copy, stages=("localize",), say=said.append)
    assert said == ["[1/2] train: begins", "[2/2] localize: begins"]
    assert list(run.histories) == ["plain"]
    assert run.localizations["plain"].examples == finished.localizations["plain"].examples
    assert set(run.seconds) == {"train", "localize"}
    assert all(seconds > 0 for seconds in run.seconds.values())


def test_resume_does_again_what_a_setting_concerns(finished: Run, copy: Path) -> None:
    said, before = [], files(copy)
    other = replace(CONFIG, localization=replace(CONFIG.localization, max_units=1))
    with pytest.raises(ValueError, match=r"localization\.max_units = 2, not 1; give another --output, or --resume"):
        run_study(other, copy, stages=STAGED)
    assert load_run(copy).localizations == finished.localizations
    run = run_study(other, copy, stages=STAGED, resume=True, say=said.append)
    assert said == [
        "[1/3] train: finished before, reused",
        "[2/3] localize: done again, localization.max_units = 1, not 2",
        "[3/3] dropout: finished before, reused",
    ]
    assert files(copy) == before
    assert run.config["localization"]["max_units"] == 1
    assert {len(row.units) for row in run.localizations["plain"].examples} <= {0, 1}
    assert not (copy / "replaced").exists()


def test_examples_that_changed_in_their_file_are_noticed(tmp_path: Path) -> None:
    scores, output = tmp_path / "scores.txt", tmp_path / "run"
    scores.write_text("\n".join(["0.1"] * 40 + ["0.9"] * 1397))
    config = replace(CONFIG, data=replace(CONFIG.data, memorized=scores, below=0.5))
    before = files(run_study(config, output, stages=["train"]).path)
    scores.write_text("\n".join(["0.1"] * 41 + ["0.9"] * 1396))
    with pytest.raises(ValueError, match="train was made with other labels or memorized examples than the files"):
        run_study(config, output, stages=["train"])
    assert files(output) == before
    said = []
    run_study(config, output, stages=["train"], resume=True, say=said.append)
    assert said[0] == f"{scores}: read as scores of 1437 examples, memorized below 0.5: 41 memorized"
    assert said[1].startswith("[1/1] train: done again, data.fingerprint = ")


def test_resume_does_again_what_was_made_from_it(finished: Run, copy: Path) -> None:
    said = []
    other = replace(CONFIG, dropout=replace(CONFIG.dropout, p_mem=0.2))
    run = run_study(other, copy, stages=STAGED, resume=True, say=said.append)
    assert [line.split(":")[1].split(",")[0].strip() for line in said] == [
        "finished before", "finished before", "done again"
    ]  # fmt: skip
    assert run.histories["plain"] == finished.histories["plain"]
    assert run.histories["example_tied"] != finished.histories["example_tied"]
    other = replace(other, train=replace(other.train, learning_rate=0.01))
    said.clear()
    run_study(other, copy, stages=("localize",), resume=True, say=said.append)
    assert said == [
        "[1/2] train: done again, train.learning_rate = 0.01, not 0.05",
        "[2/2] localize: done again, train.learning_rate = 0.01, not 0.05",
    ]
    assert list(load_run(copy).histories) == ["plain"]  # the other model has another learning rate


def test_accounting_a_finished_training_trains_it_again(copy: Path) -> None:
    said = []
    run = run_study(CONFIG, copy, stages=("account",), say=said.append)
    assert said == ["[1/2] train: done again, train.accounted = True, not None", "[2/2] account: begins"]
    assert run.accounting is not None
    assert run.localizations == {}  # of the former training
    said.clear()
    run_study(CONFIG, copy, stages=("train",), say=said.append)
    assert said == ["[1/1] train: finished before, reused"]


def test_the_former_result_stays_until_its_successor_is_there(
    finished: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(copy / "plain"))

    other = replace(CONFIG, train=replace(CONFIG.train, epochs=2))
    with monkeypatch.context() as patch:
        patch.setattr("memloc_ext.training.loop.save_checkpoint", full)
        with pytest.raises(OSError, match="No space left"):
            run_study(other, copy, stages=("train",), resume=True)
    kept = copy / "replaced" / "train" / "plain"
    assert files(kept) == files(finished.path / "plain")
    run = run_study(other, copy, stages=("train",), resume=True)
    assert len(run.histories["plain"]) == 3
    assert not (copy / "replaced").exists()


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', '{"data": 1}', "[]", '{"a":' * 500 + "1" + "}" * 500])
def test_a_config_of_something_else_is_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: must be the settings of a run"):
        run_study(CONFIG, tmp_path, stages=("train",), resume=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": content}


def test_the_settings_that_end_a_command_are_one_line(copy: Path) -> None:
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"digits"', r'"a\nb\u001b[31m"').rstrip())
    with pytest.raises(SystemExit) as error:
        main(["train", "--model", "lenet", "--output", str(copy)])
    assert str(error.value).startswith(f"memloc: {copy} holds a run with data.dataset = a b\\x1b[31m, not digits; ")


def test_a_run_in_use_is_refused(copy: Path) -> None:
    with locked(copy), pytest.raises(ValueError, match="is in use by another run"):
        run_study(CONFIG, copy, stages=("train",))
    run_study(CONFIG, copy, stages=("train",))


def test_what_a_killed_write_left_is_removed(copy: Path) -> None:
    left = copy / "plain" / "checkpoints" / ".epoch_001.pt.0123456789abcdef.tmp"
    left.write_bytes(b"half")
    run_study(CONFIG, copy, stages=("train",))
    assert not left.exists()


def test_a_missing_checkpoint_is_named(copy: Path) -> None:
    (copy / "plain" / "checkpoints" / "epoch_001.pt").unlink()
    (copy / "stages" / "localize.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoints lacks the checkpoint of epoch 1; delete .*train\.json"):
        run_study(CONFIG, copy, stages=("localize",))


def test_a_damaged_checkpoint_is_named(copy: Path) -> None:
    file = copy / "plain" / "checkpoints" / "epoch_001.pt"
    file.write_bytes(file.read_bytes()[:1000])
    (copy / "stages" / "localize.json").unlink()
    with pytest.raises(ValueError, match=r"epoch_001\.pt: cannot be loaded as a checkpoint"):
        run_study(CONFIG, copy, stages=("localize",))
    assert list(load_run(copy).histories) == ["plain", "example_tied"]


def test_a_checkpoint_of_another_dtype_is_named(copy: Path) -> None:
    file = copy / "plain" / "checkpoints" / "epoch_001.pt"
    saved = load_checkpoint(file)
    weight = saved.model["conv1.0.weight"]
    save_checkpoint(file.parent, replace(saved, model=saved.model | {"conv1.0.weight": weight.to(torch.complex64)}))
    (copy / "stages" / "localize.json").unlink()
    with pytest.raises(ValueError, match=r"epoch_001\.pt must be of this model, whose conv1.0.weight is torch.float32"):
        run_study(CONFIG, copy, stages=("localize",))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes() -> None:
    tool = Path(__file__).parents[2] / "tools" / "kill_study.py"
    study = ["--epochs", "2", "--skip", "account", "rewind", "retrain", "controls", "localize-dropout", "report"]
    done = subprocess.run(
        [sys.executable, str(tool), "--kills", "5", "--", *study],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^5 kills, .* 0 files differ$", done.stdout, re.MULTILINE)
