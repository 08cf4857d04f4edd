"""Processes that start with torch and this package loaded: forks of one that has loaded them, which takes no time."""

import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["memloc_ext.study.command_line", "memloc_ext.study.report", "sklearn.model_selection"])
CONFIG = LaunchConfig(
    min_nodes=1,
    max_nodes=1,
    nproc_per_node=2,
    run_id="test",
    rdzv_backend="c10d",
    rdzv_endpoint="localhost:0",
    start_method="forkserver",
    max_restarts=0,
    monitor_interval=0.1,
)


@dataclass
class Ended:
    """What two processes printed, and which failed and how, if one did."""

    failed: str
    stdout: str
    stderr: str


def run(function: Callable[..., Any], *arguments: Any) -> int:
    """Run a function in a process; return its exit status, or minus the number of the signal that killed it."""
    process = FORKED.Process(target=_on_one_thread, args=(function, arguments))
    process.start()
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def start_two(function: Callable[..., Any], *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` in two processes; what one of them raises is raised here."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")


def torchrun(function: Callable[..., Any], *arguments: Any) -> Ended:
    """Run a function in each of two processes, as ``torchrun --nproc-per-node=2`` does a script."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    failed = ""
    with tempfile.TemporaryDirectory() as folder:
        CONFIG.logs_specs = DefaultLogsSpecs(folder, redirects=Std.ALL)
        try:
            elastic_launch(CONFIG, _on_one_thread)(function, arguments)
        except ChildFailedError as error:
            failed = str(error)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        logs = [sorted(Path(folder).rglob(name)) for name in ("stdout.log", "stderr.log")]
        return Ended(failed, *("".join(log.read_text() for log in found) for found in logs))


def _on_one_thread(function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    function(*arguments)
