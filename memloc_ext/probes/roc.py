"""How well a score tells two kinds of examples apart."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def roc_auc(scores: Tensor, positive: Tensor) -> float | None:
    """Return the area under the ROC curve of "positive" predicted from a score.

    It is the probability that a positive example, drawn at random, has a higher score than a negative one; a tie counts
    one half.

    Args:
        scores: ``[N]``, floating point, without NaN.
        positive: The examples to be found, ``[N]``, bool.

    Returns:
        In ``[0, 1]``; None where there is no positive example or no negative one.
    """
    marked = positive.cpu().numpy()
    num_positive = int(marked.sum())
    pairs = num_positive * (len(marked) - num_positive)
    if pairs == 0:
        return None
    _, place, counts = np.unique(scores.cpu().numpy(), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # equal scores share the mean of their ranks, which start at 1
    return float((ranks[place[marked]].sum() - num_positive * (num_positive + 1) / 2) / pairs)
