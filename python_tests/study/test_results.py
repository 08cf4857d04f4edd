"""What stages found, on disk: it comes back, and what is not it is named."""

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_localization import NOTHING, make_localization
from made_probes import made_retraining, made_rewinding

from memloc_ext.probes import Accuracy, GroupAccount, ParameterAccount, Retraining, Rewinding
from memloc_ext.study import results
from memloc_ext.study.accounting import AccountedEpoch
from memloc_ext.study.store import Result

NONE = Accuracy(1 / 3, None, None, None)
ACCOUNT = GroupAccount(1.0, 0.5, 1.25, -0.5, None, 2.0, None)
PARAMETERS = {"b.weight": ParameterAccount(1.0, 0.5, 1.25, -0.5)}
TABLE = [AccountedEpoch(epoch, ACCOUNT, {"b": ACCOUNT, "a": ACCOUNT}, PARAMETERS) for epoch in (1, 2)]
COST = dict.fromkeys(results.COSTS, 1.5) | {"pairs": 3}
KINDS: dict[str, tuple[Callable[[Result], Any], Any, Any]] = {
    "rewinding": (results.load_rewinding, made_rewinding(), Rewinding.rows),
    "retraining": (results.load_retraining, made_retraining(), Retraining.rows),
    "localization": (results.load_localization, make_localization(), results.localization_rows),
    "history": (results.load_history, [{"epoch": 0}, {"epoch": 1, "loss": 0.1}], list),
    "metrics": (
        results.load_metrics,
        {"train": NONE, "drop": NONE},
        lambda modes: results.metrics_rows("plain", modes),
    ),
}


def wrong_already() -> Any:
    found = make_localization(**NOTHING)
    return replace(found, examples=[replace(row, status="already_wrong", units=[]) for row in found.examples])


def saved(folder: Path, name: str, result: Any) -> Result:
    rows = KINDS[name][2](result)
    results.save(folder, name, result, rows)
    Result(folder).finish()
    return Result(folder)


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("name", "result"),
    [
        *((name, result) for name, (_, result, _) in KINDS.items()),
        ("rewinding", made_rewinding({"a": [1 / 3], "b": [None]}, (7,))),
        ("retraining", made_retraining({"a": [None, None]})),
        ("localization", make_localization(("clean",))),
        ("localization", wrong_already()),
    ],
)
def test_a_result_comes_back_and_has_the_same_bytes_every_time(tmp_path: Path, name: str, result: Any) -> None:
    stored = saved(tmp_path, name, result)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert files.keys() == {f"{name}.csv", f"{name}.json", "SHA256SUMS"}
    loaded = KINDS[name][0](stored)
    assert loaded == result
    groups = getattr(result, "groups", {})
    assert list(getattr(loaded, "groups", {})) == list(groups)
    saved(tmp_path, name, loaded)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_the_account_of_all_epochs_comes_back(tmp_path: Path) -> None:
    results.save(tmp_path, "accounting", TABLE, results.accounting_rows(TABLE))
    results.save(tmp_path, "accounting_cost", COST)
    Result(tmp_path).finish()
    loaded, cost = results.load_accounting(Result(tmp_path))
    assert (loaded, cost) == (TABLE, COST)
    assert list(loaded[0].groups) == ["b", "a"]
    rows = table(tmp_path, "accounting")
    assert [(row["epoch"], row["group"]) for row in rows[:3]] == [("1", "b"), ("1", "a"), ("1", "(model)")]
    assert results.parameter_rows(TABLE)[1] == {"epoch": 2, "parameter": "b.weight", **vars(PARAMETERS["b.weight"])}


def test_tables_have_a_row_per_cell_epoch_and_example(tmp_path: Path) -> None:
    for name in ("rewinding", "retraining", "localization"):
        saved(tmp_path, name, KINDS[name][1])
    assert [(row["group"], row["epoch"], row["buffers"]) for row in table(tmp_path, "rewinding")[:3]] == [
        ("conv1", "0", "False"),
        ("conv1", "0", "True"),
        ("conv1", "2", "False"),
    ]
    assert [(row["epoch"], row["buffers"]) for row in table(tmp_path, "rewinding") if row["group"] == "head"] == [
        ("0", ""),
        ("2", ""),
    ]
    assert [(row["group"], row["epoch"]) for row in table(tmp_path, "retraining")[:4]] == [
        ("conv1", "0"),
        ("conv1", "1"),
        ("conv1", "2"),
        ("blocks.0", "0"),
    ]
    rows = table(tmp_path, "localization")
    assert len(rows) == 6
    assert (rows[1]["sites"], rows[1]["unit_numbers"]) == ("conv1 blocks.0:heads blocks.0:heads", "3 5 0")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", ["[", "3", "null", "[]", '{"a": 1}', '[{"example": 1}]', "[3]"])
def test_something_else_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / f"{name}.json").write_text(text)
    Result(tmp_path).finish()
    with pytest.raises(ValueError, match=rf"{name}\.json: "):
        KINDS[name][0](Result(tmp_path))


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("rewinding", ("unchanged", "clean"), 1.5),
        ("rewinding", ("groups", "conv1", "epochs", 0, "epoch"), 2),
        ("rewinding", ("groups", "conv1", "epochs", 0, "epoch"), -1),
        ("rewinding", ("groups", "conv1", "epochs", 0, "epoch"), True),
        ("rewinding", ("groups", "conv1", "epochs", 0, "with_buffers", "test"), "0.1"),
        ("rewinding", ("groups", "conv1", "has_buffers"), None),
        ("rewinding", ("groups", "head", "epochs"), []),
        ("retraining", ("groups", "conv1", "epochs", 1, "epoch"), 0),
        ("retraining", ("groups", "conv1", "epochs", 1, "loss"), "1"),
        ("retraining", ("groups", "conv1", "stopped"), "tired"),
        ("retraining", ("groups", "conv1", "epochs"), []),
        ("localization", ("examples", 0, "example"), 1.5),
        ("localization", ("examples", 0, "kind"), "odd"),
        ("localization", ("examples", 0, "kind"), "clean"),
        ("localization", ("examples", 0, "status"), "lost"),
        ("localization", ("examples", 0, "units"), [["conv1", 6]]),
        ("localization", ("examples", 0, "units"), [["conv2", 1]]),
        ("localization", ("examples", 0, "units"), [["conv1"]]),
        ("localization", ("examples", 0, "loss"), None),
        ("localization", ("seconds",), "fast"),
        ("localization", ("sites",), []),
        ("localization", ("sites", 0, "units"), 2.5),
        ("localization", ("kinds",), {}),
        ("localization", ("kinds", "memorized"), None),
        ("localization", ("kinds", "memorized", "histogram"), [0, None]),
        ("localization", ("kinds", "memorized", "statuses", "lost"), 1),
        ("localization", ("kinds", "memorized", "sites"), {"conv1": 1}),
        ("localization", ("kinds", "clean", "edited", "test"), [1]),
        ("history", (1, "epoch"), 2),
        ("history", (1, "loss"), None),
        ("metrics", ("drop", "clean"), -0.5),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path: Path, name: str, place: tuple[Any, ...], value: Any) -> None:
    saved(tmp_path, name, KINDS[name][1])
    file = tmp_path / f"{name}.json"
    whole = inner = json.loads(file.read_text())
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=rf"{name}\.json: must have the checksum that .*SHA256SUMS says"):
        KINDS[name][0](Result(tmp_path))
    Result(tmp_path).finish()  # whoever makes such a file can make its checksum
    with pytest.raises(ValueError, match=rf"{name}\.json: "):
        KINDS[name][0](Result(tmp_path))


def test_checksums_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b c.json").write_text("[1]")
    for name in (".lock", "parts/x.json", "tensorboard/events"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    Result(tmp_path).finish()
    digest = hashlib.sha256(b"[1]").hexdigest()
    assert (tmp_path / "SHA256SUMS").read_text() == f"{digest}  inner/b c.json\n"
    assert Result(tmp_path).read("inner/b c.json", list[int]) == [1]
    (tmp_path / "SHA256SUMS").write_text("nothing\n")
    with pytest.raises(ValueError, match="SHA256SUMS: must hold a checksum and a name in each line"):
        Result(tmp_path).read("inner/b c.json", list[int])
