"""Files of a run that are damaged, or made by somebody who means harm: an error that names the file, and no more."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memloc_ext.data import memorized_mask
from memloc_ext.files import read_json
from memloc_ext.parts import PartFiles
from memloc_ext.study import DataConfig, ModelConfig, Run, StudyConfig, load_run, run_study
from memloc_ext.study.accounting import load_account
from memloc_ext.study.config import LocalizationConfig, RetrainConfig
from memloc_ext.study.stages import STAGES
from memloc_ext.study.store import is_result
from memloc_ext.training import TrainConfig, load_checkpoint, save_checkpoint

CONFIG = StudyConfig(
    data=DataConfig(examples=120, test_examples=30),
    model=ModelConfig("lenet"),
    train=TrainConfig(epochs=1, batch_size=64, learning_rate=0.05),
    retrain=RetrainConfig(retrain_epochs=1),
    localization=LocalizationConfig(localized=2, max_units=2, edited=1),
)
READ = [
    "run.json",
    *(f"{stage}/stage.json" for stage in ("train", "account", "rewind", "retrain", "localize", "audit", "dropout")),
    *(f"{stage}/SHA256SUMS" for stage in ("train", "localize")),
    "train/history.json",
    "train/metrics.json",
    "dropout/metrics.json",
    "dropout/shipped.json",
    "controls/fixed/history.json",
    "account/accounting.json",
    "account/accounting_cost.json",
    "rewind/rewinding.json",
    "retrain/retraining.json",
    "localize/localization.json",
    "audit/audit.json",
    "audit/audit_examples.json",
]
"""Files that `load_run` reads; the names of the stages stand for those of their folders."""
NOT_THESE = [
    b"", b"[", b"[]", b"{}", b"null", b'"text"', b"7", b"1" * 5000, b"[1e999]", b"[NaN]", b"[null]", b"[[]]", b"[{}]",
    b'{"settings": 1, "finished": 1, "seconds": 1}', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
]  # fmt: skip
LEAVES = (None, True, "x", "", -1, 0.5, 10**400, 10**18, [], {}, [[]], {"x": 1})
FLIPS = 25


def at(run: Path, name: str) -> Path:
    """The file of that name, in ``READ``, of a run."""
    stage, slash, inner = name.partition("/")
    (found,) = run.glob(f"{stage}-????????") if slash else [run]
    return found / (inner or name)


def seal(path: Path) -> None:
    """Give a file the checksum of what is in it now, as somebody who means harm would."""
    folder = next(folder for folder in path.parents if (folder / "SHA256SUMS").exists())
    name = path.relative_to(folder).as_posix()
    lines = [line for line in (folder / "SHA256SUMS").read_text().splitlines() if line.split("  ")[1] != name]
    lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}")
    (folder / "SHA256SUMS").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_study(CONFIG, tmp_path_factory.mktemp("hostile") / "run")


@pytest.fixture
def run(whole: Run, tmp_path: Path) -> Path:
    return shutil.copytree(whole.path, tmp_path / "run")


def damages(content: bytes, seed: int = 0) -> Iterator[bytes]:
    """The content cut off at several points, and with one bit flipped at each of several random ones."""
    for kept in {0, 1, 20, len(content) // 4, len(content) // 2, len(content) - 40, len(content) - 1}:
        yield content[:kept]
    draw = random.Random(seed)
    for bit in draw.sample(range(8 * len(content)), FLIPS):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def noticed(path: Path, content: bytes, read: Callable[[], Any], unharmed: Callable[[Any], bool]) -> bool:
    """Put a content into a file and read it: whether that is an error, which must name it; else it must be unharmed."""
    path.write_bytes(content)
    try:
        found = read()
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017
        return True
    assert unharmed(found), f"{path.name} was read as something else"
    return False


@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_of_a_run_is_named(whole: Run, run: Path, name: str) -> None:
    path, expected = at(run, name), replace(whole, path=run)
    expected = replace(expected, accounting=replace(whole.accounting, folder=at(run, "train/accounting")))  # type: ignore[type-var]
    content = path.read_bytes()
    found = [noticed(path, damage, lambda: load_run(run), expected.__eq__) for damage in damages(content)]
    if path.name != "SHA256SUMS":  # which also has the checksums of files that are not read here
        assert all(found)
    path.write_bytes(content)
    assert load_run(run) == expected


def test_a_damaged_checkpoint_account_or_part_is_named(run: Path, tmp_path: Path) -> None:
    PartFiles(tmp_path).put("part", {"rows": [{"share": i / 7} for i in range(20)]})
    checkpoint = at(run, "train/checkpoints/epoch_001.safetensors")
    account = at(run, "train/accounting/epoch_001.safetensors")
    cases = [
        (checkpoint, lambda: load_checkpoint(checkpoint), lambda found: {**found.model, "optimizer": found.optimizer}),
        (account, lambda: load_account(account), vars),
        (tmp_path / "part.json", lambda: PartFiles(tmp_path).get("part"), lambda found: found),
    ]
    for path, read, parts in cases:
        content, expected = path.read_bytes(), text(parts(read()))
        found = [noticed(path, d, read, lambda r, p=parts, e=expected: text(p(r)) == e) for d in damages(content)]
        assert sum(found) >= len(found) - 2  # a blank between two words of a JSON text may be another one


def text(value: Any) -> str:
    """Everything in a value, tensors with all elements."""
    with torch._tensor_str.printoptions(profile="full", precision=17):
        return repr(value)


@pytest.mark.parametrize("name", READ)
def test_a_file_of_another_kind_is_named(run: Path, name: str) -> None:
    path = at(run, name)
    for content in NOT_THESE:
        path.write_bytes(content)
        if path.name != "SHA256SUMS":
            seal(path)
        with pytest.raises(ValueError, match=path.name):
            load_run(run)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=rf"{path.name}: must be a file"):
        load_run(run)
    path.rmdir()
    os.mkfifo(path)  # nobody writes to it
    with pytest.raises(ValueError, match=rf"{path.name}: must be a file"):
        load_run(run)


@pytest.mark.parametrize("name", [name for name in READ if name.endswith(".json")])
def test_any_value_in_any_place_is_read_or_named(run: Path, name: str) -> None:
    path = at(run, name)
    value = read_json(path)
    places = list(inner(value))
    for place in random.Random(0).sample(places, min(8, len(places))):
        for leaf in LEAVES:
            path.write_text(json.dumps(changed(value, place, leaf)))
            seal(path)
            try:
                load_run(run)
            except ValueError as error:
                assert path.name in str(error) or "run.json" in str(error)  # noqa: PT017 - says what its stages are


def inner(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*place, key)
        yield from inner(item, (*place, key))


def changed(value: Any, place: tuple[Any, ...], leaf: Any) -> Any:
    copy = json.loads(json.dumps(value))
    at = copy
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = leaf
    return copy


@pytest.mark.parametrize("name", ["run.json", "rewind/stage.json", "rewind/rewinding.json"])
def test_going_on_with_a_damaged_run_keeps_its_results(run: Path, name: str) -> None:
    path = at(run, name)
    content = bytearray(path.read_bytes())
    content[content.index(b": ") + 3] ^= 1
    path.write_bytes(content)
    before = {file: file.read_bytes() for file in run.rglob("*-????????/*") if file.is_file()}
    with pytest.raises(ValueError, match=path.name):
        run_study(CONFIG, run)
    assert {file: file.read_bytes() for file in run.rglob("*-????????/*") if file.is_file()} == before


@pytest.mark.parametrize("link", [".lock", "figures", "train/checkpoints", "rewind/rewinding.json", "rewind/.lock"])
def test_a_link_out_of_a_run_is_refused(run: Path, tmp_path: Path, link: str) -> None:
    outside, path = tmp_path / "outside", at(run, link) if "/" in link else run / link
    outside.write_text("mine")
    if path.exists():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(os.path.relpath(outside, path.parent))
    for function in (lambda: load_run(run), lambda: run_study(CONFIG, run)):
        with pytest.raises(ValueError, match=rf"{path.name}: must not lead out of .*run, to .*outside"):
            function()
    assert outside.read_text() == "mine"


def test_a_link_out_of_the_store_is_refused(run: Path, tmp_path: Path) -> None:
    """Of a run whose stages lie beside it."""
    store = tmp_path / "store"
    store.mkdir()
    shutil.copytree(run, store / "own", ignore=lambda _, names: [name for name in names if is_result(name)])
    for folder in run.glob("*-????????"):
        folder.rename(store / folder.name)
    assert set(load_run(store / "own").seconds) == set(STAGES)
    stage = at(store, "rewind/x").parent
    stage.rename(tmp_path / stage.name)
    stage.symlink_to(tmp_path / stage.name)
    for function in (lambda: load_run(store / "own"), lambda: run_study(CONFIG, store / "own", store=store)):
        with pytest.raises(ValueError, match=rf"{stage.name}: must not lead out of .*store, to .*{stage.name}"):
            function()


def test_a_run_may_be_a_link_and_hold_some(whole: Run, run: Path, tmp_path: Path) -> None:
    checkpoints = at(run, "train/checkpoints")
    checkpoints.rename(run / "kept")
    checkpoints.symlink_to("../kept")
    (run / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to(run)
    assert load_run(tmp_path / "link").metrics == whole.metrics


@pytest.mark.parametrize("name", ["../train-12345678", "train-1234567/..", "/etc", "rewind-12345678", ""])
def test_no_path_is_taken_from_a_run(run: Path, name: str) -> None:
    stored = json.loads((run / "run.json").read_text())
    stored["stages"]["train"] = name
    (run / "run.json").write_text(json.dumps(stored))
    seal(run / "run.json")
    with pytest.raises(ValueError, match=r"run\.json: must hold the folder of train, got"):
        load_run(run)


class Harmful:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def array(value: Any, save: Callable[..., Any]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, np.array([value], dtype=object))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "make", "read"),
    [
        ("epoch_000.pt", pickle.dumps, load_checkpoint),
        ("epoch_000.pt", saved, load_checkpoint),
        ("epoch_000.pt", lambda value: saved({"model": {"weight": value}}), load_checkpoint),
        ("epoch_000.safetensors", pickle.dumps, load_checkpoint),
        ("epoch_001.safetensors", saved, load_account),
        ("scores.npy", pickle.dumps, lambda path: memorized_mask(path, 1)),
        ("scores.npy", lambda value: array(value, np.save), lambda path: memorized_mask(path, 1)),
        ("scores.npz", lambda value: array(value, np.savez), lambda path: memorized_mask(path, 1)),
    ],
)
def test_nothing_is_unpickled(
    tmp_path: Path, name: str, make: Callable[[Any], bytes], read: Callable[[Path], Any]
) -> None:
    (tmp_path / name).write_bytes(make(Harmful(tmp_path / "made")))
    with pytest.raises(ValueError, match=name):
        read(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_that_unfolds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "epoch_001.pt"
    path.write_bytes(saved({"epoch": 1}))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.writestr("../../outside", b"")
    with pytest.raises(ValueError, match=r"epoch_001\.pt: .* compressed data"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"conv1.0.weight": 1}}, "model must hold dense tensors by name, got int"),
        ({"model": {1: torch.zeros(1)}}, "model must hold dense tensors by name"),
        ({"model": {"a": torch.zeros(2, 2).to_sparse()}}, "model must hold dense tensors by name, got Tensor for a"),
        ({"history": [{"epoch": "0"}]}, "is no checkpoint: Expected .*history"),
        ({"history": [{0: 1.0}]}, "is no checkpoint: Expected .*history"),
        ({"config": {"seed": torch.zeros(2)}}, "is no checkpoint: Expected .*config"),
        ({"epoch": 3}, "must be of its epoch, got 3"),
    ],
)
def test_an_old_checkpoint_with_something_else_in_it_is_named(
    run: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "epoch_000.pt"
    stored = vars(load_checkpoint(at(run, "train/checkpoints/epoch_000.safetensors")))
    path.write_bytes(saved(stored))
    assert load_checkpoint(path).epoch == 0
    path.write_bytes(saved(stored | change))
    with pytest.raises(ValueError, match=rf"epoch_000\.pt: {message}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "model.conv1.0.weight must be None to continue"),
        ({"epoch": 3}, "must be of its epoch, got 3"),
        ({"history": [{"epoch": 1}]}, r"must hold a record per epoch, 0 to 0, got \[1\]"),
        ({"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}}}, "must hold the momentum"),
        ({"optimizer": {"state": {10**9: {"momentum_buffer": torch.zeros(1)}}}}, "must hold the momentum"),
        ({"scaler": {"scale": 1.0}}, "must hold the momentum of every parameter, and the scale"),
    ],
)
def test_a_checkpoint_with_something_else_in_it_is_named(run: Path, change: dict[str, Any], message: str) -> None:
    at(run, "train/SHA256SUMS").unlink()
    at(run, "train/checkpoints/epoch_001.safetensors").unlink()
    path = at(run, "train/checkpoints/epoch_000.safetensors")
    changed = save_checkpoint(run, replace(load_checkpoint(path), **change))
    changed.rename(path)
    with pytest.raises(ValueError, match=message) as error:
        run_study(CONFIG, run, stages=("train", "account"))
    assert str(path) in str(error.value)
