"""Show a training while it runs. The packages are imported on first use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from memloc_ext.progress import progress

Report = Callable[[dict[str, float]], object]
"""Takes the record of an epoch."""


@contextlib.contextmanager
def progress_bar(epochs: int, done: int) -> Iterator[Report]:
    """Show the epochs, of which an earlier run did some, and the newest record, see `memloc_ext.progress`."""
    with progress(epochs, done, "epoch") as show:
        yield lambda record: show(int(record["epoch"]), {k: v for k, v in record.items() if k != "epoch"})


@contextlib.contextmanager
def tensorboard_log(folder: Path, first: int) -> Iterator[Report]:
    """Write every number of a record as a scalar for TensorBoard, with the epoch as its step.

    What an earlier run logged from the first epoch on is discarded. ImportError if tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard is not installed; run: pip install 'memloc_ext[tensorboard]'") from error
    with SummaryWriter(str(folder), purge_step=first) as writer:

        def report(record: dict[str, float]) -> None:
            for name, value in record.items():
                if name != "epoch":
                    writer.add_scalar(name, value, int(record["epoch"]))
            writer.flush()

        yield report
