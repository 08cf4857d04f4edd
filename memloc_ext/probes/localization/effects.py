"""What units do to examples, exactly, and to the population; and noisy copies of examples."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memloc_ext.ablation.network import Network
from memloc_ext.ablation.signature import Judged, Signature
from memloc_ext.ablation.unit_sets import Candidates, Switched
from memloc_ext.ablation.weight_sets import ChangedWeights
from memloc_ext.batches import tensors_of
from memloc_ext.tasks import Classification, example_losses

Sets = Switched | ChangedWeights


def verify(network: Network, candidates: Candidates, sets: Sets, inputs: Sequence[Tensor], y: Tensor) -> Judged:
    """Return what the examples are worth with each candidate off too, ``[examples, candidates]``; losses in float64."""
    edits = sets.edits()
    shape, device = candidates.units.shape, y.device
    found = Judged(
        torch.empty(shape, dtype=torch.float64, device=device),
        torch.empty(shape, dtype=torch.bool, device=device),
        torch.empty_like(candidates.units) if isinstance(network.task, Classification) else None,
    )
    with torch.no_grad():
        unchanged = network.graph.examples(inputs, network.needed, edits)
        ends = torch.tensor(sets.starts[1:], device=device)
        places = torch.bucketize(candidates.units.reshape(-1).contiguous(), ends, right=True)  # the site of each
        counts = (places[:, None] == torch.arange(len(ends), device=device)).sum(0).tolist()
        for s, (suffix, here) in enumerate(
            zip(network.suffixes, places.argsort(stable=True).split(counts), strict=True)
        ):
            rows, columns = here // shape[1], here % shape[1]
            for begin in range(0, len(rows), network.rows_at_once[s]):
                part = slice(begin, begin + network.rows_at_once[s])
                row, column = rows[part], columns[part]
                slab = sets.slab(s, candidates, row, column, unchanged)
                judged = network.judge(suffix.run(unchanged, row, slab, edits), y[row])
                for t, values in zip(found, judged, strict=True):
                    if t is not None and values is not None:
                        t[row, column] = values.to(t.dtype)
    return found


class Population:
    """The reference examples, whose mean loss is not to rise from that of the unchanged network, ``loss``.

    ``effect`` is that of units on it, see `Switched.total`; ``nothing`` is one example's set of which nothing is off.
    """

    def __init__(self, network: Network, reference: Sequence[Tensor], nothing: Sets) -> None:
        self.network, self.inputs, self.y = network, reference_inputs(network, *reference), reference[1]
        self.effect, self.loss = self._total(nothing, torch.ones(len(self.y), device=self.y.device))

    def refreshed(self, own: Sets, without: Sequence[Tensor]) -> Tensor:
        """Return the effect of units where those of one example's set are off already.

        ``without``: inputs and label of an example that does not count where it is among the reference; of none none.
        """
        weights = torch.ones(len(self.y), device=self.y.device)
        if without:
            *inputs, y = without
            pairs = [*zip(self.inputs, inputs, strict=False), (self.y, y)]
            same = [(t == other).reshape(len(t), -1).all(1) for t, other in pairs]
            weights = weights.masked_fill(torch.stack(same).all(0), 0)
        return self._total(own, weights)[0]

    def exact(self, candidates: Candidates, sets: Sets) -> Tensor:
        """Return the mean loss with each candidate off too, ``[examples, candidates]``."""
        means, step = [], self.network.examples_at_once
        for i in range(len(candidates.units)):
            total = torch.zeros(candidates.units.shape[1], dtype=torch.float64, device=self.y.device)
            for begin in range(0, len(self.y), step):
                part = slice(begin, begin + step)
                x, y = [t[part] for t in self.inputs], self.y[part]
                own = sets.of(torch.full((len(y),), i, device=y.device))
                total += verify(self.network, candidates.repeated(i, len(y)), own, x, y).loss.sum(0)
            means.append(total / len(self.y))
        return torch.stack(means)

    def _total(self, own: Sets, weights: Tensor) -> tuple[Tensor, float]:
        """Return the effect of units on the weighted loss over all of them, and it, with one example's set off."""
        total, step = torch.zeros((), device=self.y.device), self.network.gradients_at_once
        value = torch.zeros((), dtype=torch.float64, device=self.y.device)
        for begin in range(0, len(self.y), step):
            part = slice(begin, begin + step)
            labels, weight = self.y[part], weights[part]

            def loss(output: Any, labels: Tensor = labels, weight: Tensor = weight) -> Tensor:
                result = (example_losses(self.network.task, output, labels, len(labels)) * weight).sum() / len(self.y)
                value.add_(result.detach())
                return result

            sets = own.of(torch.zeros(len(labels), dtype=torch.int64, device=labels.device))
            total = total + sets.total([t[part] for t in self.inputs], loss)
        return total, float(value)


def reference_inputs(network: Network, x: Any, y: Tensor, ids: Tensor | None = None) -> list[Tensor]:
    """Return the recording's inputs for the reference examples: with their ids if the model was recorded with some."""
    inputs = [*tensors_of(x), *([] if ids is None else [ids])]
    if Signature(x, ids is not None).key != network.signature.key:
        rule = "examples, labels and ids inside example_ids" if network.signature.named else "examples and labels"
        raise ValueError(f"localize: reference must be {rule} of the form of x, got {len(inputs) + 1} tensors")
    return inputs


def noisy_copies(x: Tensor, copies: int, noise: float, seeds: Sequence[int]) -> Tensor:
    """Return copies of examples, ``[examples * copies, *]``, with Gaussian noise on them if they are floating.

    ``noise`` is its norm over that of the example; an example's seed gives the same draws wherever in a batch it is.
    """
    if noise == 0 or not x.is_floating_point():
        return x.repeat_interleave(copies, 0)
    found = []
    for example, seed in zip(x, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(copies, *example.shape, generator=generator).to(x)
        norms = draws.flatten(1).norm(dim=1).clamp_min(torch.finfo(draws.dtype).tiny)
        found.append(example + draws * (noise * example.norm() / norms).reshape(-1, *[1] * example.dim()))
    return torch.cat(found)


def seeds_of(tensors: Sequence[Tensor], seed: int) -> list[int]:
    """Return a seed for each example, that depends on nothing but its tensors, ``[examples, *]``, and ``seed``."""
    checks = [0] * len(tensors[0])
    for t in tensors:
        for i, example in enumerate(t):
            content = example.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
            checks[i] = zlib.crc32(content, checks[i])
    return [(seed * 1_000_003 + check) % (1 << 63) for check in checks]
