import csv
import json
from pathlib import Path
from typing import Any

import pytest
from made_probes import made_rewinding

from memloc_ext.probes import Accuracy, Rewinding
from memloc_ext.study.rewinding_files import load_rewinding, save_rewinding


@pytest.mark.parametrize(
    "rewinding",
    [
        made_rewinding(),
        made_rewinding({"a": [1 / 3], "b": [None]}, (7,)),
        Rewinding(Accuracy(1 / 3, None, None, None), {}),
    ],
)
def test_a_rewinding_comes_back_and_has_the_same_bytes_every_time(tmp_path: Path, rewinding: Rewinding) -> None:
    save_rewinding(tmp_path, rewinding)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert files.keys() == {"rewinding.csv", "rewinding.json"}
    loaded = load_rewinding(tmp_path)
    assert loaded == rewinding
    assert list(loaded.groups) == list(rewinding.groups)
    save_rewinding(tmp_path, loaded)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_the_table_has_a_row_per_cell(tmp_path: Path) -> None:
    save_rewinding(tmp_path, made_rewinding())
    with open(tmp_path / "rewinding.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["group"], row["epoch"], row["buffers"]) for row in rows[:5]] == [
        ("(unchanged)", "", ""),
        ("conv1", "0", "False"),
        ("conv1", "0", "True"),
        ("conv1", "2", "False"),
        ("conv1", "2", "True"),
    ]
    assert [(row["epoch"], row["buffers"], row["memorized"]) for row in rows if row["group"] == "head"] == [
        ("0", "", "0.7"),
        ("2", "", "0.96"),
    ]


@pytest.mark.parametrize("text", ["[", "3", "null", "[]", '{"a": 1}', '[{"group": 1}]', "[3]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "rewinding.json").write_text(text)
    with pytest.raises(ValueError, match=r"rewinding\.json"):
        load_rewinding(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"rewinding\.json"):
        load_rewinding(tmp_path)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, {"group": "conv1"}),
        (0, {"epoch": 0}),
        (0, {"clean": 1.5}),
        (1, {"group": "(unchanged)"}),
        (1, {"group": "head"}),
        (1, {"group": None}),
        (1, {"epoch": 1}),
        (1, {"epoch": -1}),
        (1, {"epoch": True}),
        (1, {"buffers": True}),
        (1, {"buffers": None}),
        (2, {"buffers": 1}),
        (2, {"memorized": "0.1"}),
        (2, {"test": True}),
        (2, {"more": 1}),
        (-1, {"epoch": 3}),
        (-1, {"epoch": 0}),
        (-1, {"buffers": True}),
    ],
)
def test_a_damaged_row_is_found(tmp_path: Path, place: int, change: dict[str, Any]) -> None:
    save_rewinding(tmp_path, made_rewinding())
    file = tmp_path / "rewinding.json"
    rows = json.loads(file.read_text())
    rows[place] |= change
    file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"rewinding\.json: must be a table of group, epoch, buffers, clean"):
        load_rewinding(tmp_path)


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_missing_row_is_found(tmp_path: Path, place: int) -> None:
    save_rewinding(tmp_path, made_rewinding())
    file = tmp_path / "rewinding.json"
    rows = json.loads(file.read_text())
    del rows[place]
    file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"rewinding\.json"):
        load_rewinding(tmp_path)
