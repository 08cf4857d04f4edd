"""One dropout mask for all examples: the control that is just a narrower network."""

from __future__ import annotations

import torch
from torch import Tensor

from memloc_ext.nn.example_tied_dropout import TiedChannels
from memloc_ext.ops.example_tied_dropout import call


class FixedDropout(TiedChannels):
    """Keep the same channels for every example, in training and in evaluation.

    The mask is that of example 0 under `ExampleTiedDropout` with the same settings, so as many channels are active as
    each example has there. Kept activations are not rescaled.

    Args:
        p_gen: Share of channels that are always kept, in ``[0, 1]``: the first ``floor(p_gen * C)``.
        p_mem: Probability that any other channel is kept, in ``[0, 1]``.
        seed: Names the draw, any int64.
        site: Number of this layer among those that share the seed, in ``[0, 2**32)``.
        channel_dim: See `ExampleTiedDropout`.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, baselines.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero the channels outside the mask."""
        dim, kept = self.dim_and_kept(x)
        ids = torch.zeros(1, dtype=torch.int64, device=x.device).expand(x.shape[0])
        return call(x, ids, kept, self.p_mem, self.seed, self.site, dim)
