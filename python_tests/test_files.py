import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memloc_ext.files import read_bytes, read_json, remove_temporaries, shown, write_atomically, write_json

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    write_atomically(str(path), b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_others_may_read_the_file_as_the_umask_says(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", b"")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, error, old):
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)

    def fail(*arguments):
        assert len(os.listdir(tmp_path)) == 1 + (old is not None)  # the new bytes are on their way, beside the old
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == ({} if old is None else {"a.bin": old})


def test_the_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("folder" if is_folder(fd) else "file"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "a.bin", b"new")
    assert calls == ["file", "replace", "folder"]


def is_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def test_only_bytes_are_taken(tmp_path):
    with pytest.raises(TypeError, match="write_atomically: data must be bytes, got str"):
        write_atomically(tmp_path / "a.bin", "text")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "a.bin", b"")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)  # each example overwrites
@given(VALUES)
def test_json_comes_back(tmp_path, value):
    path = tmp_path / "a.json"
    write_json(path, value)
    assert read_json(path) == value


def test_json_of_equal_values_is_equal(tmp_path):
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    write_json(first, {"b": 1, "a": ["ö"]})
    write_json(second, {"a": ["ö"], "b": 1})
    assert first.read_text(encoding="utf-8") == '{\n  "a": [\n    "ö"\n  ],\n  "b": 1\n}\n'
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("value", "error"),
    [(float("nan"), ValueError), ([float("inf")], ValueError), ("\ud800", ValueError), (1j, TypeError)],
)
def test_what_json_cannot_hold_is_refused(tmp_path, value, error):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(error, match=r"write_json: value for .*a\.json must be JSON: "):
        write_json(path, value)
    assert read_json(path) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": 1', b"NaN", b"[-Infinity]", b"1e999", b"\xff\xfe\xfa", b"[" * 100_000],
)
def test_a_corrupt_file_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: must be JSON: "):
        read_json(path)


@dataclass(frozen=True)
class Row:
    name: str
    count: int
    share: float | None = None
    place: Path | None = None

    def __post_init__(self):
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")


def test_a_value_comes_back_as_its_type(tmp_path):
    rows = [Row("a", 1, 0.5, Path("b/c")), Row("b", 2)]
    write_json(tmp_path / "a.json", rows)
    assert read_json(tmp_path / "a.json", list[Row]) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"name": "a"}]', "missing required field `count`"),
        ('[{"name": "a", "count": -1}]', "integers must not be negative, got -1"),
        ('[{"name": "a", "count": true}]', r"Expected `int`, got `bool` - at `\$\[0\].count`"),
        ('[{"name": "a", "count": 1, "share": 2}]', r"share must be in \[0, 1\], got 2"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_another_type_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json: must be JSON.*{message}"):
        read_json(tmp_path / "a.json", list[Row])


def test_pipes_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=f"{path.name}: must be a file"):
            read_bytes(path)


def test_what_killed_writers_left_is_removed(tmp_path):
    (tmp_path / "inner").mkdir()
    names = [".a.json.0123456789abcdef.tmp", "inner/.epoch_000.pt.fedcba9876543210.tmp"]
    kept = ["a.tmp", ".a.tmp", "inner/.a.json.0123456789abcdef.bak"]
    for name in names + kept:
        (tmp_path / name).touch()
    (tmp_path / ".folder.0123456789abcdef.tmp").mkdir()
    remove_temporaries(tmp_path)
    assert (tmp_path / ".folder.0123456789abcdef.tmp").is_dir()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


def test_a_missing_file_is_not_corrupt(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json")


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "table.json", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/table\.json'"):
        write_atomically(tmp_path / "table.json", b"new")
    assert (tmp_path / "table.json").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("two\nlines\tof text", "two lines of text"),
        ("a\x1b[31mb\ud800", r"a\x1b[31mb\ud800"),
        ("a" * 600 + "b" * 600, f"{'a' * 500} ... {'b' * 500}"),
        ({"a": [1]}, "{'a': [1]}"),
        (None, "None"),
    ],
)
def test_an_error_shows_a_value_in_one_short_line(value, text):
    assert shown(value) == text


def test_what_does_not_fit_into_the_memory_is_named(tmp_path: Path) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**43)  # a hole
    with pytest.raises(ValueError, match=r"a\.json: must fit into the memory, got 8796093022208 bytes"):
        read_json(tmp_path / "a.json")
