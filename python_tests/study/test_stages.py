"""Stages: what is found again, what is another result, and what survives a kill."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memloc_ext.study import DataConfig, ModelConfig, Run, StageName, StudyConfig, load_run, run_study
from memloc_ext.study.command_line import main
from memloc_ext.study.config import LocalizationConfig
from memloc_ext.study.stages import STAGES
from memloc_ext.study.store import Result, Source, locked
from memloc_ext.training import TrainConfig, load_checkpoint, save_checkpoint

CONFIG = StudyConfig(
    data=DataConfig(examples=300),
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
    return {file.relative_to(path): file.stat().st_mtime_ns for file in path.rglob("*.safetensors")}


def folder(run: Path, stage: str) -> Path:
    (found,) = run.glob(f"{stage}-????????")
    return found


def again(run: Path, stage: str) -> Path:
    """Take the checksums away: the stage is not finished."""
    (folder(run, stage) / "SHA256SUMS").unlink()
    return folder(run, stage)


def test_every_stage_comes_after_what_it_needs() -> None:
    seen = set()
    for name, stage in STAGES.items():
        assert seen.issuperset(stage.needs)
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


def test_a_setting_concerns_the_stages_that_depend_on_it(finished: Run, copy: Path) -> None:
    said, before = [], files(copy)
    other = replace(CONFIG, localization=replace(CONFIG.localization, max_units=1))
    run = run_study(other, copy, stages=STAGED, say=said.append)
    assert said == [
        "[1/3] train: finished before, reused",
        "[2/3] localize: begins",
        "[3/3] dropout: finished before, reused",
    ]
    assert files(copy) == before
    assert run.config.localization.max_units == 1
    assert {len(row.units) for row in run.localizations["plain"].examples} <= {0, 1}
    said.clear()
    assert run_study(CONFIG, copy, stages=STAGED, say=said.append) == replace(finished, path=copy)
    assert [line.endswith("finished before, reused") for line in said] == [True] * 3


def test_a_setting_that_says_where_concerns_no_stage(finished: Run, copy: Path, tmp_path: Path) -> None:
    before = files(copy)
    there = replace(CONFIG, data=replace(CONFIG.data, root=tmp_path, download=True), device="cpu")
    run = run_study(there, copy, stages=STAGED)
    assert run.metrics == finished.metrics
    assert files(copy) == before


def test_another_training_makes_other_results_of_all_that_need_it(finished: Run, copy: Path) -> None:
    said = []
    other = replace(CONFIG, dropout=replace(CONFIG.dropout, p_mem=0.2))
    run = run_study(other, copy, stages=STAGED, say=said.append)
    assert [line.split(": ")[1] for line in said] == ["finished before, reused", "finished before, reused", "begins"]
    assert run.histories["plain"] == finished.histories["plain"]
    assert run.histories["example_tied"] != finished.histories["example_tied"]
    other = replace(other, train=replace(other.train, learning_rate=0.01))
    said.clear()
    run = run_study(other, copy, stages=("localize",), say=said.append)
    assert said == ["[1/2] train: begins", "[2/2] localize: begins"]
    assert list(run.histories) == ["plain"]  # the other model has another learning rate


def test_examples_that_changed_in_their_file_are_other_examples(tmp_path: Path) -> None:
    scores, output = tmp_path / "scores.txt", tmp_path / "run"
    scores.write_text("\n".join(["0.1"] * 40 + ["0.9"] * 1397))
    config = replace(CONFIG, data=DataConfig(memorized=scores, below=0.5))
    before = files(run_study(config, output, stages=["train"]).path)
    scores.write_text("\n".join(["0.1"] * 41 + ["0.9"] * 1396))
    said = []
    run_study(config, output, stages=["train"], say=said.append)
    assert said == [
        f"{scores}: read as scores of 1437 examples, memorized below 0.5: 41 memorized",
        "[1/1] train: begins",
    ]
    assert before.items() < files(output).items()


def test_pixels_are_part_of_what_a_result_is_made_from(tmp_path: Path) -> None:
    from PIL import Image

    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / part / kind).mkdir(parents=True)
            for number in range(8):
                Image.new("L", (8, 8), 20 * number).save(tmp_path / part / kind / f"{number}.png")
    data = DataConfig(f"folder:{tmp_path}", noise=0)
    config = replace(CONFIG, data=data, train=replace(CONFIG.train, batch_size=8))
    run = run_study(config, tmp_path / "run", stages=["train"])
    Image.new("L", (8, 8), 21).save(tmp_path / "test" / "dog" / "1.png")
    said = []
    run_study(config, run.path, stages=["train"], say=said.append)
    assert said == ["[1/1] train: begins"]
    Image.new("L", (8, 8), 20).save(tmp_path / "test" / "dog" / "1.png")
    said.clear()
    run_study(config, run.path, stages=["train"], say=said.append)
    assert said == ["[1/1] train: finished before, reused"]


def test_commands_share_one_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["--model", "lenet", "--epochs", "1", "--batch-size", "256", "--examples", "300"]
    few = ["--localized", "3", "--max-units", "2", "--edited", "0", "--retrain-epochs", "1"]
    main(["train", *settings])
    before = files(tmp_path)
    main(["rewind", *settings, *few])
    main(["run", *settings, *few, "--skip", "controls"])
    assert before.items() < files(tmp_path).items()
    assert capsys.readouterr().err.count("] train: begins") == 1
    assert len(list((tmp_path / "runs").glob("train-*"))) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]
    run = load_run(tmp_path / "runs" / "digits-lenet-seed0")
    assert set(run.seconds) == set(STAGES) - {"controls"}
    assert (run.path / "report.html").exists()


def test_what_is_made_of_a_run_is_sealed_as_sha256sum_wants_it(copy: Path) -> None:
    for sums in copy.rglob("SHA256SUMS"):
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=sums.parent, check=True)
    names = [line.split("  ")[1] for line in (copy / "SHA256SUMS").read_text().splitlines()]
    assert names == ["metrics.csv", "metrics.json", "run.json"]


def test_a_failure_leaves_what_is_finished(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(copy))

    before = files(copy)
    other = replace(CONFIG, train=replace(CONFIG.train, epochs=2))
    with monkeypatch.context() as patch:
        patch.setattr("memloc_ext.training.loop.save_checkpoint", full)
        with pytest.raises(OSError, match="No space left"):
            run_study(other, copy, stages=("train",))
    assert files(copy) == before
    said = []
    run = run_study(other, copy, stages=("train",), say=said.append)
    assert said == ["[1/1] train: goes on"]
    assert len(run.histories["plain"]) == 3


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', '{"data": 1}', "[]", '{"a":' * 500 + "1" + "}" * 500])
def test_a_file_of_something_else_is_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json: must be JSON"):
        run_study(CONFIG, tmp_path, stages=("train",))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": content}


def test_a_run_or_a_stage_in_use_is_refused(copy: Path) -> None:
    with locked(copy), pytest.raises(ValueError, match=r"run is in use by another command"):
        run_study(CONFIG, copy, stages=("train",))
    with locked(again(copy, "train")), pytest.raises(ValueError, match=r"train-\w{8} is in use by another command"):
        run_study(CONFIG, copy / "other", store=copy, stages=("train",))
    run_study(CONFIG, copy / "other", store=copy, stages=("train",))


def test_what_a_killed_write_left_is_removed(copy: Path) -> None:
    left = again(copy, "train") / "checkpoints" / ".epoch_001.safetensors.0123456789abcdef.tmp"
    left.write_bytes(b"half")
    run_study(CONFIG, copy, stages=("train",))
    assert not left.exists()


def test_a_missing_checkpoint_is_named(copy: Path) -> None:
    (folder(copy, "train") / "checkpoints" / "epoch_001.safetensors").unlink()
    again(copy, "localize")
    with pytest.raises(FileNotFoundError, match=r"train-\w{8} lacks the checkpoint of epoch 1; delete it to train"):
        run_study(CONFIG, copy, stages=("localize",))


def test_a_damaged_checkpoint_is_named(copy: Path) -> None:
    file = folder(copy, "train") / "checkpoints" / "epoch_001.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    again(copy, "localize")
    with pytest.raises(ValueError, match=r"epoch_001\.safetensors: cannot be loaded"):
        run_study(CONFIG, copy, stages=("localize",))
    assert list(load_run(copy).histories) == ["plain", "example_tied"]


def test_a_checkpoint_of_another_dtype_is_named(copy: Path) -> None:
    file = folder(copy, "train") / "checkpoints" / "epoch_001.safetensors"
    saved = load_checkpoint(file)
    weight = saved.model["conv1.0.weight"]
    save_checkpoint(file.parent, replace(saved, model=saved.model | {"conv1.0.weight": weight.to(torch.complex64)}))
    again(copy, "localize")
    with pytest.raises(ValueError, match=r"epoch_001\.safetensors must be of this model, whose conv1.0.weight is"):
        run_study(CONFIG, copy, stages=("localize",))


def test_a_training_without_an_account_is_another(copy: Path) -> None:
    said = []
    run = run_study(replace(CONFIG, account=False), copy, stages=("train",), say=said.append)
    assert said == ["[1/1] train: begins"]
    assert run.accounting is None
    with pytest.raises(ValueError, match="needs a training that keeps an account"):
        run_study(replace(CONFIG, account=False), copy, stages=("account",))


def test_a_run_does_not_take_the_results_of_other_settings(copy: Path) -> None:
    stored = json.loads((copy / "run.json").read_text())
    stored["config"]["train"]["epochs"] = 2
    (copy / "run.json").write_text(json.dumps(stored))
    Result(copy).finish("run.json")
    with pytest.raises(ValueError, match=r"run\.json: must have the settings of .*train-"):
        load_run(copy)


def test_a_run_from_before_there_was_a_setting_has_its_default(finished: Run, copy: Path) -> None:
    run, stage = copy / "run.json", folder(copy, "dropout") / "stage.json"
    stored, about = (json.loads(file.read_text()) for file in (run, stage))
    del stored["config"]["dropout"]["channel_dim"]
    del about["source"]["settings"]["dropout"]["channel_dim"]
    stored["stages"]["dropout"] = Source(**about["source"]).folder
    stored["stages"]["localize-dropout"] = "localize-dropout-00000000"  # which this run has not done
    run.write_text(json.dumps(stored))
    stage.write_text(json.dumps(about))
    stage.parent.rename(copy / stored["stages"]["dropout"])
    Result(copy).finish("run.json")
    Result(copy / stored["stages"]["dropout"]).finish()
    assert load_run(copy).metrics == finished.metrics
    stored["config"]["dropout"]["channel_dim"] = -1
    run.write_text(json.dumps(stored))
    Result(copy).finish("run.json")
    with pytest.raises(ValueError, match=r"run\.json: must have the settings of .*dropout-"):
        load_run(copy)


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
