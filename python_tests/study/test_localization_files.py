import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from made_localization import NOTHING, make_localization

from memloc_ext.study.localization_files import load_localization, save_localization


@pytest.mark.parametrize("change", [{}, NOTHING])
@pytest.mark.parametrize("kinds", [("memorized", "clean"), ("memorized",), ("clean",)])
def test_a_localization_comes_back_and_has_the_same_bytes_every_time(
    tmp_path: Path, kinds: tuple[str, ...], change: dict
) -> None:
    localization = make_localization(kinds, **change)
    save_localization(tmp_path, localization)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert files.keys() == {"localization.csv", "localization.json", "localization_summary.json"}
    loaded = load_localization(tmp_path)
    assert loaded == localization
    save_localization(tmp_path, loaded)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_the_table_has_a_row_per_example(tmp_path: Path) -> None:
    save_localization(tmp_path, make_localization())
    with open(tmp_path / "localization.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[1] == {
        "example": "1",
        "kind": "memorized",
        "status": "flipped",
        "num_units": "3",
        "units": "conv1:3 blocks.0:heads:5 blocks.0:heads:0",
        "loss": "1.5",
    }


def test_the_summary_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, replace = [], os.replace

    def note(source, target) -> None:
        written.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    save_localization(tmp_path, make_localization())
    assert written[-1] == "localization_summary.json"


@pytest.mark.parametrize("name", ["localization.json", "localization_summary.json"])
@pytest.mark.parametrize("text", ["[", "3", "null", '{"a": 1}', '[{"example": 1}]', "[3]"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    save_localization(tmp_path, make_localization())
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        load_localization(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_localization(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"example": 1.5},
        {"example": -1},
        {"kind": "odd"},
        {"status": "lost"},
        {"num_units": 2},
        {"units": "conv1:3 conv1:6 conv1:1"},
        {"units": "conv1:3 conv2:1 conv1:1"},
        {"units": "conv1:3 conv1 conv1:1"},
        {"units": None},
        {"loss": "0.1"},
        {"loss": None},
        {"more": 1},
    ],
)
def test_a_damaged_row_is_found(tmp_path: Path, change: dict) -> None:
    save_localization(tmp_path, make_localization())
    file = tmp_path / "localization.json"
    rows = json.loads(file.read_text())
    rows[1] |= change
    file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"localization\.json: must be a table of example, kind, status"):
        load_localization(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("seconds",), "fast"),
        (("seconds",), None),
        (("sites",), []),
        (("sites", 0, "units"), 2.5),
        (("sites", 0, "more"), 2),
        (("kinds",), {}),
        (("kinds", "memorized"), None),
        (("kinds", "memorized", "mean"), "3"),
        (("kinds", "memorized", "histogram"), [0, None]),
        (("kinds", "memorized", "histogram"), {}),
        (("kinds", "memorized", "statuses", "lost"), 1),
        (("kinds", "memorized", "sites", "conv1"), True),
        (("kinds", "memorized", "sites"), {"conv1": 1}),
        (("kinds", "clean", "edited", "test"), [1]),
        (("kinds", "clean", "curve", 0), None),
    ],
)
def test_a_damaged_summary_is_found(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    save_localization(tmp_path, make_localization())
    file = tmp_path / "localization_summary.json"
    summary = inner = json.loads(file.read_text())
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    file.write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"localization_summary\.json: must be the summary of a localization"):
        load_localization(tmp_path)
