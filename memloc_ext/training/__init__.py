"""Training with a checkpoint after every epoch, from which the probes read the past of a model."""

from memloc_ext.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from memloc_ext.training.config import TrainConfig, cosine, triangular
from memloc_ext.training.epoch import Backward
from memloc_ext.training.loop import train

__all__ = [
    "Backward",
    "Checkpoint",
    "TrainConfig",
    "cosine",
    "list_checkpoints",
    "load_checkpoint",
    "save_checkpoint",
    "train",
    "triangular",
]
