"""How well the scores of an audit find wrong labels, beside cleanlab: ``python -m bench.audit``, mean and range.

    MEMLOC_DATA=<folder> python -m bench.audit --result bench/results/audit.json

A seed names the examples, their label noise, the initial weights, the order of the examples and the folds. CIFAR-10 is
a folder of images, ``cifar10-jpeg/train`` and ``test``, each with a folder per class. Finished seeds and all networks
are kept in the folder ``work``: a run that was killed goes on there, and several may share it. The networks of a seed
take up to 300 MB; remove the folder in the end.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from memloc_ext import audit
from memloc_ext.data import Dataset, Split
from memloc_ext.files import plain, write_json
from memloc_ext.info import info
from memloc_ext.parts import PartFiles, fingerprint
from memloc_ext.probes import Audit
from memloc_ext.probes.states import States
from memloc_ext.study import DataConfig, ModelConfig, StudyConfig, build_model, load_data
from memloc_ext.study.config import Variant
from memloc_ext.training import TrainConfig, list_checkpoints, train

EXAMPLES = 2000
FOLDS = 5
EVERY = 2
"""An audit reads the checkpoint after every second epoch."""
Name = Literal["digits", "mnist", "cifar10"]
EPOCHS: dict[Name, int] = {"digits": 20, "mnist": 12, "cifar10": 12}
MEASURES = ("auc", "precision", "restored")


@dataclass(frozen=True)
class Run:
    """What a method found with one seed.

    Attributes:
        training_passes: Passes over the training set with updates.
        gradient_passes: Those without, that an audit takes for gradients, two in its last state.
        quality: A row per score, as of `Audit.quality`.
        network: What the network of an audit has learned.
    """

    training_passes: int
    gradient_passes: int
    quality: list[dict[str, Any]]
    network: dict[str, float] | None = None


@dataclass(frozen=True)
class Options:
    """What to run and where to put it."""

    datasets: tuple[Name, ...] = ("digits", "mnist", "cifar10")
    """Which to run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Which to run of each."""
    work: Path = Path("build/audit")
    """Folder of what is kept."""
    result: Path | None = None
    """JSON file of the numbers, of other data sets in the folder ``work`` too; written after each seed."""


def study(name: Name, seed: int) -> StudyConfig:
    """Return the settings of a data set: ResNet-9 with a quarter of its channels, 10 % of uniform noise."""
    root = Path(os.environ.get("MEMLOC_DATA", "data"))
    part: dict[str, Any] = {} if name == "digits" else {"root": root, "examples": EXAMPLES, "test_examples": 1000}
    if name == "cifar10":
        part["image_size"] = 32
    return StudyConfig(
        data=DataConfig(dataset=f"folder:{root / 'cifar10-jpeg'}" if name == "cifar10" else name, **part),
        model=ModelConfig(width=0.25),
        train=TrainConfig(epochs=EPOCHS[name], batch_size=64, learning_rate=0.1, seed=seed),
        device="cpu",
    )


def plainly_trained(config: StudyConfig, dataset: Dataset, folder: Path) -> Run:
    """Audit a network over the states of its training; say how far it has memorized and learned."""
    split, epochs = dataset.train, config.train.epochs
    model = trained(config, dataset, split, "plain", folder / "plain")
    found = list_checkpoints(folder / "plain")
    states = {epoch: path for epoch, path in found.items() if epoch and epoch % EVERY == 0}
    quality = audited(model, split, folder, states)
    right, tested = (probabilities(model, part).argmax(1) == part.labels for part in (split, dataset.test))
    shares = {"wrong_labels_fitted": right[split.memorized], "test_accuracy": tested}
    network = {name: float(values.float().mean()) for name, values in shares.items()}
    return Run(epochs, len(states) + 1, quality, network)


def example_tied(config: StudyConfig, dataset: Dataset, folder: Path) -> Run:
    """Audit a network that was trained with example-tied dropout; return what dropping its channels says."""
    split, epochs = dataset.train, config.train.epochs
    model = trained(config, dataset, split, "example_tied", folder / "tied")
    return Run(epochs, 2, [row for row in audited(model, split, folder) if row["score"] == "score_drop"])


def same_budget(config: StudyConfig, dataset: Dataset, folder: Path) -> Run:
    """Let cleanlab find wrong labels from networks that together are trained for as long as one is for an audit."""
    short = replace(config.train, epochs=config.train.epochs // (FOLDS - 1))
    return all_folds(replace(config, train=short), dataset, folder)


def all_folds(config: StudyConfig, dataset: Dataset, folder: Path) -> Run:
    """Let cleanlab find wrong labels from networks that are trained for as many epochs as the one of an audit."""
    out_of_sample = cross_validated(config, dataset, folder / f"folds_{config.train.epochs}")
    return Run((FOLDS - 1) * config.train.epochs, 0, cleanlab_quality(dataset.train, out_of_sample))


METHODS: dict[str, Callable[[StudyConfig, Dataset, Path], Run]] = {
    "audit": plainly_trained,
    "example-tied dropout": example_tied,
    "cleanlab, same budget": same_budget,
    f"cleanlab, {FOLDS} folds": all_folds,
}


def audited(model: nn.Module, split: Split, folder: Path, states: States | None = None) -> list[dict[str, Any]]:
    """Return what `Audit.quality` says of an audit that was not told which labels are wrong."""
    found = audit(model, split, states=states, memorized=[], batch_size=64, parts=PartFiles(folder / "parts"))
    return replace(found, memorized=split.memorized.tolist()).quality()


def trained(config: StudyConfig, dataset: Dataset, split: Split, variant: Variant, folder: Path) -> nn.Module:
    """Train a network of a study on some examples."""
    model = build_model(config, dataset, variant)
    train(model, split, config.train, checkpoints=folder, progress=False)
    return model.eval()


@torch.no_grad()
def probabilities(model: nn.Module, split: Split) -> Tensor:
    """Return the probability of each class, ``[N, classes]``."""
    return torch.cat([model(batch.x).softmax(1) for batch in split.batches(64)])


def cross_validated(config: StudyConfig, dataset: Dataset, folder: Path) -> Tensor:
    """Return the probabilities that networks give to examples they were not trained on, ``[N, classes]``."""
    from sklearn.model_selection import StratifiedKFold

    split, found = dataset.train, torch.empty(len(dataset.train), dataset.num_classes)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=config.train.seed).split(split.labels, split.labels)
    for number, (fitted, held_out) in enumerate(folds):
        part = split.subset(torch.as_tensor(fitted))
        model = trained(config, dataset, part, "plain", folder / str(number))
        held_out = torch.as_tensor(held_out)
        found[held_out] = probabilities(model, split.subset(held_out))
    return found


def cleanlab_quality(split: Split, out_of_sample: Tensor) -> list[dict[str, Any]]:
    """Return what `Audit.quality` says of cleanlab's label quality and of its confident learning.

    The latter ranks what ``find_label_issues`` finds first, and within and behind it by self confidence. The suggested
    label is the most probable one.
    """
    from cleanlab.filter import find_label_issues  # pyright: ignore[reportMissingImports]
    from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]

    labels, probable = split.labels.numpy(), out_of_sample.numpy()
    methods = ("self_confidence", "normalized_margin")
    scores = {name: 1 - get_label_quality_scores(labels, probable, method=name) for name in methods}
    scores["confident_learning"] = scores["self_confidence"] + find_label_issues(labels, probable, n_jobs=1)
    return Audit(
        "confident_learning",
        split.indices.tolist(),
        split.labels.tolist(),
        out_of_sample.argmax(1).tolist(),
        {name: values.tolist() for name, values in scores.items()},
        split.memorized.tolist(),
        split.true_labels.tolist(),
    ).quality()


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per method and score: mean, least and largest of each measure over the seeds."""
    table = []
    for method in dict.fromkeys(run["method"] for run in runs):
        of_method = [run for run in runs if run["method"] == method]
        passes = {name: of_method[0][name] for name in ("training_passes", "gradient_passes")}
        for rows in zip(*(run["quality"] for run in of_method), strict=True):
            row = {"method": method, "score": rows[0]["score"], "seeds": len(rows), **passes}
            for measure in MEASURES:
                values = [each[measure] for each in rows]
                row[measure] = {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
            table.append(row)
    return table


def kept(options: Options) -> list[dict[str, Any]]:
    """Return what is finished of each data set."""
    table = []
    for name in EPOCHS:
        found = {(s, m): PartFiles(options.work).get(key(name, s, m)) for s in options.seeds for m in METHODS}
        runs = [{"seed": seed, "method": m, **run} for (seed, m), run in found.items() if run is not None]
        if runs:
            table.append({"dataset": name, "config": settings(name, 0), "summary": summary(runs), "runs": runs})
    return table


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """Return mean and range of each measure, a line per score, a column per data set; says where seeds are missing."""
    found = {one["dataset"]: {(row["method"], row["score"]): row for row in one["summary"]} for one in table}
    most = max(row["seeds"] for one in table for row in one["summary"])

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return "not run"
        auc, *shares = (row[measure] for measure in MEASURES)
        lines = [f"{auc['mean']:.3f} ({auc['min']:.3f} to {auc['max']:.3f})"]
        lines += [f"{one['mean'] * 100:.0f} % ({one['min'] * 100:.0f} to {one['max'] * 100:.0f})" for one in shares]
        return "<br>".join(lines if row["seeds"] == most else [*lines, f"seeds: {row['seeds']}"])

    lines = [["method", "score", "training passes", *found], ["---"] * (len(found) + 3)]
    for method, score in dict.fromkeys(line for rows in found.values() for line in rows):
        of_score = [rows.get((method, score)) for rows in found.values()]
        passes = ", ".join(str(row["training_passes"]) if row else "-" for row in of_score)
        lines.append([method, score.removeprefix("score_"), passes, *map(cell, of_score)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings(name: Name, seed: int) -> dict[str, Any]:
    """Return the settings of a data set that were used, without its place."""
    config = plain(study(name, seed))
    used = {part: config[part] for part in ("data", "model", "dropout", "train")}
    return {**used, "data": {**used["data"], "dataset": name, "root": None}}


def key(name: Name, seed: int, *method: str) -> str:
    return f"{name}_{seed}_{fingerprint(settings(name, seed), FOLDS, EVERY, *method)}"


def main() -> None:
    """Run what is not kept yet, for all seeds the cheap methods first, write the numbers after each, print a table."""
    options = tyro.cli(Options)
    parts = PartFiles(options.work)
    for name, method, seed in itertools.product(options.datasets, METHODS, options.seeds):
        if parts.get(key(name, seed, method)) is None:
            dataset = load_data(study(name, seed))
            assert isinstance(dataset, Dataset)  # not one of a user's own
            run = METHODS[method](study(name, seed), dataset, options.work / key(name, seed))
            parts.put(key(name, seed, method), run)
        if options.result:
            result = {
                "command": " ".join(["python -m bench.audit", *sys.argv[1:]]),
                "folds": FOLDS,
                "threads": torch.get_num_threads(),
                "info": info().splitlines(),
                "table": kept(options),
            }
            write_json(options.result, result)
    print(markdown(kept(options)))


if __name__ == "__main__":
    main()
