"""The sections of a run's report, in the order of the paper."""

from __future__ import annotations

from memloc_ext.study.report import (
    accounting_answers,
    accounting_figures,
    accuracy_answers,
    figures,
    localization_answers,
    localization_figures,
    retraining_answers,
    retraining_figures,
    rewinding_answers,
    rewinding_figures,
)
from memloc_ext.study.report.section import Picture, Section
from memloc_ext.study.report.text import is_mislabelled
from memloc_ext.study.run import Run


def sections(run: Run) -> list[Section]:
    """Return a section for everything that is finished of a run."""
    found = [_memorization(run), _accounting(run), _rewinding(run), _retraining(run), _localization(run), _dropout(run)]
    return [section for section in found if section is not None]


def _memorization(run: Run) -> Section | None:
    if "plain" not in run.histories:
        return None
    curves = figures.accuracy_curves({"plain": run.histories["plain"]})
    return Section(
        name="memorization",
        title="Does it memorize?",
        method="Plain training, without dropout. A network that fits examples with wrong labels, or atypical ones, has "
        "memorized them; what it predicts for the others, it may have learned from all of them.",
        answers=accuracy_answers.plain_answers(run.metrics, is_mislabelled(run)),
        pictures=[
            Picture("plain_curves", "Accuracy over the epochs", curves, "Accuracy on the labels that were given."),
        ],
    )


def _accounting(run: Run) -> Section | None:
    if run.accounting is None:
        return None
    norms, cosine, histograms, bands = accounting_figures.all_figures(run.accounting).values()
    return Section(
        name="accounting",
        title="Whose gradient is it?",
        method="The gradient of plain training is the sum of what the clean and what the memorized examples contribute "
        "to it. Both are added up over the batches of an epoch, for every parameter.",
        answers=accounting_answers.answers(run.accounting),
        pictures=[
            Picture(
                "gradient_norms",
                "Gradient norm per layer group and epoch",
                norms,
                "Norm of the gradient per layer group, from clean, from memorized and from all examples. The paper: "
                "10 % noisy examples have a norm comparable to the clean 90 % (ResNet-9, CIFAR-10, epochs 15 to 20).",
            ),
            Picture(
                "gradient_cosine",
                "Cosine per layer group and epoch",
                cosine,
                "Cosine between the gradient of the clean and that of the memorized examples; red: they point against "
                "each other. The paper: strongly negative throughout.",
            ),
            Picture(
                "example_norms",
                "Norms of single examples' gradients",
                histograms,
                "Norm of the gradient of every single example's own loss, taken as the example was trained on. The "
                "first bin also holds everything below it.",
            ),
            Picture(
                "example_norms_auc",
                "Norms and area under the ROC curve per epoch",
                bands,
                "Left: the same over the epochs. Right: area under the ROC curve of “memorized” predicted from the "
                "norm, 1 if it tells all of them apart, ½ (dotted) if it tells nothing.",
            ),
        ],
        notes=accounting_answers.cost(run.accounting),
    )


def _rewinding(run: Run) -> Section | None:
    if run.rewinding is None:
        return None
    drawn = rewinding_figures.all_figures(run.rewinding)
    texts = {
        "rewinding_accuracy": (
            "Accuracy per layer group and epoch",
            "Accuracy with one layer group put back to its weights after an epoch. Solid: its batch-norm statistics "
            "too; dotted: without them. Faint: the model as it is. The paper: most groups can be rewound a long way "
            "without losing the memorized examples.",
        ),
        "rewinding_memorized": (
            "Accuracy on memorized examples",
            "The same as numbers: accuracy on the memorized examples in percent, statistics put back too.",
        ),
    }
    return Section(
        name="rewinding",
        title="Which layers can be turned back?",
        method="The trained network with a single layer group put back to what it was after an earlier epoch. If the "
        "memorized examples are lost, what the group learned since then is needed for them.",
        answers=rewinding_answers.answers(run.rewinding),
        pictures=[Picture(name, texts[name][0], figure, texts[name][1]) for name, figure in drawn.items()],
    )


def _retraining(run: Run) -> Section | None:
    if run.retraining is None:
        return None
    accuracy, regained = retraining_figures.all_figures(run.retraining).values()
    return Section(
        name="retraining",
        title="Which layers does memorization need?",
        method="A single layer group is put back to its initial weights and trained again, alone, on the clean "
        "examples only; everything else stays as it is. If the memorized labels come back, though none "
        "of them was seen, the rest of the network holds them.",
        answers=retraining_answers.answers(run.retraining),
        pictures=[
            Picture(
                "retraining_accuracy",
                "Accuracy per layer group and epoch",
                accuracy,
                "Accuracy while one layer group is trained again; epoch 0: at its initial weights. The paper: for most "
                "groups memorized accuracy comes back.",
            ),
            Picture(
                "retraining_regained",
                "Accuracy before and after",
                regained,
                "Accuracy with the group at its initial weights, and after its training.",
            ),
        ],
    )


def _localization(run: Run) -> Section | None:
    if not run.localizations:
        return None
    found = run.localizations
    drawn = localization_figures.all_figures(found)
    texts = {
        "localization_units": (
            "Units per example",
            "Number of units until the prediction flips. The paper: around 5 for noisy examples, more for clean ones.",
        ),
        "localization_sites": (
            "Units per site",
            "Where these units are, from input to output. The mark is where a bar would end if units were found at "
            "random; in brackets: how many units there are.",
        ),
        "localization_accuracy": (
            "Accuracy after each unit",
            "Accuracy while the units of one example are switched off, one after another: mean over the examples that "
            "have so many; the fewer they are, the smaller the point. With example-tied dropout each training example "
            "keeps its own mask; test examples have none.",
        ),
        "localization_memorization": (
            "Share of memorization channels",
            "Example-tied dropout: are the units that flip an example its memorization channels? By chance a unit "
            "among those that the example keeps would be one as often as the third bar says.",
        ),
    }
    return Section(
        name="localization",
        title="Which units flip an example?",
        method="For single training examples, the channel or neuron whose removal raises the example's loss most, and "
        "that of other examples least, is switched off, and again, until the prediction is no longer the label the "
        "model was trained on.",
        answers=localization_answers.answers(found),
        pictures=[Picture(name, texts[name][0], figure, texts[name][1]) for name, figure in drawn.items()],
        notes=localization_answers.notes(found),
    )


def _dropout(run: Run) -> Section | None:
    if set(run.histories) <= {"plain"}:
        return None
    return Section(
        name="dropout",
        title="Can memorization be put where one wants it?",
        method="Example-tied dropout ties some channels to single examples during training, so that memorization "
        "settles there. If it does, switching those channels off takes the memorized labels with it and leaves the "
        "rest. The controls: standard dropout, and one fixed mask for all examples, which is a narrower network.",
        answers=accuracy_answers.dropout_answers(run.metrics, is_mislabelled(run)),
        pictures=[
            Picture(
                "accuracy",
                "Accuracy per model and mode",
                figures.accuracy_bars(run.metrics),
                "Each model and each way to evaluate it. A test example has no mask of its own, hence the dash.",
            ),
            Picture(
                "curves",
                "Accuracy over the epochs",
                figures.accuracy_curves(run.histories),
                "Accuracy after each epoch on the labels that were given; dashed: memorization channels switched off.",
            ),
        ],
    )
