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
    """Show the epochs, and the numbers of the newest record, see `memloc_ext.progress`.

    Args:
        epochs: Epochs of the whole training.
        done: Epochs that an earlier run finished.

    Raises:
        ImportError: If tqdm is not installed.
    """
    with progress(epochs, done, "epoch") as show:
        yield lambda record: show(int(record["epoch"]), {k: v for k, v in record.items() if k != "epoch"})


@contextlib.contextmanager
def tensorboard_log(folder: Path, first: int) -> Iterator[Report]:
    """Write every number of a record as a scalar for TensorBoard, with the epoch as its step.

    Args:
        folder: Of the event files; created if missing.
        first: First epoch to be reported; what an earlier run logged from there on is discarded.

    Raises:
        ImportError: If tensorboard is not installed.
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
