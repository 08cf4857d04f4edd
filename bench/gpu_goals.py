"""Whole models on a GPU, held against what they are meant to cost: the part of `bench.gpu` behind the operators."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from bench.bench_ablation import BLOCKS, TOGETHER, Stacked, resnet9, units
from bench.gpu_time import times
from bench.peers import functorch, opacus_ghost
from bench.workloads import KINDS, VisionTransformer, Workload, accounted, classifier, scan_floor
from memloc_ext import ablation_losses, data, localize
from memloc_ext.data import Dataset, Split
from memloc_ext.models import ResNet9
from memloc_ext.training import TrainConfig, train


@dataclass(frozen=True)
class Goal:
    """A number and its bound.

    Attributes:
        name: What was measured.
        measured: The number, a ratio unless the name says otherwise.
        bound: What it should be at most, or at least; None where there is no goal.
        at_most: Which of these.
        details: More numbers for the result file.
    """

    name: str
    measured: float
    bound: float | None = None
    at_most: bool = True
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the number is on the right side."""
        if self.bound is None:
            return True
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def record(self) -> dict[str, object]:
        """Return it for a result file."""
        record = {"name": self.name, "measured": round(self.measured, 3), "bound": self.bound, "at_most": self.at_most}
        return record | {"met": self.met, **self.details}


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ViT-small": (functools.partial(VisionTransformer, dim=512), 256),
    "ResNet-9": (ResNet9, 512),
}
"""What is trained with an account, and its batch."""

TINY = {"ViT-small": (functools.partial(VisionTransformer, dim=32), 4), "ResNet-9": (lambda: ResNet9(width=0.25), 4)}
"""The same for a dry run."""

PRECISIONS: dict[str, torch.dtype | None] = {"bf16 autocast": torch.bfloat16, "TF32": None}

NORMS_ONLY = {
    ("ViT-small", "bf16 autocast"): 0.98,
    ("ResNet-9", "bf16 autocast"): 0.90,
    ("ViT-small", "TF32"): 0.80,
    ("ResNet-9", "TF32"): 0.80,
}
"""At most so many times a plain step. In bfloat16 about half of a step are products, of which weight gradients are a
third: docs/kernels.md has the arithmetic."""


@contextmanager
def tf32() -> Iterator[None]:
    """Let float32 products run on tensor cores, as trainings mostly do; back to the former settings afterwards."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def accounting(device: str, name: str, precision: str, tiny: bool = False) -> Iterator[Goal]:
    """Time an accounted training step against the plain one and Opacus' ghost norms.

    Norms are checked first, and wrong ones raise last, so that times are there all the same.

    Args:
        device: For example ``"cuda"``.
        name: One of `MODELS`.
        precision: One of `PRECISIONS`.
        tiny: Whether to take `TINY`.
    """
    build, batch = (TINY if tiny else MODELS)[name]
    torch.manual_seed(0)
    workload = replace(classifier(build(), batch).to(device), autocast=PRECISIONS[precision])
    what = f"{name}, {len(workload.inputs)} examples, {precision}"
    with tf32():
        wrong = wrong_norms(workload)
        plain = times([lambda: workload.loss().backward()], device, 1.0)
        bounds = {"norms + batch gradient": 1.1, "norms only": NORMS_ONLY[name, precision], "norms + two groups": None}
        ours = {kind: times([accounted(workload, **KINDS[kind])], device, 1.0) for kind in bounds}
        for kind, bound in bounds.items():
            ratio = ours[kind].over(plain)
            details = {"over a plain step": ratio, "plain": plain.microseconds(), **ours[kind].microseconds()}
            yield Goal(f"{what}: {kind} over a plain step", ratio["wall"], bound, details=details)
        ghost = opacus_ghost(workload)
        if ghost is not None:
            theirs = times([ghost], device, 1.0).wall
            taken = ours["norms + batch gradient"].wall
            yield Goal(f"{what}: Opacus' ghost norms over ours", theirs / taken, 2, at_most=False)
    if wrong:
        raise AssertionError(wrong)


def scan(device: str, batch: int = 64, forward_batch: int = 1024, width: float = 1.0) -> Iterator[Goal]:
    """Time the scan of all channels of ResNet-9 against its multiply-adds at the rate of a forward pass.

    Args:
        device: For example ``"cuda"``.
        batch: Examples that are scanned.
        forward_batch: Examples of the forward pass that tells the rate.
        width: Of the network, over that of the paper.
    """
    torch.manual_seed(0)
    model = resnet9(width).to(device)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    many = torch.randn(forward_batch, 3, 32, 32, device=device)
    with tf32():
        with torch.no_grad():
            forward = times([lambda: model(many)], device).wall
        counts = scan_floor(model, x[:1], BLOCKS)
        floor = batch * counts.delta * forward / (forward_batch * counts.forward)
        taken = times([lambda: ablation_losses(model, x, y, BLOCKS)], device, 2.0)
        channels = sum(units(model, site) for site in BLOCKS)
        name = f"scan of {channels} channels, {batch} examples: time over its arithmetic"
        yield Goal(name, taken.wall / floor, 2, details=taken.microseconds())
        found = ablation_losses(model, x, y, [BLOCKS[-1]])[BLOCKS[-1]].loss[:TOGETHER]
        expected = Stacked(model, x, y, TOGETHER).losses(BLOCKS[-1], 0)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # TF32 rounds products to three digits


def search(
    device: str,
    examples: int = 1000,
    reference: int = 512,
    trained_on: int = 6000,
    epochs: int = 30,
    width: float = 1.0,
) -> Iterator[Goal]:
    """Time the search for the channels that flip examples, in a ResNet-9 that has fitted wrong labels.

    A tenth of the examples comes first, so that a search which takes too long leaves a number.

    Args:
        device: For example ``"cuda"``.
        examples: Examples that are searched.
        reference: Examples that stand for the population.
        trained_on: Made images of CIFAR-10's shape, a tenth of them with a wrong label.
        epochs: Of the training.
        width: Of the network, over that of the paper.
    """
    dataset = _images(trained_on)
    split = dataset.train.to(device)
    torch.manual_seed(0)
    model = ResNet9(width=width).to(device)
    with tempfile.TemporaryDirectory() as checkpoints:
        config = TrainConfig(epochs=epochs, batch_size=128, learning_rate=0.1)
        train(model, split, config, checkpoints=checkpoints, progress=False)
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(inputs).argmax(1) for inputs, _, _ in split.batches(512)]) == split.labels
    noisy, clean = ((right & (split.memorized == kind)).nonzero()[:, 0] for kind in (True, False))
    rows = torch.cat([noisy, clean[reference:]])[:examples]
    assert len(rows) == examples, f"the network has fitted {len(noisy)} noisy and {len(clean)} clean examples only"
    population = split.batch(clean[:reference])[:2]
    x, y, _ = split.batch(rows)
    localize(model, x[:8], y[:8], reference=population)  # what a first call sets up
    for some in (examples // 10, examples):
        start = time.perf_counter()
        found = localize(model, x[:some], y[:some], reference=population)
        taken = time.perf_counter() - start
        flipped = sum(one.status == "flipped" for one in found)
        yield Goal(f"seconds to search {some} examples, {flipped} flipped", taken, 60 * some / examples)


def _images(count: int) -> Dataset:
    """Return noisy copies of a smooth pattern per class, a tenth with a wrong label."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    labels = torch.randint(10, (count,), generator=generator)
    pixels = (0.5 * patterns[labels] + 0.5 * torch.rand(count, 3, 32, 32, generator=generator)).clamp(0, 1)
    split = Split.clean(pixels, labels)
    classes = tuple(str(label) for label in range(10))
    return data.with_label_noise(Dataset("made images", split, split.subset(torch.arange(10)), classes), 0.1)


def wrong_norms(workload: Workload) -> str | None:
    """Return where the norms of four examples are not those of `torch.func`, to the precision of the products."""
    few = replace(workload, inputs=workload.inputs[:4], targets=workload.targets[:4])
    exact = functorch(replace(few, autocast=None))()
    for name, norms in accounted(few)().items():
        error = float((norms - exact[name]).abs().max() / exact[name].max())
        if not error < (0.1 if workload.autocast else 0.02):
            return f"the squared norms of {name} are wrong by {error:.3g} of the largest"
    return None
