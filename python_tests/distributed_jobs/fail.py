"""A training in which the second process dies after the first epoch: ``fail.py <folder> killed|raises``."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from work import CONFIG, lenet, make, make_data

from memloc_ext import distributed
from memloc_ext.training import train


def die(model: nn.Module) -> dict[str, float]:
    if distributed.rank() == 1 and (folder / "epoch_000.safetensors").exists():
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("the disk is on fire")
    return {}


folder = Path(sys.argv[1])
torch.set_num_threads(1)
with distributed.process_group(torch.device("cpu")):
    train(make(lenet), make_data().train, CONFIG, checkpoints=folder, evaluate=die, progress=False)
