"""The audit: how memorized each training example is, by what a training leaves behind, and a suggested label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from memloc_ext._version import __version__
from memloc_ext.batches import device_of
from memloc_ext.distributed import once
from memloc_ext.examples import Data, digest, examples
from memloc_ext.files import parsed
from memloc_ext.marks import Marks, marked, truth
from memloc_ext.nn.insert import example_tied_sites
from memloc_ext.parts import Parts, fingerprint, spread_parts
from memloc_ext.probes.account_epoch import roc_auc
from memloc_ext.probes.audit_passes import OTHERS, Pass, Passes
from memloc_ext.probes.states import State, States, read_state, recorded_rates, sources_of
from memloc_ext.tasks import (
    Classification,
    Task,
    TaskName,
    Tokens,
    identity,
    task_of,
)

ScoreName = Literal["gradnorm", "self_influence", "margin", "loss", "forgetting", "cosine", "drop"]
"""Every score, in the order of the columns."""


@dataclass(frozen=True)
class Audit:
    """How memorized each of N training examples is; lists are ``[N]``, in ascending order of the examples' numbers.

    Attributes:
        score: The one of ``scores`` that ranks the examples.
        indices: Number of each example.
        labels: Its label; None unless the task is classification.
        suggested: The label that is suggested in its place, often the same; None likewise.
        scores: Name, ``score_*``, to the score of each example; higher is more memorized or suspect.
        memorized: Whether it is marked as memorized; None where that is not known.
        true_labels: Its label before any noise; None where that is not known.
    """

    score: str
    indices: list[int]
    labels: list[int] | None
    suggested: list[int] | None
    scores: dict[str, list[float]]
    memorized: list[bool] | None = None
    true_labels: list[int] | None = None

    def __post_init__(self) -> None:
        columns = [self.labels, self.suggested, self.memorized, self.true_labels, *self.scores.values()]
        if self.score not in self.scores or any(c is not None and len(c) != len(self.indices) for c in columns):
            raise ValueError("Audit: score must be among scores, and every list have a value for each example")

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per example, in the order of their numbers.

        The keys are ``index``; ``label`` and ``suggested``, None unless the task is classification; every ``score_*``;
        and ``rank`` by the chosen score, from 1, the most suspect, to N. Of equal scores the lower number comes first.
        """
        ranks = {place: rank for rank, place in enumerate(self._order(self.score), 1)}
        labels, suggested = (column or [None] * len(self.indices) for column in (self.labels, self.suggested))
        return [
            {
                "index": index,
                "label": labels[i],
                "suggested": suggested[i],
                **{name: values[i] for name, values in self.scores.items()},
                "rank": ranks[i],
            }
            for i, index in enumerate(self.indices)
        ]

    def top(self, n: int = 50) -> list[dict[str, Any]]:
        """Return the rows of the n most suspect examples, by rank."""
        return sorted(self.rows(), key=lambda row: row["rank"])[:n]

    def quality(self) -> list[dict[str, Any]]:
        """Return how well each score finds the marked examples, a row per score; none if no example is marked.

        The keys are ``score``; ``auc``: area under the ROC curve; ``precision``: share of marked ones among the n most
        suspect, n being the number of marked ones; ``restored``: share of the marked examples with a wrong label that
        are among these n and whose suggested label is the true one, None where true labels are not known or not
        different. Where scores are equal, all are means over the orders that these could have.
        """
        marks = self.memorized or []
        n, told, rows = sum(marks), {}, []
        if self.labels is not None and self.suggested is not None and self.true_labels is not None:
            columns = enumerate(zip(marks, self.labels, self.suggested, self.true_labels, strict=False))
            told = {i: suggested == true for i, (mark, label, suggested, true) in columns if mark and label != true}
        for name, values in self.scores.items() if n else ():
            least = sorted(values, reverse=True)[n - 1]
            share = (n - sum(value > least for value in values)) / values.count(least)  # of the equal ones
            among = [1.0 if value > least else share if value == least else 0.0 for value in values]
            auc = roc_auc(torch.tensor(values, dtype=torch.float64), torch.tensor(marks))
            precision = sum(part for part, mark in zip(among, marks, strict=True) if mark) / n
            restored = sum(among[i] for i, right in told.items() if right) / len(told) if told else None
            rows.append({"score": name, "auc": auc, "precision": precision, "restored": restored})
        return rows

    def _order(self, score: str) -> list[int]:
        """Return the places of the examples, the most suspect first."""
        values = self.scores[score]
        return sorted(range(len(values)), key=lambda i: -values[i])


def audit(
    model: nn.Module,
    data: Data,
    *,
    states: States | None = None,
    learning_rates: Mapping[int, float] | Sequence[float] | None = None,
    memorized: Marks | None = None,
    true_labels: Any | None = None,
    test: Data | None = None,
    task: TaskName | Task = "classification",
    groups: object = None,
    score: str | None = None,
    batch_size: int = 512,
    num_workers: int = 0,
    parts: Parts | None = None,
) -> Audit:
    """Score every training example by how memorized it is, and suggest a label for it.

    The scores, of which higher is more memorized or suspect:

    - ``score_gradnorm``: norm of the gradient of the example's own loss, mean over the states.
    - ``score_self_influence``: sum over the states of learning rate times squared norm (TracIn).
    - ``score_margin``: the logit of the label less the largest other one, mean over the states (area under the margin),
      negated; for tokens the mean over the labelled ones. Not for tasks of your own.
    - ``score_loss``: mean loss.
    - ``score_forgetting``: how often the model is right in a state and wrong in the next; the number of states for an
      example about which it is right in none.
    - ``score_cosine``: cosine of the example's gradient with the mean gradient of the clean examples in the last state,
      negated; with that of all examples where none is known as memorized, or none as clean.
    - ``score_drop``: for a model with example-tied dropout, the loss in mode ``drop`` less that with the example's own
      channels, in the last state.

    The suggested label of a model with example-tied dropout is what it predicts without memorization channels, in the
    last state. Else it is what is predicted in most states, each counted with the standard deviation of the losses over
    the examples: that is largest when the network knows what examples have in common and has not memorized the others
    yet, and near 0 at the beginning and once all are fitted.

    The model runs in evaluation mode, an `ExampleTiedDropout` in mode ``train``, and in a copy: it is left as it was.
    Each state takes a forward and a backward pass over the data, the last one two. Several processes share the states,
    see `memloc_ext.distributed`.

    Args:
        model: Any model; what it was trained with, such as example-tied dropout, is in it.
        data: Training examples, at least one; see `memloc_ext.examples`. Each pass must yield the same ones, in any
            order.
        states: Epoch to state dict or path, a list of such from epoch 0 on, or a folder of checkpoints, as for
            `rewind`; by default the model as it is is the only state.
        learning_rates: One per state, by epoch or in the order of the epochs, at least 0; by default those of the last
            steps before the states, 0 before any, if the last one is a checkpoint of this package, else 1.
        memorized: Bool ``[N]`` by number, or the numbers; by default what the data set says, or none.
        true_labels: Targets before any noise, ``[N]`` by number; by default what the data set says. Only for `quality`.
        test: Not read; every probe takes this and ``groups``, so that the same settings go to all.
        task: ``classification``, ``tokens``, or an object with ``loss`` and ``right``; see `memloc_ext.tasks`.
        groups: Not read.
        score: What ranks the examples, with ``score_`` or without; by default ``drop`` if the model has example-tied
            dropout, else ``loss``, the best on the digits.
        batch_size: Examples at a time of a data set, at least 1; a ``DataLoader`` has its own.
        num_workers: Processes that read a data set; a ``DataLoader`` has its own.
        parts: Keeps finished states for a call with the same arguments, such as `memloc_ext.parts.PartFiles`.

    Returns:
        The scores, ranks and suggested labels.

    Raises:
        ValueError: If an argument breaks the above, a state is damaged or of another model, a loss or gradient is not
            finite, or the numbers of the examples cannot be known.
        TypeError: If data can be iterated only once, or an epoch is no integer.
        OSError: If a state cannot be read.

    Source: Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", NeurIPS 2020; Pleiss et
    al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", NeurIPS 2020; Toneva et al., "An
    Empirical Study of Example Forgetting during Deep Neural Network Learning", ICLR 2019; Maini et al., "Can Neural
    Network Memorization Be Localized?", ICML 2023.
    """
    model, task = getattr(model, "_orig_mod", model), task_of(task)
    names = _names(model, task)
    chosen = (score or ("drop" if "drop" in names else "loss")).removeprefix("score_")
    if chosen not in names:
        raise ValueError(f"audit: score must be one of {', '.join(names)}, got {score!r}")
    sources = {0: model.state_dict()} if states is None else sources_of("audit", states)
    if not sources:
        raise ValueError("audit: states must hold at least one, got none")
    rates, last = _rates(sources, learning_rates), max(sources)
    source = examples("audit", data, device_of(model), num_workers=num_workers)
    marks, true = marked("audit", memorized, data), truth("audit", true_labels, data)
    passes = Passes(model, source, task, marks, batch_size)

    def one(epoch: int) -> dict[str, Any]:
        return asdict(passes.of(read_state("audit", sources[epoch], model), f"state {epoch}", epoch == last))

    work, common, digests = {}, None, {}
    if parts is not None:
        digests = once(lambda: {e: fingerprint(read_state("audit", source, model)) for e, source in sources.items()})
        told = None if marks is None else marks(source.indices)
        common = fingerprint(__version__, str(model), digest(source), told, identity(task), batch_size)
    for epoch in sources:
        key = epoch if parts is None else fingerprint(common, epoch, epoch == last, digests[epoch])
        work[f"audit_{key}"] = epoch
    found = spread_parts(one, work, parts, partial(parsed, Pass))
    if any(pas.ids != found[0].ids for pas in found):
        raise ValueError(OTHERS)
    ids = torch.tensor(found[0].ids)
    scores, labelled = _scores(found, rates), isinstance(task, Classification)
    return Audit(
        f"score_{chosen}",
        found[-1].ids,
        found[-1].labels if labelled else None,
        _suggested(found) if labelled else None,
        {f"score_{name}": scores[name].tolist() for name in names},
        None if marks is None else marks(ids).tolist(),
        true(ids).tolist() if true is not None and labelled else None,
    )


def _names(model: nn.Module, task: Task) -> list[str]:
    """Return the scores that there are for a model and a task, by their names without ``score_``."""
    there = {"margin": isinstance(task, Classification | Tokens), "drop": bool(example_tied_sites(model))}
    return [name for name in get_args(ScoreName) if there.get(name, True)]


def _rates(sources: Mapping[int, State], given: Mapping[int, float] | Sequence[float] | None) -> list[float]:
    """Return the learning rate of each state."""
    if given is None:
        known = once(lambda: recorded_rates(sources[max(sources)]))
        return [known[epoch] for epoch in sources] if known.keys() >= sources.keys() else [1.0] * len(sources)
    by_epoch = dict(given) if isinstance(given, Mapping) else dict(zip(sources, given, strict=False))
    if len(given) != len(sources) or by_epoch.keys() != sources.keys():
        rule = f"one per state, of epochs {', '.join(map(str, sources))}"
        raise ValueError(f"audit: learning_rates must be {rule}, got {given}")
    rates = [float(by_epoch[epoch]) for epoch in sources]
    if not all(0 <= rate < math.inf for rate in rates):
        raise ValueError(f"audit: learning_rates must be finite and at least 0, got {given}")
    return rates


def _scores(found: Sequence[Pass], rates: Sequence[float]) -> dict[str, Tensor]:
    """Return the scores that there are by name, ``[N]`` float64."""

    def table(name: str) -> Tensor:
        return torch.tensor([getattr(one, name) for one in found], dtype=torch.float64)

    sqnorm, loss, right, last = table("sqnorm"), table("loss"), table("right").bool(), found[-1]
    forgotten = (right[:-1] & ~right[1:]).sum(0)
    scores = {
        "gradnorm": sqnorm.sqrt().mean(0),
        "self_influence": torch.tensor(rates, dtype=torch.float64) @ sqnorm,
        "margin": -table("margin").mean(0),
        "loss": loss.mean(0),
        "forgetting": torch.where(right.any(0), forgotten, len(found)).double(),
        "cosine": -torch.tensor(last.cosine, dtype=torch.float64),
    }
    if last.drop:
        scores["drop"] = torch.tensor(last.drop, dtype=torch.float64) - loss[-1]
    return scores


def _suggested(found: Sequence[Pass]) -> list[int]:
    """Return the labels that are suggested, see `audit`."""
    if found[-1].without:
        return found[-1].without
    predicted = torch.tensor([one.predicted for one in found])
    weights = torch.tensor([one.loss for one in found], dtype=torch.float64).std(1, correction=0)
    votes = torch.stack([weights @ (predicted == one).double() for one in predicted])
    return predicted.gather(0, votes.argmax(0)[None])[0].tolist()
