"""What a network does with units switched off: one at a time, for every example, far cheaper than by running it."""

from memloc_ext.ablation.edits import AppliedAblation, apply_ablation
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ablation.scan import AblationLosses, ablation_losses
from memloc_ext.ablation.signature import Judged
from memloc_ext.ablation.weight_changes import AppliedChanges, WeightChange

__all__ = [
    "AblationLosses",
    "AppliedAblation",
    "AppliedChanges",
    "Judged",
    "UnsupportedError",
    "WeightChange",
    "ablation_losses",
    "apply_ablation",
]
