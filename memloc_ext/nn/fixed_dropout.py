"""One dropout mask for all examples: the control that is just a narrower network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memloc_ext.nn.example_tied_dropout import check_settings, checked_channel_dim, num_generalization
from memloc_ext.ops.example_tied_dropout import call


class FixedDropout(nn.Module):
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

    def __init__(
        self, p_gen: float = 0.2, p_mem: float = 0.1, *, seed: int = 0, site: int = 0, channel_dim: int | None = None
    ) -> None:
        super().__init__()
        check_settings(p_gen, p_mem, seed, site, channel_dim)
        self.p_gen = p_gen
        self.p_mem = p_mem
        self.seed = seed
        self.site = site
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Zero the channels outside the mask."""
        dim = checked_channel_dim(x, self.channel_dim)
        kept = num_generalization(self.p_gen, x.shape[dim])
        ids = torch.zeros(1, dtype=torch.int64, device=x.device).expand(x.shape[0])
        return call(x, ids, kept, self.p_mem, self.seed, self.site, dim)

    def extra_repr(self) -> str:
        """Show the settings."""
        return (
            f"p_gen={self.p_gen}, p_mem={self.p_mem}, seed={self.seed}, site={self.site}, "
            f"channel_dim={self.channel_dim}"
        )
