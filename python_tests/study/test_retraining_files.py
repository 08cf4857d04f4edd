import csv
import json
from pathlib import Path
from typing import Any

import pytest
from made_probes import made_retraining

from memloc_ext.probes import Accuracy, Retraining
from memloc_ext.study.retraining_files import load_retraining, save_retraining


@pytest.mark.parametrize(
    "retraining",
    [made_retraining(), made_retraining({"a": [None, None]}), Retraining(Accuracy(1 / 3, None, None, None), {})],
)
def test_a_retraining_comes_back_and_has_the_same_bytes_every_time(tmp_path: Path, retraining: Retraining) -> None:
    save_retraining(tmp_path, retraining)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert files.keys() == {"retraining.csv", "retraining.json"}
    loaded = load_retraining(tmp_path)
    assert loaded == retraining
    assert list(loaded.groups) == list(retraining.groups)
    save_retraining(tmp_path, loaded)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_the_table_has_a_row_per_epoch(tmp_path: Path) -> None:
    save_retraining(tmp_path, made_retraining())
    with open(tmp_path / "retraining.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["group"], row["epoch"], row["loss"], row["stopped"]) for row in rows[:6]] == [
        ("(unchanged)", "", "", ""),
        ("conv1", "0", "", ""),
        ("conv1", "1", "1.0", ""),
        ("conv1", "2", "0.5", "ended"),
        ("blocks.0", "0", "", ""),
        ("blocks.0", "1", "1.0", "fitted"),
    ]


@pytest.mark.parametrize("text", ["[", "3", "null", "[]", '{"a": 1}', '[{"group": 1}]', "[3]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "retraining.json").write_text(text)
    with pytest.raises(ValueError, match=r"retraining\.json"):
        load_retraining(tmp_path)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, {"group": "conv1"}),
        (1, {"epoch": 1}),
        (1, {"loss": 1.0}),
        (1, {"stopped": "ended"}),
        (2, {"loss": None}),
        (2, {"loss": "1"}),
        (2, {"memorized": -0.5}),
        (3, {"stopped": None}),
        (3, {"stopped": "tired"}),
        (3, {"more": 1}),
    ],
)
def test_a_damaged_row_is_found(tmp_path: Path, place: int, change: dict[str, Any]) -> None:
    save_retraining(tmp_path, made_retraining())
    file = tmp_path / "retraining.json"
    rows = json.loads(file.read_text())
    rows[place] |= change
    file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"retraining\.json: must be a table of group, epoch, loss, clean"):
        load_retraining(tmp_path)
