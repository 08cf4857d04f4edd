"""Data sets whose examples are marked as memorized or clean.

`load` returns a `Dataset` with a train and a test `Split`. Which training examples are memorized is decided by
mislabelling some of them (`with_label_noise`), or by a file that tells the atypical ones (`memorized_mask`,
`with_memorized`).
"""

from memloc_ext.data.folder import folder
from memloc_ext.data.images import LazyImages
from memloc_ext.data.loaders import cifar10, digits, load, mnist, svhn
from memloc_ext.data.memorized import memorized_mask, with_memorized
from memloc_ext.data.noise import NoiseKind, label_noise, with_label_noise
from memloc_ext.data.split import Dataset, Split

__all__ = [
    "Dataset",
    "LazyImages",
    "NoiseKind",
    "Split",
    "cifar10",
    "digits",
    "folder",
    "label_noise",
    "load",
    "memorized_mask",
    "mnist",
    "svhn",
    "with_label_noise",
    "with_memorized",
]
