"""Results of stages on disk: a folder each, named by a hash of what it is made from, sealed when it is finished."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from memloc_ext.files import decode_json, read_bytes, read_json, remove_temporaries, write_atomically, write_json

SUMS = "SHA256SUMS"
"""File of a finished stage: the checksums of all others, for ``sha256sum -c``."""
ABOUT = "stage.json"
PARTS = "parts"
"""Folder of a stage in work: what is finished of it."""
LOGS = "tensorboard"
"""Folder of logs, which are no part of a result."""
_LOCK = ".lock"


@dataclass(frozen=True)
class Source:
    """All that the result of a stage depends on.

    Attributes:
        stage: Its name.
        versions: Of the packages that compute it.
        settings: Those that concern it.
        model: Fingerprint of the untrained model.
        data: Fingerprint of the data set, pixels and labels.
        needs: Stage to the hash of the source of its result, which this one reads.
    """

    stage: str
    versions: dict[str, str]
    settings: dict[str, Any]
    model: str
    data: str
    needs: dict[str, str]

    @property
    def hash(self) -> str:
        """SHA-256 of all of it, in hexadecimal."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()

    @property
    def folder(self) -> str:
        """Name of the folder of the result."""
        return f"{self.stage}-{self.hash[:8]}"


@dataclass(frozen=True)
class About:
    """What a result is made from, and the time of all processes that worked at it one after another."""

    source: Source
    seconds: float


@dataclass(frozen=True)
class Result:
    """The folder of a stage's result, finished, in work or not begun."""

    path: Path

    @property
    def finished(self) -> bool:
        """Whether all of the result is there."""
        return (self.path / SUMS).exists()

    @property
    def begun(self) -> bool:
        """Whether some of it is there."""
        return (self.path / ABOUT).exists()

    def about(self) -> About:
        """Read what is known of it, finished or not; see `read`."""
        return self.read(ABOUT, About) if self.finished else read_json(self.path / ABOUT, About)

    def read(self, name: str, kind: Any) -> Any:
        """Return a JSON file of a finished result as a type; ValueError names one that the stage did not write."""
        path = self.path / name
        stored = read_bytes(path)
        if hashlib.sha256(stored).hexdigest() != self._sums().get(name):
            raise ValueError(f"{path}: must have the checksum that {self.path / SUMS} says, it was damaged or edited")
        return decode_json(path, stored, kind)

    def has(self, name: str) -> bool:
        """Return whether a file is part of a finished result."""
        return name in self._sums()

    def write_about(self, source: Source, seconds: float) -> None:
        """Write what the result is made from, and how long it took until now."""
        write_json(self.path / ABOUT, About(source, seconds), sort_keys=False)

    def finish(self, *patterns: str) -> None:
        """Seal the result, or the files of some patterns: after this, it is finished, and its checksums are there."""
        found = {path for pattern in patterns or ["**/*"] for path in self.path.glob(pattern)}
        files = sorted(path for path in found if path.is_file() and _is_result(path, self.path))
        lines = [f"{_sha256(path)}  {path.relative_to(self.path).as_posix()}\n" for path in files]
        write_atomically(self.path / SUMS, "".join(lines).encode())

    def unseal(self) -> None:
        """Take the checksums away, before another file is written."""
        (self.path / SUMS).unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the folder from other processes, see `locked`, and clear it of what a kill left."""
        with locked(self.path):
            remove_temporaries(self.path)
            yield

    def _sums(self) -> dict[str, str]:
        path = self.path / SUMS
        text = read_bytes(path).decode(errors="replace")  # of bytes that are no text, no name fits
        lines = [re.fullmatch(r"([0-9a-f]{64})  ([^\n]+)", line) for line in text.splitlines()]
        if None in lines:
            raise ValueError(f"{path}: must hold a checksum and a name in each line")
        return {match[2]: match[1] for match in lines if match}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, which is created if missing, from other processes; ValueError if one writes to it."""
    import filelock  # torch brings it

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / _LOCK, blocking=False):
            yield
    except filelock.Timeout:
        raise ValueError(f"{folder} is in use by another command; wait for it, or give another --output") from None


def check_inside(folder: Path, root: Path) -> None:
    """Raise a ValueError if a folder in another, which may be a link, is or holds a link that leads out of that one.

    Files from a stranger could else have others read or written elsewhere, and folders of others removed.
    """
    inside = os.path.realpath(root)
    entries = (Path(found, name) for found, *names in os.walk(folder) for group in names for name in group)
    for entry in (folder, *entries):
        if entry == root or not entry.is_symlink():
            continue
        target = Path(os.path.realpath(entry))  # of a loop too
        if not target.is_relative_to(inside):
            raise ValueError(f"{entry}: must not lead out of {root}, to {target}")


def is_result(name: str) -> bool:
    """Return whether a name is one of a stage's folder."""
    return re.fullmatch(r"[a-z-]+-[0-9a-f]{8}", name, re.ASCII) is not None


def _is_result(path: Path, folder: Path) -> bool:
    first = path.relative_to(folder).parts[0]
    return first not in (SUMS, PARTS, LOGS) and not path.name.startswith(".")


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
