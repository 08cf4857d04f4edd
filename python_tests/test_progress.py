"""How far long work is: a bar on a terminal, a line every minute elsewhere."""

import io
import re
import sys
import time
from pathlib import Path

import pytest

from memloc_ext import progress as module
from memloc_ext.parts import PartFiles, spread_parts
from memloc_ext.progress import named, progress

WORK = {"a": 1, "b": 2, "c": 3}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_has_name_and_numbers_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with named("rewind"), progress(4, 1, "part") as report:
        report(4, {"loss": 0.5})
    assert re.search(r"rewind: 100%.*4/4 .*loss=0\.5", terminal.getvalue())


def test_lines_elsewhere_say_how_much_is_done(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(module, "EVERY", 0.05)
    with named("train"), progress(4, 1, "epoch") as report:
        time.sleep(0.2)
        report(3)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 1 of 4 epochs"
    assert lines[-1] == "train: 3 of 4 epochs"


def test_parts_are_counted_where_they_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    PartFiles(tmp_path).put("b", 4)
    assert spread_parts(lambda n: n**2, WORK, PartFiles(tmp_path / "quiet"), int) == [1, 4, 9]
    assert terminal.getvalue() == ""
    with named("rewind"):
        assert spread_parts(lambda n: n**2, WORK, PartFiles(tmp_path), int) == [1, 4, 9]
    assert re.search(r"rewind: 100%.*2/2 ", terminal.getvalue())
