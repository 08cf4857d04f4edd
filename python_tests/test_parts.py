import os
from pathlib import Path

import pytest
import torch

from memloc_ext.parts import PartFiles, fingerprint, spread_parts

WORK = {"a": 1, "b": 2, "c": 3}


def test_what_is_kept_is_not_done_again(tmp_path: Path) -> None:
    done = []

    def square(number: int) -> list[float]:
        done.append(number)
        return [number**2, 0.1]

    folder = tmp_path / "new" / "parts"
    PartFiles(folder).put("b", ["kept"])
    for _ in range(2):
        assert spread_parts(square, WORK, PartFiles(folder), list) == [[1, 0.1], ["kept"], [9, 0.1]]
    assert done == [1, 3]
    assert spread_parts(square, WORK, None, list) == [[1, 0.1], [4, 0.1], [9, 0.1]]
    assert spread_parts(square, {}, PartFiles(folder), list) == []


def test_a_kill_loses_the_part_in_work_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, left = os.replace, [2]

    def interrupt(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        spread_parts(str, WORK, PartFiles(tmp_path), str)
    done = []
    work = spread_parts(lambda number: done.append(number) or str(number), WORK, PartFiles(tmp_path), str)
    assert work == ["1", "2", "3"]
    assert done == [2, 3]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    PartFiles(tmp_path).put("a", "one")
    stored = (tmp_path / "a.json").read_text()
    damages = {
        '{"half': "must be JSON",
        '"one"': "its checksum is wrong",
        stored.replace("one", "two"): "its checksum is wrong",
        stored: "must be a part of this stage: invalid literal .*one",
    }
    for text, message in damages.items():
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=rf"a\.json: {message}"):
            spread_parts(str, WORK, PartFiles(tmp_path), int)


def test_a_part_that_is_nested_deeply_is_named(tmp_path: Path) -> None:
    def parse(_: object) -> None:
        raise RecursionError("too deep")

    PartFiles(tmp_path).put("a", [[]])
    with pytest.raises(ValueError, match=r"a\.json: must be a part of this stage: too deep"):
        spread_parts(str, WORK, PartFiles(tmp_path), parse)


def test_a_fingerprint_stands_for_every_value() -> None:
    values = [
        (),
        (1,),
        (1.0,),
        ("1",),
        (None,),
        ([1],),
        (1, 2),
        ([1, 2],),
        ([1], 2),
        ({"a": 1},),
        ({"b": 1},),
        (torch.tensor(1),),
        (torch.tensor([1]),),
        (torch.tensor([1], dtype=torch.int32),),
        (torch.tensor([1.0, 2.0, 3.0]),),
        (torch.tensor([1.0, 3.0, 2.0]),),
        (torch.tensor([], dtype=torch.bool),),
        (torch.tensor([True]),),
        (torch.tensor([1.0], dtype=torch.bfloat16),),
    ]
    names = [fingerprint(*value) for value in values]
    assert len(set(names)) == len(values)
    assert all(len(name) == 32 and name.isalnum() for name in names)
    column = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(column.T) == fingerprint(column.T.contiguous()) != fingerprint(column)
    assert names[0] == fingerprint()
