"""What switching the units of one example off does to all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from torch import nn

from memloc_ext._version import __version__
from memloc_ext.ablation import apply_ablation
from memloc_ext.files import parsed
from memloc_ext.parts import Parts, fingerprint, spread_parts
from memloc_ext.probes.accuracy import Accuracy, Evaluation


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
    evaluation: Evaluation,
    edits: Sequence[Sequence[tuple[str, int]]],
    channel_dims: Mapping[str, int],
    parts: Parts | None = None,
) -> tuple[EditedAccuracy, list[EditedAccuracy]]:
    """Switch the units of each example off one after another, and evaluate the model after each.

    Several processes share the examples, of which there is at least one: call it in each of them. The model stays in
    its dropout mode. ``channel_dims`` is that of `Localization`; results of single examples are kept as ``parts``.

    Returns:
        The accuracy with all units of an example off, mean over the examples; and the curve: the accuracy after the
        first k units, for k = 0, 1, ..., each the mean over the examples that have at least k units.
    """
    plain = evaluation.accuracy(model)

    def follow(units: Sequence[tuple[str, int]]) -> list[dict[str, float | None]]:
        result = []
        for k in range(1, len(units) + 1):
            with apply_ablation(model, units[:k], channel_dims=channel_dims):
                result.append(asdict(evaluation.accuracy(model)))
        return result

    data = [list(map(tuple, part.batches(512))) for part in (evaluation.train, evaluation.test) if part is not None]
    common = fingerprint(__version__, model.state_dict(), data, evaluation.digest(), channel_dims)
    work = {f"edit_{place:04d}_{fingerprint(common, units)}": units for place, units in enumerate(edits)}
    results = [[plain, *rows] for rows in spread_parts(follow, work, parts, partial(parsed, list[Accuracy]))]
    longest = max(len(result) for result in results)
    curve = [_mean(k, [result[k] for result in results if len(result) > k]) for k in range(longest)]
    units = sum(len(result) - 1 for result in results) / len(results)
    return _mean(units, [result[-1] for result in results]), curve


def _mean(units: float, results: Sequence[Accuracy]) -> EditedAccuracy:
    columns = ([getattr(result, name) for result in results] for name in ("clean", "memorized", "test"))
    known = ([value for value in column if value is not None] for column in columns)
    return EditedAccuracy(units, len(results), *(sum(shares) / len(shares) if shares else None for shares in known))
