"""What a network does with units switched off: one at a time, for every example, far cheaper than by running it.

A map, in the order of a scan:

- `signature`: what a model is given and returns, taken apart into tensors, and what its outputs are worth to a task.
- `recorder` runs a model once on one example and notes each call of an operator in a `recording`. `channels` follows
  where the channels of tensors are.
- `recording_cache` keeps recordings for the next call, as long as only the values of the model's tensors change.
- `sites` says which recorded values hold the units of a module, and which modules are searched by default.
- `network`: a recording with its sites, and how much memory they take.
- `interpreter` runs a recording for rows: the unchanged network (`Graph`), and from a site on many variants (`Suffix`).
  `rows` runs one call for many variants; `deltas` keeps a change to a few channels as small as it is through operators
  on single elements, pooling and reshapes; `layers` has a convolution or linear layer meet the one changed channel.
- `scan`: `ablation_losses`, every unit of some sites off, one at a time.
- `edits`: `apply_ablation`, units switched off by hooks; `weights`: the weights of a layer and changes of a few.
- `unit_sets`, `weight_sets`: what `memloc_ext.localize` has switched off, or changed, for each example on its own.
- `model_runs`: the slow way of models that cannot be recorded.
"""

from memloc_ext.ablation.edits import AppliedAblation, apply_ablation
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ablation.scan import AblationLosses, ablation_losses
from memloc_ext.ablation.signature import Judged
from memloc_ext.ablation.weights import AppliedChanges, WeightChange

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
