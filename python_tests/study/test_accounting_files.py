import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memloc_ext.probes import EpochAccount, GroupAccount, ParameterAccount
from memloc_ext.study.accounting_files import (
    MODEL,
    Accounting,
    account_path,
    load_account,
    load_accounting,
    save_account,
)

COST = {"plain_step": 1.0, "accounted_step": 1.1, "step_ratio": 1.1, "epoch_end": 0.0, "ratio": 1.1, "pairs": 3}


def make_account(num: int = 5) -> EpochAccount:
    generator = torch.Generator().manual_seed(0)
    row = GroupAccount(1.0, 0.5, 1.25, -0.5, 0.875, 2.0, 3.0)
    return EpochAccount(
        model=replace(row, auc=None, memorized_example_norm=None),
        groups={"conv1": row, "head": replace(row, clean=0.0)},
        parameters={f"{name}.weight": ParameterAccount(1.0, 0.5, 1.25, -0.5) for name in ("conv1", "head")},
        example_norms=torch.rand(num, 2, generator=generator),
        memorized=torch.arange(num) % 2 == 1,
        indices=torch.arange(num) + 7,
    )


def test_an_account_comes_back_and_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    account, path = make_account(), account_path(tmp_path, 3)
    assert path == tmp_path / "epoch_003.npz"
    save_account(path, account)
    loaded = load_account(path)
    for name in ("model", "groups", "parameters"):
        assert getattr(loaded, name) == getattr(account, name)
    for name in ("example_norms", "memorized", "indices"):
        assert torch.equal(getattr(loaded, name), getattr(account, name))
    save_account(tmp_path / "again.npz", loaded)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    with np.load(path, allow_pickle=False) as arrays:
        assert (arrays["norms"].dtype, arrays["norms"].shape) == (np.float32, (5, 2))


@pytest.mark.parametrize("kept", [0, 1, 100, -1000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = account_path(tmp_path, 3)
    save_account(path, make_account())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"epoch_003\.npz: cannot be loaded as the account of an epoch"):
        load_account(path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = account_path(tmp_path, 3)
    save_account(path, make_account(10_000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"epoch_003\.npz: cannot be loaded as the account of an epoch"):
        load_account(path)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("norms", np.zeros((5, 3), np.float32)),
        ("norms", np.zeros((5, 2))),
        ("memorized", np.zeros(4, bool)),
        ("group_table", np.zeros((2, 7))),
        ("parameters", np.zeros(2)),
        ("parameter_table", np.zeros(4)),
    ],
)
def test_arrays_of_another_kind_are_named(tmp_path: Path, name: str, array: np.ndarray) -> None:
    path = account_path(tmp_path, 3)
    save_account(path, make_account())
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{**arrays, name: array})
    with pytest.raises(ValueError, match=rf"epoch_003\.npz: is no account of an epoch: {name} is"):
        load_account(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": np.zeros((5, 2), ">f4")}, "norms is >f4"),
        ({"groups": np.array(["head", "head"])}, "groups must differ"),
        ({"group_table": np.full((3, 7), np.inf)}, "its numbers must be finite"),
        ({"parameter_table": np.full((2, 4), np.nan)}, "its numbers must be finite"),
    ],
)
def test_arrays_with_something_else_in_them_are_named(
    tmp_path: Path, change: dict[str, np.ndarray], message: str
) -> None:
    path = account_path(tmp_path, 3)
    save_account(path, make_account())
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{**arrays, **change})
    with pytest.raises(ValueError, match=rf"epoch_003\.npz: is no account of an epoch: {message}"):
        load_account(path)
    np.savez_compressed(path, **arrays)
    with pytest.raises(ValueError, match=r"epoch_003\.npz: .* compressed data, which could fill the memory"):
        load_account(path)


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    path = account_path(tmp_path, 3)
    save_account(path, make_account())
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{**arrays, "groups": np.array([{}, {}], dtype=object)})
    with pytest.raises(ValueError, match=r"epoch_003\.npz: cannot be loaded"):
        load_account(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    row = {"clean": 1.0, "memorized": 0.5, "total": 1.25, "cosine": -0.5}
    group = {**row, "auc": None, "clean_example_norm": 2.0, "memorized_example_norm": None}
    rows = [{"epoch": epoch, "group": name, **group} for epoch in (1, 2) for name in ("conv1", "head", MODEL)]
    (tmp_path / "accounting.json").write_text(json.dumps(rows))
    (tmp_path / "accounting_parameters.json").write_text(json.dumps([{"epoch": 1, "parameter": "head.weight", **row}]))
    (tmp_path / "accounting_cost.json").write_text(json.dumps(COST))
    return tmp_path


def test_the_tables_are_read(folder: Path) -> None:
    accounting = load_accounting(folder)
    assert isinstance(accounting, Accounting)
    assert (accounting.groups, accounting.epochs) == (["conv1", "head"], [1, 2])
    assert accounting.column("clean") == accounting.column("clean", "head") == [1.0, 1.0]
    assert accounting.column("auc") == [None, None]
    assert accounting.cost == COST


@pytest.mark.parametrize("name", ["accounting.json", "accounting_parameters.json", "accounting_cost.json"])
@pytest.mark.parametrize("text", ["[", "{}x", "[]", '[{"epoch": 1}]', '{"ratio": "little"}'])
def test_a_damaged_table_is_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        load_accounting(folder)


@pytest.mark.parametrize("change", [{"clean": "1"}, {"epoch": 1.5}, {"group": None}, {"more": 1}])
def test_a_damaged_row_is_found(folder: Path, change: dict) -> None:
    rows = json.loads((folder / "accounting.json").read_text())
    rows[2] |= change
    (folder / "accounting.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"accounting\.json: must be a table of epoch, group, clean"):
        load_accounting(folder)
