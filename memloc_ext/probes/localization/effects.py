"""What units do to examples, exactly, and to the population."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.ablation.candidates import Candidates
from memloc_ext.ablation.losses import judge, wide
from memloc_ext.ablation.network import Network
from memloc_ext.ablation.switched import Switched
from memloc_ext.ablation.weights import ChangedWeights

Sets = Switched | ChangedWeights


def verify(
    network: Network, candidates: Candidates, sets: Sets, inputs: Sequence[Tensor], y: Tensor
) -> tuple[Tensor, Tensor]:
    """Return loss and prediction with each candidate off too, ``[examples, candidates]``.

    Args:
        network: To run.
        candidates: Of the examples.
        sets: What is off already.
        inputs: As of `Graph.examples`.
        y: Their labels.
    """
    edits = sets.edits()
    losses = torch.empty(candidates.units.shape, dtype=torch.float64, device=y.device)
    predicted = torch.empty_like(candidates.units)
    with torch.no_grad():
        unchanged = network.graph.examples(inputs, network.needed, edits)
        for s, suffix in enumerate(network.suffixes):
            here = (candidates.units >= sets.starts[s]) & (candidates.units < sets.starts[s + 1])
            rows, columns = here.nonzero(as_tuple=True)
            for begin in range(0, len(rows), network.rows_at_once[s]):
                part = slice(begin, begin + network.rows_at_once[s])
                row, column = rows[part], columns[part]
                slab = sets.slab(s, candidates, row, column, unchanged)
                loss, label = judge(suffix.run(unchanged, row, slab, edits)[:, 0], y[row])
                losses[row, column], predicted[row, column] = loss.double(), label
    return losses, predicted


class Population:
    """The reference examples, whose mean loss is not to rise.

    Args:
        network: To run.
        reference: See `localize`.
        nothing: The set of one example of which nothing is off.

    Attributes:
        loss: Mean of the unchanged network.
        effect: Of units on it, see `Switched.total`.
    """

    def __init__(self, network: Network, reference: Sequence[Tensor], nothing: Sets) -> None:
        self.network, self.inputs, self.y = network, reference_inputs(network, reference), reference[1]
        self.effect, self.loss = self._total(nothing, torch.ones(len(self.y), device=self.y.device))

    def refreshed(self, own: Sets, without: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the effect of units where some are off already.

        Args:
            own: Which: the set of one example.
            without: An example and its label, that does not count where it is among the reference.
        """
        weights = torch.ones(len(self.y), device=self.y.device)
        if without is not None:
            x, y = without
            weights = weights.masked_fill((self.inputs[0] == x).flatten(1).all(1) & (self.y == y), 0)
        return self._total(own, weights)[0]

    def exact(self, candidates: Candidates, sets: Sets) -> Tensor:
        """Return the mean loss with each candidate off too, ``[examples, candidates]``."""
        means, step = [], self.network.examples_at_once
        for i in range(len(candidates.units)):
            total = torch.zeros(candidates.units.shape[1], dtype=torch.float64, device=self.y.device)
            for begin in range(0, len(self.y), step):
                part = slice(begin, begin + step)
                x, y = [t[part] for t in self.inputs], self.y[part]
                own = sets.of(torch.full_like(y, i))
                losses, _ = verify(self.network, candidates.repeated(i, len(y)), own, x, y)
                total += losses.sum(0)
            means.append(total / len(self.y))
        return torch.stack(means)

    def _total(self, own: Sets, weights: Tensor) -> tuple[Tensor, float]:
        """Return the effect of units on the loss, and the loss.

        Args:
            own: Units of one example, that are off in all of the reference.
            weights: Of the reference examples in the sum over them, that is divided by their number.
        """
        totals, value, step = [], 0.0, self.network.gradients_at_once
        for begin in range(0, len(self.y), step):
            part = slice(begin, begin + step)
            labels, weight = self.y[part], weights[part]

            def loss(logits: Tensor, labels: Tensor = labels, weight: Tensor = weight) -> Tensor:
                nonlocal value
                result = (F.cross_entropy(wide(logits), labels, reduction="none") * weight).sum() / len(self.y)
                value += float(result.detach())
                return result

            totals = [sum(totals) + own.of(torch.zeros_like(labels)).total([t[part] for t in self.inputs], loss)]
        return totals[0], value


def reference_inputs(network: Network, reference: Sequence[Tensor]) -> list[Tensor]:
    """Return the recording's inputs for the reference examples: with their ids if the model was recorded with some."""
    count = len(network.graph.recording.inputs)
    inputs = [reference[0], *reference[2:]]
    if len(inputs) != count:
        rule = "examples, labels and ids inside example_ids" if count == 2 else "examples and labels"
        raise ValueError(f"localize: reference must be {rule}, got {len(reference)} tensors")
    return inputs
