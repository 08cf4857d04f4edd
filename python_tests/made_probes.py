"""Rewindings and retrainings made up for tests of what is done with them."""

from memloc_ext.probes import (
    Accuracy,
    GroupRetraining,
    GroupRewinding,
    RetrainedEpoch,
    Retraining,
    Rewinding,
    RewoundAccuracy,
)

WHOLE = Accuracy(clean=1.0, memorized=0.96, memorized_true=0.02, test=0.9)
GROUPS = ("conv1", "blocks.0", "(root)", "head")


def made_accuracy(memorized: float | None, clean: float = 0.8, test: float | None = 0.7) -> Accuracy:
    return Accuracy(clean, memorized, None if memorized is None else (1 - memorized) / 3, test)


def made_rewinding(
    memorized: dict[str, list[float | None]] | None = None,
    epochs: tuple[int, ...] = (0, 2),
    unchanged: Accuracy = WHOLE,
) -> Rewinding:
    """Group to its accuracy on memorized examples at each epoch; half of it without the batch norms' statistics.

    The last group has no batch norm.
    """
    memorized = memorized or {"conv1": [0.1, 0.5], "blocks.0": [0.9, 0.95], "(root)": [0.5, 0.9], "head": [0.7, 0.96]}
    groups = {}
    for group, shares in memorized.items():
        buffers = group != list(memorized)[-1]
        cells = []
        for epoch, share in zip(epochs, shares, strict=True):
            full = made_accuracy(share)
            bare = made_accuracy(None if share is None else share / 2) if buffers else full
            cells.append(RewoundAccuracy(epoch, full, bare))
        groups[group] = GroupRewinding(buffers, cells)
    return Rewinding(unchanged, groups)


def made_retraining(
    memorized: dict[str, list[float | None]] | None = None, stopped: str = "fitted", unchanged: Accuracy = WHOLE
) -> Retraining:
    """Group to its accuracy on memorized examples after each epoch; the first group is not fitted in time."""
    memorized = memorized or {
        "conv1": [0.1, 0.3, 0.4],
        "blocks.0": [0.95, 0.96],
        "(root)": [0.2, 0.9],
        "head": [0.1, 0.93],
    }
    groups = {}
    for number, (group, shares) in enumerate(memorized.items()):
        epochs = [
            RetrainedEpoch(epoch, None if epoch == 0 else 1 / epoch, made_accuracy(share, test=None))
            for epoch, share in enumerate(shares)
        ]
        groups[group] = GroupRetraining(epochs, "ended" if number == 0 else stopped)
    return Retraining(unchanged, groups)
