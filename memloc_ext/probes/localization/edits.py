"""What switching the units of one example off does to all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from memloc_ext._version import __version__
from memloc_ext.ablation import apply_ablation
from memloc_ext.data import Dataset
from memloc_ext.files import parsed
from memloc_ext.parts import Parts, fingerprint, spread_parts
from memloc_ext.probes.accuracy import accuracy
from memloc_ext.probes.evaluation import Accuracy


@dataclass(frozen=True)
class EditedAccuracy:
    """Accuracy with units of one example switched off, mean over examples: shares in ``[0, 1]``, None without examples.

    Attributes:
        units: Mean number of units that are off.
        examples: Number of examples in the mean.
        clean: Clean training examples predicted as their label.
        memorized: Memorized training examples predicted as the label they were given.
        test: Test examples predicted as their label; None where they were not evaluated.
    """

    units: float
    examples: int
    clean: float | None
    memorized: float | None
    test: float | None


def edited_accuracy(
    model: nn.Module,
    dataset: Dataset,
    edits: Sequence[Sequence[tuple[str, int]]],
    channel_dims: Mapping[str, int],
    *,
    test: bool = True,
    parts: Parts | None = None,
) -> tuple[EditedAccuracy, list[EditedAccuracy]]:
    """Switch the units of each example off one after another, and evaluate the model after each.

    Several processes share the examples: call it in each of them.

    Args:
        model: In the dropout mode it is in; left as it was.
        dataset: What it is evaluated on.
        edits: The units of each example in their order; at least one example.
        channel_dims: Site to the dimension of its units, see `Localization`.
        test: Whether to look at the test examples.
        parts: Where the results of single examples are kept; None keeps none.

    Returns:
        The accuracy with all units of an example off, mean over the examples; and the curve: the accuracy after the
        first k units, for k = 0, 1, ..., each the mean over the examples that have at least k units.
    """
    test_data = dataset.test if test else None
    plain = accuracy(model, dataset.train, test=test_data)

    def follow(units: Sequence[tuple[str, int]]) -> list[dict[str, float | None]]:
        result = []
        for k in range(1, len(units) + 1):
            with apply_ablation(model, units[:k], channel_dims=channel_dims):
                result.append(asdict(accuracy(model, dataset.train, test=test_data)))
        return result

    common = fingerprint(__version__, model.state_dict(), _columns(dataset, test), channel_dims)
    work = {f"edit_{place:04d}_{fingerprint(common, units)}": units for place, units in enumerate(edits)}
    results = [[plain, *rows] for rows in spread_parts(follow, work, parts, partial(parsed, list[Accuracy]))]
    longest = max(len(result) for result in results)
    curve = [_mean(k, [result[k] for result in results if len(result) > k]) for k in range(longest)]
    units = sum(len(result) - 1 for result in results) / len(results)
    return _mean(units, [result[-1] for result in results]), curve


def sampled(dataset: Dataset, limit: int, generator: torch.Generator) -> Dataset:
    """Return a data set with at most so many clean training, memorized training and test examples, drawn at random."""
    train, test = dataset.train, dataset.test
    rows = [_drawn(kind.nonzero()[:, 0].cpu(), limit, generator) for kind in (~train.memorized, train.memorized)]
    test_rows = _drawn(torch.arange(len(test)), limit, generator)
    return replace(dataset, train=train.subset(torch.cat(rows)), test=test.subset(test_rows))


def _drawn(rows: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:limit]]


def _columns(dataset: Dataset, test: bool) -> list[Tensor]:
    splits = [dataset.train, dataset.test] if test else [dataset.train]
    return [column for split in splits for column in (*split.batch(torch.arange(len(split))), split.memorized)]


def _mean(units: float, results: Sequence[Accuracy]) -> EditedAccuracy:
    return EditedAccuracy(
        units,
        len(results),
        *(_mean_or_none(getattr(result, name) for result in results) for name in ("clean", "memorized", "test")),
    )


def _mean_or_none(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
