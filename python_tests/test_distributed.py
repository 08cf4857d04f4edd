"""Two processes, as torchrun starts them, do what one does; if one dies, so does the run."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_jobs import fail
from distributed_jobs import work as job
from processes import Ended, start_torchrun, torchrun

from memloc_ext import distributed
from memloc_ext.study.accounting import account_path, load_account
from memloc_ext.training import list_checkpoints, load_checkpoint, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job.chunks, "CHUNK", 3)  # which the job changes, as the next, and are set back
            patch.setattr(job.accounting, "_SECONDS", 0)
            job.work(folder)
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def two(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(one / "plain", folder / "from_one", ignore=shutil.ignore_patterns("epoch_002.safetensors"))
    done = torchrun(job.main, folder)
    assert done.status == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def outcome(one: Path, two: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What one process has seen, and what the first and the second of two have."""
    files = (one / "rank0.pt", two / "rank0.pt", two / "rank1.pt")
    return tuple(torch.load(file, weights_only=False) for file in files)


def assert_same_training(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(actual["state"], expected["state"])
    for record, other in zip(actual["history"], expected["history"], strict=True):
        assert record == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "compiled", "tied", "accounted", "accounted_vit"])
def test_training_equals_one_process_to_rounding(outcome, name: str) -> None:
    one, first, _ = outcome
    assert_same_training(first[name], one[name])


@pytest.mark.parametrize("name", ["plain", "compiled", "tied", "batch_norm", "accounted", "accounted_vit", "overflow"])
def test_all_processes_end_with_the_same_model_and_history(outcome, two: Path, name: str) -> None:
    _, first, second = outcome
    assert first[name]["history"] == second[name]["history"]
    checkpoints = list_checkpoints(two / name)
    saved = load_checkpoint(checkpoints[max(checkpoints)]).model
    for key, value in first[name]["state"].items():
        assert torch.equal(value, second[name]["state"][key]), key
        assert torch.equal(value, saved[key]), key


def test_a_training_goes_on_in_another_number_of_processes(outcome, two: Path, tmp_path: Path) -> None:
    one, first, _ = outcome
    assert_same_training(first["from_one"], one["plain"])
    shutil.copytree(two / "plain", tmp_path / "run", ignore=shutil.ignore_patterns("epoch_002.safetensors"))
    model, dataset = job.make(job.lenet), job.make_data()
    history = train(
        model,
        dataset.train,
        job.CONFIG,
        checkpoints=tmp_path / "run",
        evaluate=lambda model: {"clean": job.accuracy(model, dataset.train).clean},
        progress=False,
    )
    assert_same_training({"history": history, "state": model.state_dict()}, one["plain"])


@pytest.mark.parametrize(("name", "epochs"), [("accounted", 2), ("accounted_vit", 1)])
def test_the_account_equals_that_of_one_process_to_rounding(one: Path, two: Path, name: str, epochs: int) -> None:
    for epoch in range(1, epochs + 1):
        single, several = (load_account(account_path(at / name / "accounting", epoch)) for at in (one, two))
        for field in ("example_norms", "example_cosines", "memorized", "indices"):
            both = getattr(several, field), getattr(single, field)
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-6, equal_nan=True)
        assert not single.example_cosines.isnan().all()
        for rows, others in (
            (single.parameters, several.parameters),
            ({**single.groups, "": single.model}, {**several.groups, "": several.model}),
        ):
            assert rows.keys() == others.keys()
            for key, row in rows.items():
                assert vars(others[key]) == pytest.approx(vars(row), rel=1e-3, abs=1e-5), key


def test_a_batch_that_overflows_in_one_process_counts_in_none(one: Path, two: Path) -> None:
    single, several = (load_account(account_path(at / "overflow" / "accounting", 1)) for at in (one, two))
    lost = single.total_norms.isnan()
    assert 16 <= lost.sum() < 51
    assert torch.equal(several.total_norms.isnan(), lost)
    torch.testing.assert_close(several.model.total, single.model.total, rtol=0.02, atol=0)


def test_an_infinite_loss_of_one_process_is_an_error_in_all(outcome) -> None:
    messages = [seen["infinite"] for seen in outcome]
    assert messages[0].startswith("FloatingPointError: train: loss must be finite, got ")
    assert messages == messages[:1] * 3


def test_a_batch_with_too_few_examples_is_an_error(outcome, two: Path) -> None:
    assert outcome[0]["few"] == "no error"
    message = "ValueError: train: batch_size must leave an example of every batch to each of 2 processes, got 10, "
    assert outcome[1]["few"] == outcome[2]["few"] == message + "which leaves 1 of 51 examples for the last batch"
    assert not (two / "few").exists()


def test_draws_differ_between_processes_but_not_the_order(outcome) -> None:
    one, first, second = outcome
    assert torch.equal(one["order"], first["order"])
    assert torch.equal(one["order"], second["order"])
    assert torch.equal(one["draws"], first["draws"])
    assert not torch.equal(one["draws"], second["draws"])


def test_the_cost_is_measured_in_one_process(outcome) -> None:
    _, first, second = outcome
    assert first["cost"] == second["cost"]
    assert first["cost"]["pairs"] >= 3


def test_the_localization_is_that_of_one_process(outcome, one: Path, two: Path) -> None:
    expected = outcome[0]["localization"]
    assert {row["status"] for row in expected["examples"]} >= {"flipped"}
    assert expected["kinds"]["memorized"]["edited"]["examples"] == 3
    assert all(seen["localization"] == expected for seen in outcome)
    assert all(seen["again"] for seen in outcome)
    names = {path.name for path in (one / "parts").iterdir()}
    assert len(names) == 2 * 3 + 2 * 3  # of 8 examples per kind, 3 at a time, and 3 edits per kind
    assert {path.name for path in (two / "parts").iterdir()} == names


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (lambda folder: start_torchrun(fail.__file__, folder, "killed"), "SIGKILL"),
        (lambda folder: torchrun(fail.main, folder, "raises"), "memloc: process 1 of 2: OSError: the disk is on fire"),
    ],
    ids=["killed", "raises"],
)
def test_a_process_that_dies_ends_the_run(tmp_path: Path, start: Callable[[Path], Ended], message: str) -> None:
    begun = time.monotonic()
    done = start(tmp_path)
    assert done.status != 0
    assert message in done.stderr
    assert time.monotonic() - begun < 60
    assert 0 in list_checkpoints(tmp_path)
    assert 2 not in list_checkpoints(tmp_path)
    model = job.make(job.lenet)
    assert len(train(model, job.make_data().train, job.CONFIG, checkpoints=tmp_path, progress=False)) == 3


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with distributed.process_group(torch.device("cpu")):
        assert (distributed.world_size(), distributed.rank(), distributed.local_rank()) == (1, 0, 0)
        assert distributed.spread(str, [1, 2]) == ["1", "2"]
        assert distributed.once(lambda: 3) == 3
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("device", "missing"), [("cpu", "gloo"), ("cuda:0", "gloo"), ("cuda:0", "nccl")])
def test_a_missing_backend_is_named(monkeypatch: pytest.MonkeyPatch, device: str, missing: str) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("gloo", "nccl"):
        monkeypatch.setattr(torch.distributed, f"is_{name}_available", lambda name=name: name != missing)
    message = f"(?i)a torch that was built with {missing} for {device}; start without"
    with pytest.raises(ImportError, match=message), distributed.process_group(torch.device(device)):
        pass


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert distributed.own_device(cuda) == cuda
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.own_device(cuda) == torch.device("cuda:1")
    assert distributed.own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be cuda without a number under torchrun"):
        distributed.own_device(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--nproc-per-node must be at most the number of GPUs, 1, got 2"):
        distributed.own_device(cuda)
