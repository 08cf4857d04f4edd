"""Show a training while it runs. The packages are imported on first use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

Report = Callable[[dict[str, float]], object]
"""Takes the record of an epoch."""


@contextlib.contextmanager
def progress_bar(epochs: int, done: int) -> Iterator[Report]:
    """Show the epochs, and the numbers of the newest record, on the standard error output if that is a terminal.

    Args:
        epochs: Epochs of the whole training.
        done: Epochs that an earlier run finished.

    Raises:
        ImportError: If tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "tqdm is not installed; run: pip install 'memloc_ext[study]', or pass progress=False"
        ) from error
    with tqdm(total=epochs, initial=done, unit="epoch", dynamic_ncols=True, disable=None) as bar:

        def report(record: dict[str, float]) -> None:
            numbers = {name: value for name, value in record.items() if name != "epoch"}
            bar.set_postfix(numbers, refresh=False)
            bar.update(record["epoch"] - bar.n)

        yield report


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
