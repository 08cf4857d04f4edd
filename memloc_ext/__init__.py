"""Where does a neural network memorize? Fast PyTorch operators and the probes built on them."""

from memloc_ext import data, models, nn, ops, probes, training
from memloc_ext._libraries import has_cuda_kernels
from memloc_ext._version import __version__
from memloc_ext.ablation import ablation_losses, apply_ablation
from memloc_ext.accounting import GradientAccountant, Projection
from memloc_ext.nn import example_ids
from memloc_ext.probes import account_epoch, accuracy, audit, localize, localize_dataset, retrain, rewind

__all__ = [
    "GradientAccountant",
    "Projection",
    "__version__",
    "ablation_losses",
    "account_epoch",
    "accuracy",
    "apply_ablation",
    "audit",
    "data",
    "example_ids",
    "has_cuda_kernels",
    "localize",
    "localize_dataset",
    "models",
    "nn",
    "ops",
    "probes",
    "retrain",
    "rewind",
    "training",
]
