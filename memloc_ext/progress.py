"""Progress of long work: a bar on a terminal; elsewhere a line every minute, of work that has a name."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Protocol

EVERY = 60.0
"""Seconds between two lines."""
_name: ContextVar[str | None] = ContextVar("_name", default=None)


class Report(Protocol):
    """Takes how much of the work is done."""

    def __call__(self, done: int, numbers: Mapping[str, float] | None = None) -> None:
        """Show that so many units are done, and the newest numbers."""
        ...


@contextlib.contextmanager
def named(name: str | None) -> Iterator[None]:
    """Show the progress of all work inside of the ``with`` under a name; None shows that of trainings alone."""
    token = _name.set(name)
    try:
        yield
    finally:
        _name.reset(token)


def is_named() -> bool:
    """Return whether work is done inside of `named`."""
    return _name.get() is not None


@contextlib.contextmanager
def progress(total: int, done: int, unit: str) -> Iterator[Report]:
    """Show how much of some work is done, of which an earlier run did some, on the standard error output.

    ImportError if tqdm is not installed.
    """
    name = _name.get()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "tqdm is not installed; run: pip install 'memloc_ext[study]', or pass progress=False"
        ) from error
    with contextlib.ExitStack() as stack:
        bar = tqdm(total=total, initial=done, unit=unit, desc=name, dynamic_ncols=True, disable=None)
        stack.enter_context(bar)
        state = {"done": done}
        if bar.disable and name is not None:
            stop = threading.Event()
            text = f"{name}: {{}} of {total} {unit}s"
            thread = threading.Thread(target=_lines, args=(text, state, stop), daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(stop.set)

        def report(done: int, numbers: Mapping[str, float] | None = None) -> None:
            state["done"] = done
            bar.set_postfix(numbers or {}, refresh=False)
            bar.update(done - bar.n)

        yield report


def _lines(text: str, state: Mapping[str, int], stop: threading.Event) -> None:
    while not stop.wait(EVERY):
        print(text.format(state["done"]), file=sys.stderr, flush=True)
