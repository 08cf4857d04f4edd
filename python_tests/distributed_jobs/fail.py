"""A training in which the second process dies after the first epoch: ``fail.py <folder> killed|raises``."""

import os
import signal
import sys
from pathlib import Path

import torch
from distributed_jobs.work import CONFIG, lenet, make, make_data
from torch import nn

from memloc_ext import distributed
from memloc_ext.training import train


def main(folder: Path, how: str) -> None:
    def die(model: nn.Module) -> dict[str, float]:
        if distributed.rank() == 1 and (folder / "epoch_000.safetensors").exists():
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk is on fire")
        return {}

    with distributed.process_group(torch.device("cpu")):
        train(make(lenet), make_data().train, CONFIG, checkpoints=folder, evaluate=die, progress=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
