"""The model without memorization channels that a run writes, and what it says of it."""

import shutil
from pathlib import Path

import pytest
import torch

from memloc_ext.nn import dropout_mode
from memloc_ext.study import (
    DataConfig,
    ModelConfig,
    Run,
    StudyConfig,
    build_model,
    load_data,
    load_run,
    run_study,
    stages,
)
from memloc_ext.study.config import DropoutConfig
from memloc_ext.study.report import sections, shipped
from memloc_ext.study.shipped import Channels
from memloc_ext.study.store import Result
from memloc_ext.training import TrainConfig, load_checkpoint

CONFIG = StudyConfig(
    data=DataConfig(examples=200, test_examples=40),
    model=ModelConfig("lenet"),
    dropout=DropoutConfig(rescale="authors"),
    train=TrainConfig(epochs=1, batch_size=64, learning_rate=0.05),
)
LINEAR = 64 * 120 + 120 * 84 + 84 * 10
SMALL = 64 * 24 + 24 * 16 + 16 * 10
CONVOLUTIONS = 64 * 25 * 6 + 16 * 25 * 6 * 16
"""Multiply-adds of LeNet on images of 8 x 8."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_study(CONFIG, tmp_path_factory.mktemp("shipped") / "run", stages=["dropout"])


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    return shutil.copytree(finished.path, tmp_path / "run")


def folder(run: Path) -> Path:
    (found,) = run.glob("dropout-????????")
    return found


def test_the_program_computes_what_mode_drop_does(finished: Run) -> None:
    result = folder(finished.path)
    assert "shipped.pt2" in (result / "SHA256SUMS").read_text()
    program = torch.export.load(result / "shipped.pt2").module()
    dataset = load_data(CONFIG)
    model = build_model(CONFIG, dataset, "example_tied").eval()
    model.load_state_dict(load_checkpoint(result / "checkpoints" / "epoch_001.safetensors").model)
    for count in (1, 2, 40):
        x = dataset.test.batch(torch.arange(count)).x
        with dropout_mode(model, "drop"), torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)


def test_costs_are_those_of_both_models(finished: Run) -> None:
    found = finished.shipped
    assert found is not None
    assert found.examples == 64
    biases, filters = 6 + 16 + 10, 25 * 6 + 25 * 6 * 16
    assert found.full.parameters == LINEAR + 120 + 84 + biases + filters
    assert found.shipped.parameters == SMALL + 24 + 16 + biases + filters
    assert found.full.multiply_adds == LINEAR + CONVOLUTIONS
    assert found.shipped.multiply_adds == SMALL + CONVOLUTIONS
    assert min(found.full.seconds, found.shipped.seconds, found.time_ratio) > 0
    assert found.sites == {"fc1": Channels(120, 96, 0), "fc2": Channels(84, 68, 0)}


def test_a_report_has_both(finished: Run) -> None:
    found = finished.shipped
    assert found is not None
    table = shipped.table(found)
    assert [row[1:3] for row in table.rows] == [["21,386", "66,600"], ["4,702", "50,080"]]
    (section,) = sections.sections(finished)
    assert table in section.tables
    (sentence,) = shipped.answers(found)
    assert sentence in section.answers
    assert sentence in sections.summary(finished)
    assert "has 22.0 % of its parameters and 75.2 % of its multiply-adds" in sentence
    shares = {
        n.what.rpartition(", ")[2]: n.value for n in sections.numbers(finished) if "without the channels" in n.what
    }
    assert shares == {
        "parameters of the full network": 4702 / 21386,
        "multiply-adds of the full network": 50080 / 66600,
    }


def test_it_is_made_once(copy: Path) -> None:
    program = folder(copy) / "shipped.pt2"
    before = program.stat().st_mtime_ns
    run_study(CONFIG, copy, stages=["dropout"])
    assert program.stat().st_mtime_ns == before


def test_a_result_from_before_there_was_one_has_none(finished: Run, copy: Path) -> None:
    for name in ("shipped.pt2", "shipped.json", "SHA256SUMS"):
        (folder(copy) / name).unlink()
    Result(folder(copy)).finish()
    run = load_run(copy)
    assert run.shipped is None
    assert run.metrics == finished.metrics
    assert all(number not in sections.numbers(run) for number in shipped.numbers(finished.shipped))


def test_a_model_that_cannot_be_exported_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("it branches on its inputs")

    monkeypatch.setattr(stages, "ship", fails)
    with pytest.warns(UserWarning, match=r"shipped\.pt2 is left out: RuntimeError: it branches on its inputs"):
        run = run_study(CONFIG, tmp_path / "run", stages=["dropout"])
    assert run.shipped is None
    assert not list(folder(run.path).glob("shipped*"))
    assert {row["mode"] for row in run.metrics} == {"train", "test", "drop", "drop_gen"}
